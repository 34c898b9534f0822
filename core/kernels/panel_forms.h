/* How a panel has its weights in fewer bits than 32.
 *
 * A panel is [in / BLOCK][words_of_block(form)][TILE_WIDTH] words. A word has the next weights of
 * one output, the first in its lowest bits: bf16, or numbers on a grid of 8 or 4 bits, which stand
 * for number * step + base. A block of a grid begins with its outputs' steps and then their bases,
 * in fp16. Of fp16 two features' rows of weights stand in a row of words, one after the other. `in`
 * is a multiple of BLOCK.
 */
#pragma once

#include "kernels.h"
#include "tiles.h"
#ifdef __F16C__
#include <immintrin.h>
#endif

#define BLOCK 32 /* features with one step and base */

typedef uint16_t halves_t __attribute__((vector_size(2 * WIDE), aligned(2), may_alias));

INLINE int bits_of(int64_t form) {
    return form == GRID_4 ? 4 : form == GRID_8 ? 8 : form == FP32 ? 32 : 16;
}

INLINE int64_t words_of_block(int64_t form) { return bits_of(form) + (bits_of(form) < 16); }

/* Words of a panel; in fp32 `in` may be any number. */
INLINE int64_t words_of_panel(int64_t in, int64_t form) {
    return form == FP32 ? in * TILE_WIDTH : in / BLOCK * words_of_block(form) * TILE_WIDTH;
}

/* fp16 -> fp32 */
INLINE wide_t wide_of_halves(const void *from) {
#if defined(__AVX512F__) && defined(__F16C__)
    return (wide_t)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__) && defined(__F16C__)
    return (wide_t)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    words_t bits = __builtin_convertvector(*(const halves_t *)from, words_t);
    wide_t size = (wide_t)((bits & 0x7fff) << 13) * 0x1p112f; /* fp16's exponents begin at 2^-15 */
    return (wide_t)((words_t)size | (bits & 0x8000) << 16);
#endif
}
