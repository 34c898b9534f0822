/* Products with a frozen matrix that was packed in panels once. */
#include "common.h"
#include "low_rank.h"
#include "tiles.h"

#include <omp.h>

#define FEATURES_AHEAD 24 /* how far before its use a panel is fetched when it is passed once */
#define NEAR_PASSES 2     /* with more, the next panel is fetched into the nearest cache */
#define FACTOR_LINES 4    /* cache lines of factors in a lot */

/* Outputs of a panel. */
int64_t panel_width(void) { return TILE_WIDTH; }

/* w is [out, in]; panels is [ceil(out / width), in, width], zeros beyond `out`. */
void pack_panels(const float *w, float *panels, int64_t in, int64_t out, int num_threads) {
    int64_t count = (out + TILE_WIDTH - 1) / TILE_WIDTH;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < TILE_WIDTH; c++) {
            int64_t o = i * TILE_WIDTH + c;
            float *to = panels + i * TILE_WIDTH * in + c;
            for (int64_t k = 0; k < in; k++) to[k * TILE_WIDTH] = o < out ? w[o * in + k] : 0.0f;
        }
}

static int any_fills_tile(const low_rank_t *adds, int64_t rows) {
    for (int64_t r = 0; r + TILE_ROWS <= rows; r += TILE_ROWS)
        if (fills_tile(adds, r, TILE_ROWS)) return 1;
    return 0;
}

/* A panel is read from memory once and then used from the cache for all rows. With one pass over it
 * its own next features are fetched ahead; with several, each pass fetches its share of the next
 * panel, so that memory is read all the time and not only in first passes. What adapters add to a
 * tile goes there while it is in the cache; the last passes fetch the factors of lone rows. */
void multiply_panels(const matrix_t *w, const float *x, float *y, int64_t rows,
                     const low_rank_t *adds, int num_threads) {
    int64_t in = w->in, out = w->out, count = (out + TILE_WIDTH - 1) / TILE_WIDTH;
    int64_t passes = (rows + TILE_ROWS - 1) / TILE_ROWS, lots = (in + TILE_STEP - 1) / TILE_STEP;
    int64_t distance = TILE_WIDTH * (passes > 1 ? in : FEATURES_AHEAD);
    int64_t lines = passes ? (TILE_STEP * TILE_WIDTH / LINE + passes - 1) / passes : 0;
    int64_t room = lots * FACTOR_LINES * LINE; /* floats of factors that a pass can fetch */
#pragma omp parallel num_threads(num_threads)
    {
        coming_t coming;
        int64_t threads = omp_get_num_threads(), passes_left = (count + threads - 1) / threads * passes;
        int64_t floats_left = adds ? begin_coming(&coming, adds, rows, in) : 0;
        if (adds && any_fills_tile(adds, rows)) shrink_tiles(adds, x, rows, in);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count; i++) {
            const float *panel = (const float *)w->panels + i * TILE_WIDTH * in;
            const float *next = panel + distance, *end = next + TILE_WIDTH * in;
            int64_t column = i * TILE_WIDTH, left = out - column;
            for (int64_t r = 0; r < rows; r += TILE_ROWS, next += lots * lines * LINE) {
                int64_t tile = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
                float *to = y + r * out + column;
                ahead_t panels = {next, next < end ? lines : 0, passes > NEAR_PASSES};
                ahead_t factors = NOTHING;
                if (floats_left && passes_left-- * room < floats_left + 2 * room) {
                    int64_t floats = next_coming(&coming, room, &factors.at);
                    factors.lines = (floats + lots * LINE - 1) / (lots * LINE);
                    floats_left -= floats;
                }
                multiply_rows(x + r * in, in, panel, to, out, in, tile, left, panels, factors);
                if (adds && fills_tile(adds, r, tile))
                    expand_tile(adds, r, column, left < TILE_WIDTH ? left : TILE_WIDTH, to, out);
            }
        }
        if (adds) {
#pragma omp barrier
            add_lone_rows(adds, x, y, rows, in, out);
        }
    }
}
