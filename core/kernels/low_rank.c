/* What the base's increments and adapters add: products with their low-rank factors, of adapters read
 * where the leases hold them. */
#include "low_rank.h"

#include <omp.h>

#define RANKS 4 /* ranks that share one pass over what they read */
#define ROWS (TILE_ROWS > 6 ? 4 : 2) /* rows likewise; the sums of all stay in registers */

/* inner[t, r] = scale * x[t] a[r]; `rows` and `ranks` are constants where this is inlined. */
INLINE void shrink_block(const float *restrict x, int64_t in, const float *restrict a, float scale,
                         float *restrict inner, int64_t inner_stride, const int rows,
                         const int ranks) {
    float sums[RANKS][ROWS] = {{0.0f}};
    for (int64_t i = 0; i < in; i++)
#pragma GCC unroll 4
        for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
            for (int t = 0; t < rows; t++) sums[r][t] += a[r * in + i] * x[t * in + i];
    for (int r = 0; r < ranks; r++)
        for (int t = 0; t < rows; t++) inner[t * inner_stride + r] = scale * sums[r][t];
}

/* `shrink_block` for all ranks of a pair and a constant number of rows. */
INLINE void shrink(const float *x, int64_t in, const pair_t *pair, float *inner,
                   int64_t inner_stride, const int rows) {
    float scale = (float)pair->scale;
    int64_t r = 0;
    for (; r + RANKS <= pair->rank; r += RANKS)
        shrink_block(x, in, pair->a + r * in, scale, inner + r, inner_stride, rows, RANKS);
    for (; r < pair->rank; r++)
        shrink_block(x, in, pair->a + r * in, scale, inner + r, inner_stride, rows, 1);
}

void shrink_tiles(const low_rank_t *adds, const float *x, int64_t rows, int64_t in) {
    int64_t tiles = rows / TILE_ROWS;
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t start = tile * TILE_ROWS;
        if (!fills_tile(adds, start, TILE_ROWS)) continue;
        const pair_t *pair = adds->segments[adds->segment_of[start]].pairs + adds->first;
        float *inner = adds->inner + start * adds->inner_stride;
        for (int64_t j = 0; j < adds->num_projections; inner += pair->rank, j++, pair++)
            for (int64_t t = 0; t < TILE_ROWS; t += ROWS)
                shrink(x + (start + t) * in, in, pair, inner + t * adds->inner_stride,
                       adds->inner_stride, ROWS);
    }
}

/* y[t, :width] += inner[t] b[:, :width]; `rows` is a constant where this is inlined. */
INLINE void expand(const float *restrict inner, int64_t inner_stride, const float *restrict b,
                   int64_t rank, int64_t out, float *restrict y, int64_t y_stride, int64_t width,
                   const int rows) {
    if (width < TILE_WIDTH) {
        for (int64_t r = 0; r < rank; r++)
            for (int t = 0; t < rows; t++)
                for (int64_t c = 0; c < width; c++)
                    y[t * y_stride + c] += inner[t * inner_stride + r] * b[r * out + c];
        return;
    }
    wide_t sums[TILE_ROWS][COLS];
#pragma GCC unroll 8
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) sums[t][c] = *(wide_t *)(y + t * y_stride + c * WIDE);
#pragma GCC unroll 1
    for (int64_t r = 0; r < rank; r++)
#pragma GCC unroll 8
        for (int t = 0; t < rows; t++)
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++)
                sums[t][c] +=
                    inner[t * inner_stride + r] * *(const wide_t *)(b + r * out + c * WIDE);
#pragma GCC unroll 8
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) *(wide_t *)(y + t * y_stride + c * WIDE) = sums[t][c];
}

/* `expand` for columns column..column+width-1 of a matrix, whose projections have `outs`. */
INLINE void expand_columns(const pair_t *pair, const int64_t *outs, const float *inner,
                           int64_t inner_stride, int64_t column, int64_t width, float *y,
                           int64_t y_stride, const int rows) {
    int64_t end = column + width, first = 0; /* `first` output of the projection */
    for (int64_t j = 0; column < end; first += outs[j++], inner += pair++->rank) {
        int64_t last = first + outs[j], count = (last < end ? last : end) - column;
        if (count <= 0) continue;
        expand(inner, inner_stride, pair->b + column - first, pair->rank, outs[j], y, y_stride,
               count, rows);
        column += count;
        y += count;
    }
}

