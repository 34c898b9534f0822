/* What adapters add: products with their low-rank factors, read where the leases hold them. */
#include "common.h"

/* One module's factors: a is [rank, in], b is [rank, out]; rank 0 leaves the module alone. */
typedef struct {
    const float *a, *b;
    int64_t rank;
    double scale;
} pair_t;

/* Rows start..end-1 belong to the adapter whose pairs begin at `pairs`. */
typedef struct {
    int64_t start, end;
    const pair_t *pairs;
} rows_t;

#define BLOCK 4 /* rows, and ranks, that share one pass over what they read */

/* y[t] += scale * (x[t] a^T) b for `rows` rows and `ranks` ranks, both constants where this is
 * inlined: all sums stay in registers, x and a are read once, y is written once. */
static inline __attribute__((always_inline)) void
add_tile(const float *restrict x, int64_t x_stride, float *restrict y, int64_t y_stride,
         const float *restrict a, const float *restrict b, float scale, int64_t in, int64_t out,
         const int rows, const int ranks) {
    float weight[BLOCK][BLOCK] = {{0.0f}};
    for (int64_t i = 0; i < in; i++)
#pragma GCC unroll 4
        for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
            for (int t = 0; t < rows; t++) weight[r][t] += a[r * in + i] * x[t * x_stride + i];
#pragma GCC unroll 4
    for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++) weight[r][t] *= scale;
    for (int64_t o = 0; o < out; o++)
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++) {
            float sum = y[t * y_stride + o];
#pragma GCC unroll 4
            for (int r = 0; r < ranks; r++) sum += weight[r][t] * b[r * out + o];
            y[t * y_stride + o] = sum;
        }
}

/* Ask for the next factors while the present ones are used: each adapter's are read once a step. */
static void prefetch(const pair_t *pair, int64_t in, int64_t out) {
    for (int64_t i = 0; i < pair->rank * in; i += VEC) __builtin_prefetch(pair->a + i, 0, 2);
    for (int64_t i = 0; i < pair->rank * out; i += VEC) __builtin_prefetch(pair->b + i, 0, 2);
}

static void add_block(const float *x, int64_t x_stride, float *y, int64_t y_stride, int64_t rows,
                      const pair_t *pair, int64_t in, int64_t out) {
    float scale = (float)pair->scale;
    int64_t r = 0;
    for (; r + BLOCK <= pair->rank; r += BLOCK) {
        const float *a = pair->a + r * in, *b = pair->b + r * out;
        if (rows == BLOCK)
            add_tile(x, x_stride, y, y_stride, a, b, scale, in, out, BLOCK, BLOCK);
        else
            for (int64_t t = 0; t < rows; t++)
                add_tile(x + t * x_stride, x_stride, y + t * y_stride, y_stride, a, b, scale, in,
                         out, 1, BLOCK);
    }
    for (; r < pair->rank; r++)
        for (int64_t t = 0; t < rows; t++)
            add_tile(x + t * x_stride, x_stride, y + t * y_stride, y_stride, pair->a + r * in,
                     pair->b + r * out, scale, in, out, 1, 1);
}

/* y[t, offset of j :] += scale * (x[t] a_j^T) b_j for each projection j of the rows' adapter.
 * `first` is the index of the first projection's pair in each adapter's table. */
void add_low_rank(const float *x, int64_t x_stride, float *y, int64_t y_stride,
                  const rows_t *segments, int64_t num_segments, int64_t first,
                  int64_t num_projections, const int64_t *outs, int64_t in, int num_threads) {
    int64_t num_blocks = 0, floats = 0;
    for (int64_t s = 0; s < num_segments; s++) {
        int64_t rows = segments[s].end - segments[s].start;
        num_blocks += (rows + BLOCK - 1) / BLOCK;
        for (int64_t j = 0; j < num_projections; j++)
            floats += rows * segments[s].pairs[first + j].rank * (in + outs[j]);
    }
#pragma omp parallel for schedule(static) num_threads(threads_for(floats, num_threads))
    for (int64_t block = 0; block < num_blocks; block++) {
        int64_t s = 0, left = block;
        for (;; s++) {
            int64_t blocks = (segments[s].end - segments[s].start + BLOCK - 1) / BLOCK;
            if (left < blocks) break;
            left -= blocks;
        }
        int64_t start = segments[s].start + left * BLOCK;
        int64_t rows = segments[s].end - start < BLOCK ? segments[s].end - start : BLOCK;
        int64_t offset = 0;
        int ends = start + rows == segments[s].end && s + 1 < num_segments;
        for (int64_t j = 0; j < num_projections; j++) {
            if (j + 1 < num_projections)
                prefetch(&segments[s].pairs[first + j + 1], in, outs[j + 1]);
            else if (ends)
                prefetch(&segments[s + 1].pairs[first], in, outs[0]);
            add_block(x + start * x_stride, x_stride, y + start * y_stride + offset, y_stride,
                      rows, &segments[s].pairs[first + j], in, outs[j]);
            offset += outs[j];
        }
    }
}
