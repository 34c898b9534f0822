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
