/* Blocks of products with low-rank factors: rows times A, then that times B. Sums stay in registers. */
#pragma once

#include "kernels.h"
#include "tiles.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define RANKS 4 /* ranks that share one pass over what they read */
#define ROWS 2  /* rows likewise */
#define HALVES 2 /* of each sum, or four ranks of one row would wait for each other */

/* The sum of a register's numbers, in a tree. */
INLINE float sum_of(wide_t numbers) {
#ifdef __AVX2__
#if WIDE == 16
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)numbers),
                                 _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)numbers, 1)));
#else
    __m256 eight = (__m256)numbers;
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
    for (int left = WIDE / 2; left; left /= 2)
        for (int i = 0; i < left; i++) numbers[i] += numbers[i + left];
    return numbers[0];
#endif
}

/* inner[t, r] = scale * x[t] a[r], in the same order for any number of rows and ranks; these are
 * constants where this is inlined, and the sums of all stay in registers. */
INLINE void shrink_ranks(const float *restrict x, int64_t in, const float *restrict a, float scale,
                         float *restrict inner, int64_t inner_stride, const int rows,
                         const int ranks) {
    wide_t sums[HALVES][RANKS][ROWS] = {{{{0.0f}}}};
    int64_t i = 0;
    for (; i + HALVES * WIDE <= in; i += HALVES * WIDE)
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; h++)
#pragma GCC unroll 4
            for (int r = 0; r < ranks; r++)
#pragma GCC unroll 2
                for (int t = 0; t < rows; t++)
                    sums[h][r][t] += *(const wide_t *)(a + r * in + i + h * WIDE) *
                                     *(const wide_t *)(x + t * in + i + h * WIDE);
#pragma GCC unroll 4
    for (int r = 0; r < ranks; r++)
#pragma GCC unroll 2
        for (int t = 0; t < rows; t++) {
            float sum = sum_of(sums[0][r][t] + sums[1][r][t]);
            for (int64_t k = i; k < in; k++) sum += a[r * in + k] * x[t * in + k];
            inner[t * inner_stride + r] = scale * sum;
        }
}

/* `shrink_ranks` for RANKS or one, as many at a time as 16 registers have room for, or 32. */
INLINE void shrink_block(const float *restrict x, int64_t in, const float *restrict a, float scale,
                         float *restrict inner, int64_t inner_stride, const int rows,
                         const int ranks) {
    if (WIDE == 16 || rows == 1 || ranks == 1) {
        shrink_ranks(x, in, a, scale, inner, inner_stride, rows, ranks);
        return;
    }
    shrink_ranks(x, in, a, scale, inner, inner_stride, rows, RANKS / 2);
    shrink_ranks(x, in, a + RANKS / 2 * in, scale, inner + RANKS / 2, inner_stride, rows, RANKS / 2);
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