static int add_pair(const pair_t *pair, const int64_t *outs, const float *inner,
                    int64_t inner_stride, int64_t column, target_t *to) {
    for (; column >= *outs; inner += pair++->rank) column -= *outs++;
    if (column + TILE_WIDTH > *outs) return 1;
    to->tails[to->num_tails++] =
        (tail_t){inner, pair->b + column, inner_stride, *outs, pair->rank};
    return 0;
}

int add_segment(const low_rank_t *adds, int64_t row, int64_t column, target_t *to) {
    return add_pair(adds->segments[adds->segment_of[row]].pairs + adds->first, adds->outs,
                    adds->inner + row * adds->inner_stride, adds->inner_stride, column, to);
}

int add_all_rows(const increments_t *incs, int64_t row, int64_t column, target_t *to) {
    return add_pair(incs->pairs, incs->outs, incs->inner + row * incs->inner_stride,
                    incs->inner_stride, column, to);
}

void expand_tile(const low_rank_t *adds, int64_t row, int64_t column, int64_t width, float *y,
                 int64_t y_stride) {
    expand_columns(adds->segments[adds->segment_of[row]].pairs + adds->first, adds->outs,
                   adds->inner + row * adds->inner_stride, adds->inner_stride, column, width, y,
                   y_stride, TILE_ROWS);
}

void shrink_all(const increments_t *incs, const float *x, int64_t rows, int64_t in) {
    int64_t stride = incs->inner_stride, groups = (rows + ROWS - 1) / ROWS;
    float *inner = incs->inner;
    for (int64_t j = 0; j < incs->num_projections; inner += incs->pairs[j++].rank) {
        const pair_t *pair = &incs->pairs[j];
        float scale = (float)pair->scale;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < (pair->rank + RANKS - 1) / RANKS * groups; i++) {
            int64_t r = i / groups * RANKS, t = i % groups * ROWS;
            const float *a = pair->a + r * in;
            if (r + RANKS <= pair->rank && t + ROWS <= rows) {
                shrink_block(x + t * in, in, a, scale, inner + t * stride + r, stride, ROWS, RANKS);
                continue;
            }
            int64_t end = t + ROWS < rows ? t + ROWS : rows;
            for (; t < end; t++) {
                pair_t part = {a, NULL, pair->rank - r < RANKS ? pair->rank - r : RANKS, scale};
                shrink(x + t * in, in, &part, inner + t * stride + r, stride, 1);
            }
        }
    }
#pragma omp barrier
}

void expand_rows(const increments_t *incs, int64_t row, int64_t rows, int64_t column, int64_t width,
                 float *y, int64_t y_stride) {
#define ROWS_CASE(n)                                                                               \
    case n:                                                                                        \
        expand_columns(incs->pairs, incs->outs, incs->inner + row * incs->inner_stride,            \
                       incs->inner_stride, column, width, y, y_stride, n);                         \
        break;
    switch (rows) {
        ROWS_CASE(1)
        ROWS_CASE(2)
        ROWS_CASE(3)
        ROWS_CASE(4)
        ROWS_CASE(5)
        ROWS_CASE(6)
#if TILE_ROWS > 6
        ROWS_CASE(7)
        ROWS_CASE(8)
#endif
    }
#undef ROWS_CASE
}

/* Add the base's increments to y[rows, out], after the product. */
void add_increments(const increments_t *incs, const float *x, float *y, int64_t rows, int64_t in,
                    int64_t out, int num_threads) {
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
#pragma omp parallel num_threads(num_threads)
    {
        shrink_all(incs, x, rows, in);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (out + TILE_WIDTH - 1) / TILE_WIDTH * tiles; i++) {
            int64_t column = i / tiles * TILE_WIDTH, row = i % tiles * TILE_ROWS;
            int64_t width = out - column, count = rows - row;
            expand_rows(incs, row, count < TILE_ROWS ? count : TILE_ROWS, column,
                        width < TILE_WIDTH ? width : TILE_WIDTH, y + row * out + column, out);
        }
    }
}

int64_t next_lone_row(const low_rank_t *adds, int64_t row, int64_t rows, int64_t *number) {
    for (; row < rows; row++) {
        int64_t tile = row / TILE_ROWS * TILE_ROWS, left = rows - tile;
        if (adds->segment_of[row] < 0) continue;
        if (fills_tile(adds, tile, left < TILE_ROWS ? left : TILE_ROWS)) {
            row = tile + TILE_ROWS - 1;
            continue;
        }
        if ((*number)++ % omp_get_num_threads() == omp_get_thread_num()) break;
    }
    return row;
}

