/* Products with a panel whose weights take fewer bits than 32 and mean the very same: they are
 * widened to fp32 in registers, so the sums are those of a panel of fp32, bit for bit. */
#pragma once

#include "panel_forms.h"

#define WORDS_AHEAD 24 /* rows of words that a panel is fetched before its use */

/* 16 registers have no room for widening beside the sums of a whole tile: a panel is widened with what
 * is left over from tiles, FUSED_ROWS at most, or before them. 32 have it. */
#define WIDENS_APART (TILE_ROWS <= 6)
#define FUSED_ROWS (WIDENS_APART ? 4 : TILE_ROWS)

/* Whether so many rows are multiplied with a panel that was widened. */
INLINE int widens(int64_t form, int64_t rows) {
    return form != FP32 && rows > (!WIDENS_APART ? TILE_ROWS : bits_of(form) < 16 ? 4 : 5);
}

/* The weights in the lowest bits of each word. Words are shifted on by a constant, weight by
 * weight: a count in a general register costs a tenth of a product. */
INLINE wide_t widen(words_t word, const int form, wide_t step, wide_t base) {
    if (form == BF16) return (wide_t)(word << 16);
    ints_t number = (ints_t)(word & (form == GRID_8 ? 0xff : 0xf));
    return __builtin_convertvector(number, wide_t) * step + base;
}

/* `to` = x[rows, in] times one panel; `rows` and `form` are constants where this is
 * inlined. Where `widened` is given, it gets the panel in fp32, [in, TILE_WIDTH]. Meanwhile the
 * panel itself is fetched ahead, and for every BLOCK features some cache lines of others. */
INLINE void multiply_packed_tile(const float *restrict x, int64_t x_stride,
                                 const uint32_t *restrict panel, int64_t in, const int rows,
                                 const target_t *to, const int form, float *restrict widened,
                                 ahead_t panels, ahead_t others) {
    wide_t sums[TILE_ROWS][COLS], step[COLS], base[COLS];
    const int bits = bits_of(form);
    int in_word = 32 / bits;
    __asm__("" : "+r"(in_word)); /* not to be unrolled where it is 2 */
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) sums[r][c] = (wide_t){0.0f};
    const float *x_of[] = {x, x + 3 * x_stride, x + 6 * x_stride}; /* as in multiply_tile */
    __asm__("" : "+r"(x_of[1]), "+r"(x_of[2]));
    for (const float *end = x + in; x_of[0] < end;) {
        fetch_lot(&panels);
        fetch_lot(&others);
        if (bits < 16) {
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++) {
                step[c] = wide_of_halves((const uint16_t *)panel + c * WIDE);
                base[c] = wide_of_halves((const uint16_t *)panel + TILE_WIDTH + c * WIDE);
            }
            panel += TILE_WIDTH;
        }
#pragma GCC unroll 1
        for (int word = 0; word < bits; word++, panel += TILE_WIDTH) {
#pragma GCC unroll 3
            for (int line = 0; line < TILE_WIDTH; line += LINE)
                __builtin_prefetch(panel + WORDS_AHEAD * TILE_WIDTH + line, 0, 3);
            words_t words[COLS];
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++) words[c] = *(const words_t *)(panel + c * WIDE);
#pragma GCC unroll 1 /* as in multiply_tile */
            for (int i = 0; i < in_word; i++, x_of[0]++, x_of[1]++, x_of[2]++) {
                wide_t w[COLS];
#pragma GCC unroll 3
                for (int c = 0; c < COLS; c++) {
                    w[c] = form == FP16
                               ? wide_of_halves((const uint16_t *)panel + i * TILE_WIDTH + c * WIDE)
                               : widen(words[c], form, step[c], base[c]);
                    words[c] >>= bits;
                    if (widened) *(wide_t *)(widened + c * WIDE) = w[c];
                }
                if (widened) widened += TILE_WIDTH;
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
                    for (int c = 0; c < COLS; c++)
                        sums[r][c] += x_of[r / 3][r % 3 * x_stride] * w[c];
            }
        }
    }
    finish_tile(sums, to, rows);
}

