/* Products of fp32 rows with a frozen int8 matrix. Called through int8_linear.py, which packs.
 *
 * Weights and rows have one scale per BLOCK features (a weight's is bf16), so that products within
 * a block are sums of integers. Each row is quantised and summed alone and in one order: what else
 * is in the batch does not reach it. Whatever is not finite makes its row's products not finite.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "shares.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define WIDTH 48         /* outputs of a panel */
#define BLOCK 32         /* features that share a scale */
#define QUAD 4           /* features whose products one instruction sums */
#define ZERO 128         /* the weight 0: weights are stored unsigned, as the instruction wants them */
#define TINY 1e-30f      /* a block that is smaller counts as zeros */
#define AHEAD 12         /* quads that a panel is fetched ahead of its use */
#define MIN_PARALLEL 16384 /* features to quantise for which other threads are woken */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define LANES 16
#define ROWS 4 /* lines that share a pass over a panel: their sums stay in registers */
#elif defined(__AVX2__)
#define LANES 8
#define ROWS 2
#else
#define LANES 4
#define ROWS 2
#endif
#define VECS (WIDTH / LANES)

typedef int32_t ints_t __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words_t __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float floats_t __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves_t __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* sum[o] += the dot product of weight bytes w[o] (unsigned) and the 4 bytes of x (signed). */
static inline __attribute__((always_inline)) ints_t add_quad(ints_t sum, words_t w, int32_t x) {
#if LANES == 16
    return (ints_t)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__)
    return (ints_t)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(x));
#elif defined(__AVX2__)
    __m256i even = (__m256i)(w & 0x00ff00ff), odd = (__m256i)(w >> 8 & 0x00ff00ff);
    __m256i xs = _mm256_set1_epi32(x), x_odd = _mm256_srai_epi16(xs, 8);
    __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8);
    sum += (ints_t)_mm256_madd_epi16(even, x_even);
    return sum + (ints_t)_mm256_madd_epi16(odd, x_odd);
#else
    for (int j = 0; j < QUAD; j++)
        sum += (ints_t)(w >> (8 * j) & 0xff) * (int32_t)(int8_t)((uint32_t)x >> (8 * j));
    return sum;
#endif
}

/* bf16 → fp32 */
static inline __attribute__((always_inline)) floats_t widen(halves_t scale) {
    return (floats_t)(__builtin_convertvector(scale, words_t) << 16);
}

/* The rows that a product reads, quantised: `terms` lines for each row, the second what the first
 * left over. `offset` is what ZERO adds to a block's sum, negated. */
typedef struct {
    int8_t *lines;
    float *scale;
    int32_t *offset;
    int64_t blocks;
} rows_t;

