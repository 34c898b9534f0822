/* What is added to a product: the base's own increments, tile by tile for all rows, and what adapters
 * add, in two ways. Rows that fill a tile of the product with one adapter
 * get theirs tile by tile; all other rows of adapters, lone rows, get theirs when the product is
 * done: each has factors of its own to read, which were fetched meanwhile. Where an adapter has gains
 * all its rows are lone rows. All of it runs inside a parallel region. */
#pragma once

#include "kernels.h"
#include "tiles.h"

static inline int has_gain(const low_rank_t *adds, int64_t segment) {
    const pair_t *pair = adds->segments[segment].pairs + adds->first;
    for (int64_t j = 0; j < adds->num_projections; j++)
        if (pair[j].gain) return 1;
    return 0;
}

/* Whether rows row..row+rows-1, a tile, get theirs there. */
static inline int fills_tile(const low_rank_t *adds, int64_t row, int64_t rows) {
    int64_t s = adds->segment_of[row];
    return rows == TILE_ROWS && s >= 0 && row + rows <= adds->segments[s].end && !has_gain(adds, s);
}

/* `inner` of the rows that fill tiles; the threads of the region share the work and wait for each
 * other. */
void shrink_tiles(const low_rank_t *adds, const float *x, int64_t rows, int64_t in);

/* Let a tile have what is added to TILE_WIDTH columns from `column` on, if these are one
 * projection's. Returns whether they are not: then it is added to what was stored. */
int add_segment(const low_rank_t *adds, int64_t row, int64_t column, target_t *to);
int add_all_rows(const increments_t *incs, int64_t row, int64_t column, target_t *to);

/* Add to columns column..column+width-1 of the tile at `row`; `y` is where they begin. */
void expand_tile(const low_rank_t *adds, int64_t row, int64_t column, int64_t width, float *y,
                 int64_t y_stride);

/* `inner` of all rows for the base's increments; the threads share the work and wait likewise. */
void shrink_all(const increments_t *incs, const float *x, int64_t rows, int64_t in);

/* As `expand_tile`, for the base's increments and 1 to TILE_ROWS rows. */
void expand_rows(const increments_t *incs, int64_t row, int64_t rows, int64_t column, int64_t width,
                 float *y, int64_t y_stride);

/* The lone rows, in order; returns how many there are. */
int64_t list_lone_rows(const low_rank_t *adds, int64_t rows, int32_t *lone);

/* Let a lone row have its gains and everything that is added; x and y are where it begins. */
void add_lone_row(const low_rank_t *adds, int64_t row, const float *x, float *y, int64_t in);

/* The factors of some lone rows, run by run. */
typedef struct {
    const low_rank_t *adds;
    const int32_t *lone;
    int64_t number, in, piece;
    const float *at, *end;
} coming_t;

/* Begin with the first `number` rows of `lone`; returns how many floats there are. */
int64_t begin_coming(coming_t *coming, const low_rank_t *adds, const int32_t *lone, int64_t number,
                     int64_t in);

/* The next at most `floats` of them; returns how many, 0 at the end. */
int64_t next_coming(coming_t *coming, int64_t floats, const float **from);