/* `widened` = a panel in fp32, [in, TILE_WIDTH]; `form` is a constant where this is inlined. Meanwhile
 * the panel is fetched ahead. */
INLINE void widen_form(const uint32_t *restrict panel, int64_t in, const int form,
                       float *restrict widened) {
    wide_t step[COLS], base[COLS];
    const int bits = bits_of(form);
    for (const float *end = widened + in * TILE_WIDTH; widened < end;) {
        if (bits < 16) {
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++) {
                step[c] = wide_of_halves((const uint16_t *)panel + c * WIDE);
                base[c] = wide_of_halves((const uint16_t *)panel + TILE_WIDTH + c * WIDE);
            }
            panel += TILE_WIDTH;
        }
#pragma GCC unroll 1
        for (int word = 0; word < bits; word++, panel += TILE_WIDTH) {
#pragma GCC unroll 3
            for (int line = 0; line < TILE_WIDTH; line += LINE)
                __builtin_prefetch(panel + WORDS_AHEAD * TILE_WIDTH + line, 0, 3);
            words_t words[COLS];
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++) words[c] = *(const words_t *)(panel + c * WIDE);
#pragma GCC unroll 8
            for (int i = 0; i < 32 / bits; i++, widened += TILE_WIDTH)
#pragma GCC unroll 3
                for (int c = 0; c < COLS; c++) {
                    *(wide_t *)(widened + c * WIDE) =
                        form == FP16
                            ? wide_of_halves((const uint16_t *)panel + i * TILE_WIDTH + c * WIDE)
                            : widen(words[c], form, step[c], base[c]);
                    words[c] >>= bits;
                }
        }
    }
}

static void widen_panel(const uint32_t *panel, int64_t in, int64_t form, float *widened) {
#define WIDEN_CASE(n)                        \
    case n:                                  \
        widen_form(panel, in, n, widened);   \
        break;
    switch (form) {
        WIDEN_CASE(FP16)
        WIDEN_CASE(BF16)
        WIDEN_CASE(GRID_8)
        WIDEN_CASE(GRID_4)
    }
#undef WIDEN_CASE
}

INLINE void multiply_packed_form(const float *x, int64_t x_stride, const uint32_t *panel, int64_t in,
                                 int64_t rows, const target_t *to, const int form, float *widened,
                                 ahead_t panels, ahead_t others) {
#define PACKED_CASE(n, to_keep)                                                                    \
    case n:                                                                                        \
        multiply_packed_tile(x, x_stride, panel, in, n, to, form, to_keep, panels, others);        \
        break;
    if (widened) switch (rows) {
#if TILE_ROWS > 6
        PACKED_CASE(TILE_ROWS, widened)
#else
        PACKED_CASE(1, widened)
        PACKED_CASE(2, widened)
        PACKED_CASE(3, widened)
        PACKED_CASE(4, widened)
#endif
    }
    else switch (rows) {
        PACKED_CASE(1, NULL)
        PACKED_CASE(2, NULL)
        PACKED_CASE(3, NULL)
        PACKED_CASE(4, NULL)
        PACKED_CASE(5, NULL)
        PACKED_CASE(6, NULL)
#if TILE_ROWS > 6
        PACKED_CASE(7, NULL)
        PACKED_CASE(8, NULL)
#endif
    }
#undef PACKED_CASE
}

/* `multiply_packed_tile` for 1 to TILE_ROWS rows; where `widened` is given, for 1 to FUSED_ROWS, or, with
 * 32 registers, for TILE_ROWS alone. */
static void multiply_packed(const float *x, int64_t x_stride, const uint32_t *panel, int64_t in,
                            int64_t rows, const target_t *to, int64_t form, float *widened,
                            ahead_t panels, ahead_t others) {
#define FORM_CASE(n)                                                                               \
    case n:                                                                                        \
        multiply_packed_form(x, x_stride, panel, in, rows, to, n, widened, panels, others);        \
        break;
    switch (form) {
        FORM_CASE(FP16)
        FORM_CASE(BF16)
        FORM_CASE(GRID_8)
        FORM_CASE(GRID_4)
    }
#undef FORM_CASE
}
