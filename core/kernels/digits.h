/* Products with a panel on a grid of 4 bits as sums of whole numbers.
 *
 * Each block of a row becomes whole numbers up to 2^22, and these three digits to the base 256. One
 * instruction multiplies four digits of a row with the numbers of four weights, where fp32
 * multiplies one feature, so three digits take three quarters of the time; what a block sums to is
 * exact. A feature loses at most 2^-22 of its block's largest, about what fp32 loses in each sum that
 * the largest is part of. Each row is split and summed alone and in one order, whatever its batch.
 */
#pragma once

#include "panel_forms.h"

#define DIGITS 3
#define QUAD 4               /* features that one instruction sums */
#define DIGIT_ROWS 4         /* whose sums, by COLS, fill the registers: fp32's and a block's */
#define STREAM_DIGIT_ROWS 2  /* whose sums of each digit do */
#define DIGITS_AHEAD 96      /* rows of words that a panel is fetched before its use */
#define DIGIT_BITS 22        /* 15 * BLOCK such numbers fit 32 bits */
#define LEAST_EXPONENT (-100) /* smaller blocks lose digits, so that fp32 can say all scales */
/* Of an unpacked block: steps and bases in fp32, then numbers in bytes. */
#define UNPACKED_WORDS ((2 + BLOCK / QUAD) * TILE_WIDTH)

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__F16C__)
#define HAS_DIGITS 1
#else
#define HAS_DIGITS 0
#endif

/* Rows in digits: [rows][blocks][DIGITS][BLOCK], the highest digit first; of 8 features those with
 * even places come first, as they come out of a word of weights. `scale` is what a whole number
 * stands for, `sum` all features of the block, both [rows][blocks]. */
typedef struct {
    int8_t *digits;
    float *scale, *sum;
    int64_t blocks;
} digits_t;

/* Floats of room for so many rows. */
INLINE int64_t floats_of_digits(int64_t rows, int64_t in) {
    int64_t floats = rows * (in / BLOCK) * (DIGITS * BLOCK / (int64_t)sizeof(float) + 2);
    return (floats + LINE - 1) / LINE * LINE;
}

INLINE digits_t digits_in(float *room, int64_t rows, int64_t in) {
    int64_t blocks = in / BLOCK;
    digits_t d = {(int8_t *)room, .blocks = blocks};
    d.scale = room + rows * blocks * (DIGITS * BLOCK / (int64_t)sizeof(float));
    d.sum = d.scale + rows * blocks;
    return d;
}

#if HAS_DIGITS
/* What is not finite makes the block's scale NaN, and so the row's products. */
INLINE void split_row(const float *restrict x, int64_t row, const digits_t *to) {
    const __m512i no_sign = _mm512_set1_epi32(0x7fffffff), offset = _mm512_set1_epi32(0x808080);
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const __m128i flip = _mm_set1_epi8((char)0x80);
    for (int64_t block = 0; block < to->blocks; block++, x += BLOCK) {
        int64_t place = row * to->blocks + block;
        __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + BLOCK / 2);
        __m512i bits = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(low), no_sign),
                                        _mm512_and_si512(_mm512_castps_si512(high), no_sign));
        int32_t most = _mm512_reduce_max_epi32(bits); /* NaN has the largest bits */
        int32_t exponent = (most >> 23) - 126;        /* the largest is below 2^exponent */
        if (exponent < LEAST_EXPONENT) exponent = LEAST_EXPONENT;
        union { int32_t i; float f; } up, down;
        up.i = (DIGIT_BITS - exponent + 127) << 23;
        down.i = (exponent - DIGIT_BITS + 127) << 23;
        if (most >= 0x7f800000) up.f = 0.0f, down.f = NAN;
        __m512i numbers[2];
        numbers[0] = _mm512_cvtps_epi32(_mm512_mul_ps(low, _mm512_set1_ps(up.f)));
        numbers[1] = _mm512_cvtps_epi32(_mm512_mul_ps(high, _mm512_set1_ps(up.f)));
        int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(numbers[0], numbers[1]));
        int8_t *digits = to->digits + place * DIGITS * BLOCK;
        for (int half = 0; half < 2; half++, digits += BLOCK / 2) {
            __m512i shifted = _mm512_add_epi32(numbers[half], offset);
            for (int d = DIGITS - 1; d >= 0; d--, shifted = _mm512_srli_epi32(shifted, 8)) {
                __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(shifted), flip);
                _mm_storeu_si128((__m128i *)(digits + d * BLOCK), _mm_shuffle_epi8(bytes, order));
            }
        }
        to->scale[place] = down.f;
        to->sum[place] = (float)sum * down.f;
    }
}

/* What comes next of the panel, a row of words. */
INLINE void fetch_words(const uint32_t *words) {
#pragma GCC unroll 3
    for (int line = 0; line < TILE_WIDTH; line += LINE)
        __builtin_prefetch(words + DIGITS_AHEAD * TILE_WIDTH + line, 0, 2);
}

