/* Norm, activation, and the step from projections to queries and stored keys and values. */
#include "common.h"
#include "exponential.h"
#include "kernels.h"

#define SUMS 4 /* registers of sums, so that none waits for the one before */

/* x += delta where delta is given; returns the sum of x's squares. */
INLINE float add_and_square(float *restrict x, const float *restrict delta, int64_t width) {
    wide_t sums[SUMS] = {{0.0f}};
    float squares = 0.0f;
    int64_t i = 0;
    for (; i + SUMS * WIDE <= width; i += SUMS * WIDE)
#pragma GCC unroll 4
        for (int s = 0; s < SUMS; s++) {
            wide_t *at = (wide_t *)(x + i + s * WIDE);
            if (delta) *at += *(const wide_t *)(delta + i + s * WIDE);
            sums[s] += *at * *at;
        }
    for (; i < width; i++) {
        if (delta) x[i] += delta[i];
        squares += x[i] * x[i];
    }
    for (int s = 1; s < SUMS; s++) sums[0] += sums[s];
    for (int l = 0; l < WIDE; l++) squares += sums[0][l];
    return squares;
}

/* out[t] = x[t] / rms(x[t]) * weight, after x[t] += delta[t] where delta is given. */
void rms_norm(float *x, const float *delta, const float *weight, float *out, int64_t rows,
              int64_t width, float eps, int num_threads) {
#pragma omp parallel for num_threads(threads_for(rows * width, num_threads))
    for (int64_t t = 0; t < rows; t++) {
        float *restrict xt = x + t * width;
        float *restrict ot = out + t * width;
        float squares = delta ? add_and_square(xt, delta + t * width, width)
                              : add_and_square(xt, NULL, width);
        float scale = 1.0f / sqrtf(squares / (float)width + eps);
        for (int64_t i = 0; i < width; i++) ot[i] = xt[i] * scale * weight[i];
    }
}

/* out[t] = silu(x[t, :width]) * x[t, width:]. */
void silu_mul(const float *x, float *out, int64_t rows, int64_t width, int num_threads) {
#pragma omp parallel for num_threads(threads_for(rows * width, num_threads))
    for (int64_t t = 0; t < rows; t++) {
        const float *gate = x + t * 2 * width;
        silu_row(gate, gate + width, out + t * width, width);
    }
}

/* Rotate the query and key heads of qkv[t] in place, then store keys and values at their slots. */
void rotate_and_store(float *qkv, const float *cosines, const float *sines, const int64_t *slots,
                      float *keys, float *values, int64_t rows, int64_t num_heads,
                      int64_t num_kv_heads, int64_t dim, int num_threads) {
    int64_t width = (num_heads + 2 * num_kv_heads) * dim, half = dim / 2;
    int64_t kv_width = num_kv_heads * dim;
#pragma omp parallel for num_threads(threads_for(rows * width, num_threads))
    for (int64_t t = 0; t < rows; t++) {
        const float *restrict c = cosines + t * dim, *restrict s = sines + t * dim;
        float *row = qkv + t * width;
        for (int64_t h = 0; h < num_heads + num_kv_heads; h++) {
            float *restrict low = row + h * dim, *restrict high = low + half;
            for (int64_t i = 0; i < half; i++) {
                float a = low[i], b = high[i];
                low[i] = a * c[i] - b * s[i];
                high[i] = b * c[half + i] + a * s[half + i];
            }
        }
        const float *key = row + num_heads * dim;
        memcpy(keys + slots[t] * kv_width, key, kv_width * sizeof(float));
        memcpy(values + slots[t] * kv_width, key + kv_width, kv_width * sizeof(float));
    }
}
