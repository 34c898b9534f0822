/* exp of whole registers, and the activation that is made of it. */
#pragma once

#include "tiles.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

/* The larger numbers, those of `b` where either is NaN. (Compilers that keep infinities and NaN make
 * comparisons and blends of anything but the processor's own instruction.) */
INLINE wide_t larger_of(wide_t a, wide_t b) {
#if defined(__AVX512F__)
    return (wide_t)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (wide_t)_mm256_max_ps((__m256)a, (__m256)b);
#else
    for (int i = 0; i < WIDE; i++) b[i] = a[i] > b[i] ? a[i] : b[i];
    return b;
#endif
}

/* exp(x) with 2 units in the last place from -87 to 88; beyond, what it is there. NaN stays NaN. */
INLINE wide_t exp_of(wide_t x) {
    const float nearest = 0x1.8p23f; /* added, it leaves a whole number in the lowest bits */
    x = larger_of((wide_t){0.0f} - 87.0f, x);
    x = -larger_of((wide_t){0.0f} - 88.0f, -x);
    wide_t halvings = x * 1.44269504088896341f + nearest;
    KEPT(halvings);
    wide_t n = halvings - nearest;
    wide_t r = x - n * 0.693359375f + n * 2.12194440e-4f;
    wide_t p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (wide_t)((words_t)p + ((words_t)halvings << 23)); /* p times 2^n */
}

/* silu(gate) * up */
INLINE wide_t silu_of(wide_t gate, wide_t up) { return gate / (1.0f + exp_of(-gate)) * up; }

/* out = silu(gate) * up; `width` is a constant where that is the usual one. */
INLINE void silu_row(const float *restrict gate, const float *restrict up, float *restrict out,
                     int64_t width) {
    int64_t i = 0;
    for (; i + WIDE <= width; i += WIDE)
        *(wide_t *)(out + i) = silu_of(*(const wide_t *)(gate + i), *(const wide_t *)(up + i));
    if (i == width) return;
    wide_t ends[2] = {{0.0f}, {0.0f}};
    memcpy(&ends[0], gate + i, (width - i) * sizeof(float));
    memcpy(&ends[1], up + i, (width - i) * sizeof(float));
    ends[0] = silu_of(ends[0], ends[1]);
    memcpy(out + i, &ends[0], (width - i) * sizeof(float));
}
