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

typedef uint32_t words_t __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef int32_t ints_t __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

#define TILE_WIDTH (COLS * WIDE)
#define TILE_STEP 8 /* features between two lots of fetching ahead */
#define STREAM_ROWS 4 /* so few rows wait for memory alone */
#define FEATURES_AHEAD (1152 / TILE_WIDTH) /* before its use a panel is fetched that is passed once */

/* What to fetch meanwhile into the second cache: from where, and how many cache lines in a lot. */
typedef struct {
    const float *at;
    int64_t lines;
} ahead_t;

/* GCC loads weights again for each row of a tile of 3 or 4 rows by 2 registers, which then waits for
 * loads: 5.8 cycles a feature instead of 3.9 (Zen 4). */
#if defined(__AVX2__) && !defined(__AVX512F__)
#define LOADED_ONCE(weights) __asm__("" : "+x"(weights))
#else
#define LOADED_ONCE(weights)
#endif

/* As it is: nothing before it is computed together with what comes after it, in another order. */
#ifdef __AVX2__
#define KEPT(numbers) __asm__("" : "+x"(numbers))
#else
#define KEPT(numbers) __asm__("" : "+m"(numbers))
#endif

#define NOTHING ((ahead_t){NULL, 0})

enum { NOT, ONCE, AGAIN }; /* whether a panel streams, and is then used by the next layer too */

INLINE void fetch_lot(ahead_t *ahead) {
    for (int64_t line = 0; line < ahead->lines; line++, ahead->at += LINE)
        __builtin_prefetch(ahead->at, 0, 2);
}

/* A low-rank product for a tile's rows: inner [rows, ranks] times b [ranks, out], which begin at the
 * tile's first row and column. */
typedef struct {
    const float *inner, *b;
    int64_t inner_stride, out, ranks;
} tail_t;

/* Where a tile goes: y [rows, cols], and what is added to it in registers. Only tiles of TILE_WIDTH
 * columns have tails. (One address while a tile is multiplied: general registers are few.) */
typedef struct {
    float *y;
    int64_t y_stride, cols, num_tails;
    tail_t tails[2];
} target_t;

INLINE void add_tail(wide_t sums[TILE_ROWS][COLS], const tail_t *tail, const int rows) {
    const float *b = tail->b;
#pragma GCC unroll 1
    for (int64_t i = 0; i < tail->ranks; i++, b += tail->out)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++)
                sums[r][c] += tail->inner[r * tail->inner_stride + i] *
                              *(const wide_t *)(b + c * WIDE);
}

/* The end of a tile; `rows` is a constant where this is inlined. */
INLINE void finish_tile(wide_t sums[TILE_ROWS][COLS], const target_t *to, const int rows) {
    for (int64_t i = 0; i < to->num_tails; i++) add_tail(sums, &to->tails[i], rows);
    float *y = to->y;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++, y += to->y_stride)
        if (to->cols >= TILE_WIDTH)
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++) *(wide_t *)(y + c * WIDE) = sums[r][c];
        else
            memcpy(y, sums[r], to->cols * sizeof(float));
}

/* `to` = x[rows, in] times one panel; `rows` and `streams` are constants where this is inlined.
 * Meanwhile, for every TILE_STEP features, some cache lines are fetched. One that streams fetches what
 * comes next of the panel too, feature by feature; it keeps none of it unless the next layer has use
 * for it. */
INLINE void multiply_tile(const float *restrict x, int64_t x_stride, const float *restrict panel,
                          int64_t in, const int rows, const target_t *to, ahead_t panels,
                          ahead_t others, const int streams) {
    wide_t sums[TILE_ROWS][COLS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) sums[r][c] = (wide_t){0.0f};
    /* Addresses of every third row, kept apart by the asm: one for each row, or offsets instead of
     * addresses, are more than the general registers hold, and compilers then keep some in vector
     * registers, from where they come back behind the multiplications that wait (2 to 4 %). */
    const float *x_of[] = {x, x + 3 * x_stride, x + 6 * x_stride};
    __asm__("" : "+r"(x_of[1]), "+r"(x_of[2]));
    const float *end = x + in;
    const int64_t step = panels.lines + others.lines ? TILE_STEP : in;
    while (x_of[0] < end) {
        const float *lot_end = end - x_of[0] > step ? x_of[0] + step : end;
        fetch_lot(&panels);
        fetch_lot(&others);
#pragma GCC unroll 1 /* unrolled, sums would be reordered and leave the registers */
        for (; x_of[0] < lot_end; x_of[0]++, x_of[1]++, x_of[2]++, panel += TILE_WIDTH) {
            if (streams)
                for (int line = 0; line < TILE_WIDTH; line += LINE) {
                    const float *ahead = panel + FEATURES_AHEAD * TILE_WIDTH + line;
                    if (streams == ONCE) __builtin_prefetch(ahead, 0, 0);
                    else __builtin_prefetch(ahead, 0, 3);
                }
            wide_t w[COLS];
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++) {
                w[c] = *(const wide_t *)(panel + c * WIDE);
                LOADED_ONCE(w[c]);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
                for (int c = 0; c < COLS; c++) sums[r][c] += x_of[r / 3][r % 3 * x_stride] * w[c];
        }
    }
    finish_tile(sums, to, rows);
}

/* `multiply_tile` for any number of rows from 1 to TILE_ROWS. */
INLINE void multiply_rows(const float *x, int64_t x_stride, const float *panel, int64_t in,
                          int64_t rows, const target_t *to, ahead_t panels, ahead_t others) {
#define TILE_CASE(n)                                                                         \
    case n:                                                                                  \
        multiply_tile(x, x_stride, panel, in, n, to, panels, others, NOT);                   \
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

/* `multiply_tile` for 1 to STREAM_ROWS rows when the panel is used once in this product. */
INLINE void stream_rows(const float *x, int64_t x_stride, const float *panel, int64_t in,
                        int64_t rows, const target_t *to, ahead_t others, const int streams) {
#define STREAM_CASE(n)                                                                       \
    case n:                                                                                  \
        multiply_tile(x, x_stride, panel, in, n, to, NOTHING, others, streams);              \
        break;
    switch (rows) {
        STREAM_CASE(1)
        STREAM_CASE(2)
        STREAM_CASE(3)
        STREAM_CASE(4)
    }
#undef STREAM_CASE
}