/* Register `c` of a row of words becomes those of two rows of quads. */
INLINE void unpack_columns(const uint32_t *restrict words, float *restrict to) {
    const words_t nibbles = (words_t){0} + 0x0f0f0f0f;
#pragma GCC unroll 4
    for (int word = 0; word < bits_of(GRID_4); word++, words += TILE_WIDTH, to += 2 * TILE_WIDTH) {
        words_t w = *(const words_t *)words;
        *(words_t *)to = w & nibbles;
        *(words_t *)(to + TILE_WIDTH) = w >> 4 & nibbles;
    }
}

/* Steps and bases. */
INLINE void unpack_grid(const uint32_t *restrict words, float *restrict to) {
#pragma GCC unroll 6
    for (int c = 0; c < 2 * COLS; c++)
        *(wide_t *)(to + c * WIDE) = wide_of_halves((const uint16_t *)words + c * WIDE);
}

/* What blocks add to sums, by intrinsics, which compilers leave in this order. */
INLINE wide_t add_dot(wide_t sum, __m512i dot, const float *scale, const float *features, __m512 step,
                      __m512 base) {
    __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(*features), base, (__m512)sum);
    __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(*scale));
    return (wide_t)_mm512_fmadd_ps(scaled, step, y);
}

INLINE __m512i spread_quad(const int8_t *digits) {
    int32_t quad;
    memcpy(&quad, digits, sizeof quad);
    return _mm512_set1_epi32(quad);
}

/* `to` = rows row..row+rows-1 times one panel; `rows` and `unpacks` are constants where this is
 * inlined. One that unpacks reads `words`, the panel, and unpacks a block while it multiplies with
 * the one before; others find all blocks unpacked. From one unpacked block it is `to_next` floats to
 * the next, then `to_after`, in turns: they go on, or to and fro. Meanwhile, for every block, some
 * cache lines are fetched. */
INLINE void multiply_digits_tile(const digits_t *x, int64_t row, const uint32_t *restrict words,
                                 float *unpacked, int64_t to_next, int64_t to_after, const int rows,
                                 const int unpacks, const target_t *to, ahead_t panels,
                                 ahead_t others) {
    _Static_assert(DIGITS == COLS, "with each digit one register of a row of words is unpacked");
    wide_t sums[TILE_ROWS][COLS];
    const int64_t blocks = x->blocks, row_bytes = blocks * DIGITS * BLOCK;
    const float *scale = x->scale + row * blocks, *sum = x->sum + row * blocks;
    const int8_t *digits = x->digits + row * row_bytes, *end = digits + row_bytes;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) sums[r][c] = (wide_t){0.0f};
    if (unpacks) {
        unpack_grid(words, unpacked);
        for (int c = 0; c < TILE_WIDTH; c += WIDE)
            unpack_columns(words + TILE_WIDTH + c, unpacked + 2 * TILE_WIDTH + c);
    }
    for (; digits < end; scale++, sum++) {
        __m512i dots[DIGIT_ROWS][COLS];
        const float *weights = unpacked + 2 * TILE_WIDTH;
        float *next = unpacked + (unpacks ? to_next : UNPACKED_WORDS);
        fetch_lot(&panels);
        fetch_lot(&others);
        if (unpacks) {
            if (digits + DIGITS * BLOCK < end) words += words_of_block(GRID_4) * TILE_WIDTH;
            unpack_grid(words, next);
        }
        const uint32_t *from = words + TILE_WIDTH;
        float *unpack_to = next + 2 * TILE_WIDTH;
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++) dots[r][c] = _mm512_setzero_si512();
#pragma GCC unroll 1
        for (int d = 0; d < DIGITS; d++, digits += BLOCK) {
            __asm__("" : "+r"(weights)); /* else all are kept for the next digit, on the stack */
            if (d)
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
                    for (int c = 0; c < COLS; c++) dots[r][c] = _mm512_slli_epi32(dots[r][c], 8);
#pragma GCC unroll 8
            for (int q = 0; q < BLOCK / QUAD; q++) {
                __m512i w[COLS];
#pragma GCC unroll 3
                for (int c = 0; c < COLS; c++)
                    w[c] = _mm512_loadu_si512(weights + q * TILE_WIDTH + c * WIDE);
                if (unpacks && q < words_of_block(GRID_4))
                    __builtin_prefetch(from + (q - 1 + DIGITS_AHEAD) * TILE_WIDTH, 0, 2);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    __m512i quad = spread_quad(digits + r * row_bytes + q * QUAD);
#pragma GCC unroll 3
                    for (int c = 0; c < COLS; c++)
                        dots[r][c] = _mm512_dpbusd_epi32(dots[r][c], w[c], quad);
                }
            }
            if (unpacks) unpack_columns(from, unpack_to); /* beside the products */
            from += WIDE, unpack_to += WIDE;
        }
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) {
            __m512 step = _mm512_loadu_ps(unpacked + c * WIDE);
            __m512 base = _mm512_loadu_ps(unpacked + TILE_WIDTH + c * WIDE);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sums[r][c] = add_dot(sums[r][c], dots[r][c], scale + r * blocks, sum + r * blocks,
                                     step, base);
        }
        unpacked = next;
        if (unpacks) {
            int64_t after = to_after;
            to_after = to_next, to_next = after;
        }
    }
    finish_tile(sums, to, rows);
}

