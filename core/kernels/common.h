/* What all kernels share.
 *
 * Kernels of one engine step on the CPU in fp32; Python calls them through cpu_layers.py and
 * compiled_linear.py. All matrices are row-major; a stride counts floats between rows. Every kernel
 * takes the number of threads and uses one where the work is too small to share. Compiled with
 * -ffast-math -fno-finite-math-only: sums may be reordered, infinities and NaN stay what they are.
 */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LINE 16 /* floats of a cache line */

#define MIN_PARALLEL_FLOATS 65536

/* Shared by all: does `floats` of work pay for waking the other threads? */
static inline int threads_for(int64_t floats, int num_threads) {
    return floats < MIN_PARALLEL_FLOATS ? 1 : num_threads;
}

/* exp(x) for x <= 0 with 2 units in the last place; vectorises, unlike the library's. */
static inline float exp_of_nonpositive(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = nearbyintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { float f; int32_t i; } scale;
    scale.i = ((int32_t)n + 127) << 23;
    return p * scale.f;
}

/* out = silu(gate) * up. */
INLINE void silu_row(const float *restrict gate, const float *restrict up, float *restrict out,
                     int64_t width) {
    for (int64_t i = 0; i < width; i++) {
        float e = exp_of_nonpositive(-fabsf(gate[i])); /* one side of the sigmoid, no overflow */
        float sigmoid = (gate[i] < 0.0f ? e : 1.0f) / (1.0f + e);
        out[i] = gate[i] * sigmoid * up[i];
    }
}
