/* Blocks of products with low-rank factors: rows times A, then that times B. Sums stay in registers. */
#pragma once

#include "kernels.h"
#include "tiles.h"

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

/* Let a tile have a pair's product where its columns are all of one projection; else returns 1. */
static inline int add_pair(const pair_t *pair, const int64_t *outs, const float *inner,
                    int64_t inner_stride, int64_t column, target_t *to) {
    for (; column >= *outs; inner += pair++->rank) column -= *outs++;
    if (column + TILE_WIDTH > *outs) return 1;
    to->tails[to->num_tails++] =
        (tail_t){inner, pair->b + column, inner_stride, *outs, pair->rank};
    return 0;
}