/* y += scale * (x a^T) b for one row; `ranks` is a constant where this is inlined. */
INLINE void add_row(const float *restrict x, float *restrict y, const float *restrict a,
                    const float *restrict b, float scale, int64_t in, int64_t out,
                    const int ranks) {
    float inner[RANKS];
    shrink_block(x, in, a, scale, inner, RANKS, 1, ranks);
    for (int64_t o = 0; o < out; o++) {
        float sum = y[o];
#pragma GCC unroll 4
        for (int r = 0; r < ranks; r++) sum += inner[r] * b[r * out + o];
        y[o] = sum;
    }
}

void add_lone_row(const low_rank_t *adds, int64_t row, const float *x, float *y, int64_t in) {
    const pair_t *pair = adds->segments[adds->segment_of[row]].pairs + adds->first;
    for (int64_t j = 0; j < adds->num_projections; y += adds->outs[j++], pair++) {
        int64_t r = 0, out = adds->outs[j];
        float scale = (float)pair->scale;
        for (; r + RANKS <= pair->rank; r += RANKS)
            add_row(x, y, pair->a + r * in, pair->b + r * out, scale, in, out, RANKS);
        for (; r < pair->rank; r++)
            add_row(x, y, pair->a + r * in, pair->b + r * out, scale, in, out, 1);
    }
}

int64_t begin_coming(coming_t *coming, const low_rank_t *adds, int64_t rows, int64_t in) {
    int64_t floats = 0, number = 0, row = -1;
    while ((row = next_lone_row(adds, row + 1, rows, &number)) < rows) {
        const pair_t *pair = adds->segments[adds->segment_of[row]].pairs + adds->first;
        for (int64_t j = 0; j < adds->num_projections; j++)
            floats += pair[j].rank * (in + adds->outs[j]);
    }
    *coming = (coming_t){.adds = adds, .rows = rows, .in = in, .row = -1};
    coming->piece = 2 * adds->num_projections;
    return floats;
}

/* Pieces are the a of all projections, then their b; what lies together is one run. */
static int next_run(coming_t *coming) {
    const low_rank_t *adds = coming->adds;
    int64_t n = adds->num_projections;
    for (coming->at = coming->end = NULL;;) {
        if (coming->piece == 2 * n) {
            if (coming->at) return 1;
            coming->row = next_lone_row(adds, coming->row + 1, coming->rows, &coming->index);
            if (coming->row >= coming->rows) return 0;
            coming->piece = 0;
        }
        const pair_t *pair = adds->segments[adds->segment_of[coming->row]].pairs + adds->first;
        int64_t j = coming->piece % n, is_b = coming->piece >= n;
        const float *from = is_b ? pair[j].b : pair[j].a;
        int64_t floats = pair[j].rank * (is_b ? adds->outs[j] : coming->in);
        if (coming->at && floats && from != coming->end) return 1;
        if (floats) {
            if (!coming->at) coming->at = from;
            coming->end = from + floats;
        }
        coming->piece++;
    }
}

int64_t next_coming(coming_t *coming, int64_t floats, const float **from) {
    if (coming->at == coming->end && !next_run(coming)) return 0;
    int64_t left = coming->end - coming->at;
    *from = coming->at;
    if (floats > left) floats = left;
    coming->at += floats;
    return floats;
}

/* Add everything to y[rows, out], after the product. */
void add_low_rank(const low_rank_t *adds, const float *x, float *y, int64_t rows, int64_t in,
                  int64_t out, int num_threads) {
    int64_t count = (out + TILE_WIDTH - 1) / TILE_WIDTH, tiles = rows / TILE_ROWS;
#pragma omp parallel num_threads(num_threads)
    {
        shrink_tiles(adds, x, rows, in);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count * tiles; i++) {
            int64_t column = i / tiles * TILE_WIDTH, row = i % tiles * TILE_ROWS;
            int64_t left = out - column;
            if (fills_tile(adds, row, TILE_ROWS))
                expand_tile(adds, row, column, left < TILE_WIDTH ? left : TILE_WIDTH,
                            y + row * out + column, out);
        }
        int64_t number = 0, row = -1;
        while ((row = next_lone_row(adds, row + 1, rows, &number)) < rows)
            add_lone_row(adds, row, x + row * in, y + row * out, in);
    }
}
