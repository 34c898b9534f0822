/* Products with a frozen matrix that was packed in panels once. */
#include "common.h"
#include "tiles.h"

#define FEATURES_AHEAD 24 /* how far before its use a panel is fetched when it is passed once */

/* Outputs of a panel; 0 where this processor has no registers for it and nobody should pack. */
int64_t panel_width(void) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
    return TILE_WIDTH;
#else
    return 0;
#endif
}

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

/* y[rows, out] = x[rows, in] w^T, w as `pack_panels` left it.
 *
 * A panel is read from memory once and then used from the cache for all rows. With one pass over it
 * its own next features are fetched ahead; with several, each pass fetches its share of the next
 * panel, so that memory is read all the time and not only in first passes. */
void multiply_panels(const float *x, const float *panels, float *y, int64_t rows, int64_t in,
                     int64_t out, int num_threads) {
    int64_t count = (out + TILE_WIDTH - 1) / TILE_WIDTH;
    int64_t passes = (rows + TILE_ROWS - 1) / TILE_ROWS;
    int64_t distance = TILE_WIDTH * (passes > 1 ? in : FEATURES_AHEAD);
    int64_t lines = passes ? (TILE_STEP * TILE_WIDTH / LINE + passes - 1) / passes : 0;
    int64_t lines_of_pass = (in + TILE_STEP - 1) / TILE_STEP * lines;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t i = 0; i < count; i++) {
        const float *panel = panels + i * TILE_WIDTH * in, *ahead = panel + distance;
        float *to = y + i * TILE_WIDTH;
        const float *end = ahead + TILE_WIDTH * in;
        for (int64_t r = 0; r < rows; r += TILE_ROWS, ahead += lines_of_pass * LINE)
            multiply_rows(x + r * in, in, panel, to + r * out, out, in,
                          rows - r < TILE_ROWS ? rows - r : TILE_ROWS, out - i * TILE_WIDTH, ahead,
                          ahead < end ? lines : 0);
    }
}
