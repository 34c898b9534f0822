/* Products of a few rows with a panel: a strip of a matrix, TILE_WIDTH outputs wide, [in, width].
 * All sums stay in registers.
 */
#pragma once

#include "common.h"

#if defined(__AVX512F__)
typedef float wide_t __attribute__((vector_size(64), aligned(4), may_alias));
#define WIDE 16     /* floats of a register */
#define COLS 3      /* registers of outputs: 8 rows by 3 are 24 sums in 32 registers */
#define TILE_ROWS 8
#else               /* AVX2 with FMA; correct anywhere */
typedef float wide_t __attribute__((vector_size(32), aligned(4), may_alias));
#define WIDE 8
#define COLS 2      /* 6 rows by 2 are 12 sums in 16 registers */
#define TILE_ROWS 6
#endif

#define TILE_WIDTH (COLS * WIDE)
#define TILE_STEP 8 /* features between two lots of fetching ahead */

/* What to fetch meanwhile: from where, how many cache lines in a lot, and whether into the nearest
 * cache or the next. */
typedef struct {
    const float *at;
    int64_t lines;
    int is_near;
} ahead_t;

#define NOTHING ((ahead_t){NULL, 0, 0})

INLINE void fetch_lot(ahead_t *ahead) {
    if (ahead->is_near)
        for (int64_t line = 0; line < ahead->lines; line++, ahead->at += LINE)
            __builtin_prefetch(ahead->at, 0, 3);
    else
        for (int64_t line = 0; line < ahead->lines; line++, ahead->at += LINE)
            __builtin_prefetch(ahead->at, 0, 2);
}

/* y[rows, cols] = x[rows, in] times one panel; `rows` is a constant where this is inlined.
 * Meanwhile, for every TILE_STEP features, some cache lines are fetched. */
INLINE void multiply_tile(const float *restrict x, int64_t x_stride, const float *restrict panel,
                          float *restrict y, int64_t y_stride, int64_t in, const int rows,
                          int64_t cols, ahead_t panels, ahead_t others) {
    wide_t sums[TILE_ROWS][COLS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) sums[r][c] = (wide_t){0.0f};
    const int64_t step = panels.lines + others.lines ? TILE_STEP : in;
    for (int64_t start = 0; start < in; start += step) {
        int64_t end = start + step < in ? start + step : in;
        fetch_lot(&panels);
        fetch_lot(&others);
#pragma GCC unroll 1 /* unrolled, sums would be reordered and leave the registers */
        for (int64_t k = start; k < end; k++)
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
                for (int c = 0; c < COLS; c++)
                    sums[r][c] +=
                        x[r * x_stride + k] * *(const wide_t *)(panel + k * TILE_WIDTH + c * WIDE);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        if (cols >= TILE_WIDTH)
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++) *(wide_t *)(y + r * y_stride + c * WIDE) = sums[r][c];
        else
            memcpy(y + r * y_stride, sums[r], cols * sizeof(float));
}

/* `multiply_tile` for any number of rows from 1 to TILE_ROWS. */
INLINE void multiply_rows(const float *x, int64_t x_stride, const float *panel, float *y,
                          int64_t y_stride, int64_t in, int64_t rows, int64_t cols,
                          ahead_t panels, ahead_t others) {
#define TILE_CASE(n)                                                                         \
    case n:                                                                                  \
        multiply_tile(x, x_stride, panel, y, y_stride, in, n, cols, panels, others);         \
        break;
    switch (rows) {
        TILE_CASE(1)
        TILE_CASE(2)
        TILE_CASE(3)
        TILE_CASE(4)
        TILE_CASE(5)
        TILE_CASE(6)
#if TILE_ROWS > 6
        TILE_CASE(7)
        TILE_CASE(8)
#endif
    }
#undef TILE_CASE
}
