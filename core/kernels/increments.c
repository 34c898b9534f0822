/* What the base itself adds to its products, for every row: a factored vertical base's increments. */
#include "low_rank.h"
#include "low_rank_blocks.h"

int add_all_rows(const increments_t *incs, int64_t row, int64_t column, target_t *to) {
    return add_pair(incs->pairs, incs->outs, incs->inner + row * incs->inner_stride,
                    incs->inner_stride, column, to);
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