/* The largest |x|; NaN where there is one, since NaN has the largest bits. */
static float largest(const float *restrict x) {
    int32_t most = 0;
    for (int i = 0; i < BLOCK; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float result;
    memcpy(&result, &most, sizeof result);
    return result;
}

static void quantise_block(float *restrict x, int8_t *restrict line, float scale,
                           int32_t *offset) {
    int32_t sum = 0;
    float inverse = scale > TINY / 127.0f ? 1.0f / scale : 0.0f;
    for (int i = 0; i < BLOCK; i++) {
        float rounded = nearbyintf(x[i] * inverse);
        line[i] = (int8_t)rounded;
        sum += (int32_t)rounded;
        x[i] -= rounded * scale;
    }
    *offset = -ZERO * sum;
}

static void quantise_row(const float *x, int64_t in, int64_t row, int terms, const rows_t *to) {
    for (int64_t block = 0; block < to->blocks; block++) {
        float rest[BLOCK] = {0.0f};
        int64_t count = in - block * BLOCK;
        memcpy(rest, x + block * BLOCK, (count < BLOCK ? count : BLOCK) * sizeof(float));
        float scale = largest(rest) / 127.0f;
        for (int term = 0; term < terms; term++, scale /= 254.0f) {
            int64_t place = (row * terms + term) * to->blocks + block;
            to->scale[place] = scale;
            quantise_block(rest, to->lines + place * BLOCK, scale, to->offset + place);
        }
    }
}

/* y = lines times one panel; `lines` and `terms` are constants where this is inlined. */
static inline __attribute__((always_inline)) void
multiply_tile(const rows_t *x, int64_t line, const uint8_t *restrict panel,
              const uint16_t *restrict scales, float *restrict y, int64_t y_stride,
              const int lines, const int terms, int64_t cols, int is_first) {
    floats_t sums[ROWS][VECS];
    int64_t blocks = x->blocks, first = line * blocks;
#pragma GCC unroll 4
    for (int r = 0; r < lines; r++)
#pragma GCC unroll 6
        for (int v = 0; v < VECS; v++) sums[r][v] = (floats_t){0.0f};
    for (int64_t block = 0; block < blocks; block++, scales += WIDTH) {
        const int8_t *q = x->lines + (first + block) * BLOCK;
        ints_t dots[ROWS][VECS];
#pragma GCC unroll 4
        for (int r = 0; r < lines; r++)
#pragma GCC unroll 6
            for (int v = 0; v < VECS; v++)
                dots[r][v] = (ints_t){0} + x->offset[first + r * blocks + block];
#pragma GCC unroll 8
        for (int k = 0; k < BLOCK; k += QUAD, panel += QUAD * WIDTH) {
            words_t w[VECS];
#pragma GCC unroll 6
            for (int v = 0; v < VECS; v++) w[v] = *(const words_t *)(panel + v * QUAD * LANES);
            if (is_first)
#pragma GCC unroll 3
                for (int byte = 0; byte < QUAD * WIDTH; byte += 64)
                    __builtin_prefetch(panel + AHEAD * QUAD * WIDTH + byte, 0, 3);
#pragma GCC unroll 4
            for (int r = 0; r < lines; r++) {
                int32_t quad;
                memcpy(&quad, q + r * blocks * BLOCK + k, sizeof quad);
#pragma GCC unroll 6
                for (int v = 0; v < VECS; v++) dots[r][v] = add_quad(dots[r][v], w[v], quad);
            }
        }
#pragma GCC unroll 6
        for (int v = 0; v < VECS; v++) {
            floats_t scale = widen(*(const halves_t *)(scales + v * LANES));
#pragma GCC unroll 4
            for (int r = 0; r < lines; r++)
                sums[r][v] += scale * x->scale[first + r * blocks + block] *
                              __builtin_convertvector(dots[r][v], floats_t);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < lines; r += terms, y += y_stride) {
        if (terms == 2)
#pragma GCC unroll 6
            for (int v = 0; v < VECS; v++) sums[r][v] += sums[r + 1][v];
        if (cols >= WIDTH)
#pragma GCC unroll 6
            for (int v = 0; v < VECS; v++) *(floats_t *)(y + v * LANES) = sums[r][v];
        else
            memcpy(y, sums[r], cols * sizeof(float));
    }
}

static inline __attribute__((always_inline)) void
multiply_panel(const rows_t *x, int64_t rows, const uint8_t *panel, const uint16_t *scales,
               float *y, int64_t y_stride, const int terms, int64_t cols) {
    int64_t lines = rows * terms, line = 0;
    for (; line + ROWS <= lines; line += ROWS)
        multiply_tile(x, line, panel, scales, y + line / terms * y_stride, y_stride, ROWS, terms,
                      cols, line == 0);
#if ROWS > 2
    for (; line + 2 <= lines; line += 2)
        multiply_tile(x, line, panel, scales, y + line / terms * y_stride, y_stride, 2, terms,
                      cols, line == 0);
#endif
    if (line < lines)
        multiply_tile(x, line, panel, scales, y + line * y_stride, y_stride, 1, 1, cols,
                      line == 0);
}

/* panels is [ceil(out / WIDTH), blocks, BLOCK / QUAD, WIDTH, QUAD] and scales
 * [ceil(out / WIDTH), blocks, WIDTH]. `terms` is 1, or 2 for rows in 15 bits instead of 8. Returns
 * 0, or 1 when there is no memory for the quantised rows. */
int multiply_int8(const matrix_t *w, const float *x, float *y, int64_t rows, int num_threads) {
    int64_t in = w->in, out = w->out, terms = w->terms;
    int64_t blocks = (in + BLOCK - 1) / BLOCK, count = (out + WIDTH - 1) / WIDTH;
    int64_t places = rows * terms * blocks;
    rows_t q = {.blocks = blocks};
    q.scale = malloc((size_t)(places * (BLOCK + sizeof(float) + sizeof(int32_t)) + 1));
    if (!q.scale) return 1;
    q.offset = (int32_t *)(q.scale + places);
    q.lines = (int8_t *)(q.offset + places);
#pragma omp parallel for schedule(static) num_threads(rows *in < MIN_PARALLEL ? 1 : num_threads)
    for (int64_t t = 0; t < rows; t++) quantise_row(x + t * in, in, t, (int)terms, &q);
    share_t shares[num_threads];
    share_out(shares, count, num_threads);
#pragma omp parallel num_threads(num_threads)
    for (int64_t i, direction; (i = next_item(shares, num_threads, &direction)) >= 0;) {
        const uint8_t *panel = (const uint8_t *)w->panels + i * WIDTH * blocks * BLOCK;
        const uint16_t *scale = (const uint16_t *)w->scales + i * WIDTH * blocks;
        float *to = y + i * WIDTH;
        if (terms == 2)
            multiply_panel(&q, rows, panel, scale, to, out, 2, out - i * WIDTH);
        else
            multiply_panel(&q, rows, panel, scale, to, out, 1, out - i * WIDTH);
    }
    free(q.scale);
    return 0;
}