/* The same for 1 or 2 rows, of which each digit has sums of its own: nothing is stored unpacked. */
INLINE void stream_digits(const digits_t *x, int64_t row, const uint32_t *restrict words,
                          const int rows, const target_t *to, ahead_t others) {
    wide_t sums[TILE_ROWS][COLS];
    const __m512i nibbles = _mm512_set1_epi32(0x0f0f0f0f);
    const int64_t blocks = x->blocks, row_bytes = blocks * DIGITS * BLOCK;
    const float *scale = x->scale + row * blocks, *sum = x->sum + row * blocks;
    const int8_t *digits = x->digits + row * row_bytes, *end = digits + row_bytes;
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) sums[r][c] = (wide_t){0.0f};
    for (; digits < end; scale++, sum++, digits += DIGITS * BLOCK) {
        __m512i dots[STREAM_DIGIT_ROWS][DIGITS][COLS];
        const uint16_t *grid = (const uint16_t *)words;
        fetch_lot(&others);
        fetch_words(words);
        words += TILE_WIDTH;
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
            for (int d = 0; d < DIGITS; d++)
#pragma GCC unroll 3
                for (int c = 0; c < COLS; c++) dots[r][d][c] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int word = 0; word < bits_of(GRID_4); word++, words += TILE_WIDTH) {
            __m512i w[COLS];
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++) w[c] = _mm512_loadu_si512(words + c * WIDE);
            fetch_words(words);
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                __m512i bytes[COLS];
#pragma GCC unroll 3
                for (int c = 0; c < COLS; c++)
                    bytes[c] = _mm512_and_si512(odd ? _mm512_srli_epi32(w[c], 4) : w[c], nibbles);
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
                    for (int d = 0; d < DIGITS; d++) {
                        __m512i quad = spread_quad(digits + r * row_bytes + d * BLOCK +
                                                   (2 * word + odd) * QUAD);
#pragma GCC unroll 3
                        for (int c = 0; c < COLS; c++)
                            dots[r][d][c] = _mm512_dpbusd_epi32(dots[r][d][c], bytes[c], quad);
                    }
            }
        }
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) {
            __m512 step = (__m512)wide_of_halves(grid + c * WIDE);
            __m512 base = (__m512)wide_of_halves(grid + TILE_WIDTH + c * WIDE);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                __m512i dot = dots[r][0][c];
#pragma GCC unroll 2
                for (int d = 1; d < DIGITS; d++)
                    dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 8), dots[r][d][c]);
                sums[r][c] = add_dot(sums[r][c], dot, scale + r * blocks, sum + r * blocks, step,
                                     base);
            }
        }
    }
    finish_tile(sums, to, rows);
}

/* `to` = rows row..row+rows-1, 1 to TILE_ROWS, times one panel. Where `words` is given, the panel, it is
 * unpacked first, to `unpacked`: UNPACKED_WORDS for each block and one more, or two blocks where it
 * is not kept, for DIGIT_ROWS rows at most. What is kept is for more than DIGIT_ROWS. */
static void multiply_digits(const digits_t *x, int64_t row, const uint32_t *words, float *unpacked,
                            int is_kept, int64_t rows, const target_t *to, ahead_t panels,
                            ahead_t others) {
    target_t target = *to;
    int64_t after = is_kept ? UNPACKED_WORDS : -UNPACKED_WORDS;
    if (!is_kept && rows <= STREAM_DIGIT_ROWS) {
        if (rows == 1) stream_digits(x, row, words, 1, to, others);
        else stream_digits(x, row, words, 2, to, others);
        return;
    }
    for (int64_t left = rows; left > 0; left -= DIGIT_ROWS, row += DIGIT_ROWS, words = NULL) {
#define DIGITS_CASE(n, unpacks)                                                                    \
    case n + unpacks * (DIGIT_ROWS + 1):                                                           \
        multiply_digits_tile(x, row, words, unpacked, UNPACKED_WORDS, after, n, unpacks, &target,  \
                             panels, others);                                                      \
        break;
        switch ((left < DIGIT_ROWS ? left : DIGIT_ROWS) + (words ? DIGIT_ROWS + 1 : 0)) {
            DIGITS_CASE(3, 1)
            DIGITS_CASE(4, 1)
            DIGITS_CASE(1, 0)
            DIGITS_CASE(2, 0)
            DIGITS_CASE(3, 0)
            DIGITS_CASE(4, 0)
        }
#undef DIGITS_CASE
        panels.at += x->blocks * panels.lines * LINE;
        others.at += x->blocks * others.lines * LINE;
        target.y += DIGIT_ROWS * target.y_stride;
        for (int64_t i = 0; i < target.num_tails; i++)
            target.tails[i].inner += DIGIT_ROWS * target.tails[i].inner_stride;
    }
}
#else
static void split_row(const float *x, int64_t row, const digits_t *to) {}
static void multiply_digits(const digits_t *x, int64_t row, const uint32_t *words, float *unpacked,
                            int is_kept, int64_t rows, const target_t *to, ahead_t panels,
                            ahead_t others) {}
#endif
