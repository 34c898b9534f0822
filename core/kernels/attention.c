/* Attention over keys and values in pages: of single rows, and of the rows of prompts. */
#include "common.h"
#include "exponential.h"
#include "kernels.h"
#include "shares.h"
#include "tiles.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define VECS 4 /* registers of a value row that are summed in one pass */
/* Query heads of one key head that share a pass over the values. */
#ifdef __AVX512F__
#define GROUP 4
#else
#define GROUP 3 /* by VECS: 12 sums, the heads' weights and a value fill 16 registers */
#endif

#ifdef __AVX2__
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ints_t){__VA_ARGS__})
#endif

static inline wide_t dot_lanes(const wide_t *q, const float *key, const int registers) {
    wide_t sum = q[0] * *(const wide_t *)key;
#pragma GCC unroll 16
    for (int v = 1; v < registers; v++) sum += q[v] * *(const wide_t *)(key + v * WIDE);
    return sum;
}

/* The dot products of one query with WIDE keys: their lanes are summed in a tree, all at once. */
#ifdef __AVX512F__
INLINE wide_t dot_keys(const wide_t *q, const float *key, int64_t stride, const int registers) {
    wide_t halves[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        wide_t quarters[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            wide_t pairs[2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++, key += 2 * stride) {
                wide_t a = dot_lanes(q, key, registers), b = dot_lanes(q, key + stride, registers);
                pairs[j] =
                    PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                    PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
            }
            quarters[i] =
                PICK(pairs[0], pairs[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                PICK(pairs[0], pairs[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        }
        halves[h] =
            PICK(quarters[0], quarters[1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
            PICK(quarters[0], quarters[1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    }
    return PICK(halves[0], halves[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           PICK(halves[0], halves[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#else
/* Within the 128 bits that AVX2's shuffles stay in, but for the last step. */
INLINE wide_t dot_keys(const wide_t *q, const float *key, int64_t stride, const int registers) {
    wide_t halves[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        wide_t pairs[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++, key += 2 * stride) {
            wide_t a = dot_lanes(q, key, registers), b = dot_lanes(q, key + stride, registers);
            pairs[i] = PICK(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + PICK(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
        }
        halves[h] = PICK(pairs[0], pairs[1], 0, 2, 8, 10, 4, 6, 12, 14) +
                    PICK(pairs[0], pairs[1], 1, 3, 9, 11, 5, 7, 13, 15);
    }
    return PICK(halves[0], halves[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           PICK(halves[0], halves[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
#endif
#endif

/* Where the page lies that is used next, and the floats from one piece of it, `dim` long, to the
 * next. Its pieces are asked for a few at a time between the products of the present page, as many
 * as that has: a burst would keep the core from computing. */
typedef struct {
    const float *at;
    int64_t step;
} next_t;

INLINE void fetch(next_t next, int64_t first, int64_t last, int64_t dim) {
    const float *piece = next.at + first * next.step;
    for (; first < last; first++, piece += next.step)
        for (int64_t d = 0; d < dim; d += LINE) __builtin_prefetch(piece + d, 0, 2);
}

#define LONGEST 128 /* of the dimensions that are constants */

/* scores[g, l] = query[g] . key[l] for the keys of one page; fastest where `dim` is a constant. */
INLINE void
score_keys(const float *restrict query, const float *restrict key, int64_t length, int64_t group,
           const int64_t dim, int64_t kv_width, float *restrict scores, int64_t score_stride,
           next_t next) {
    int64_t l = 0;
#ifdef __AVX2__
    const int64_t share = (WIDE + group - 1) / group; /* of WIDE pieces each head fetches so many */
    if (__builtin_constant_p(dim))
        for (; l + WIDE <= length; l += WIDE, key += WIDE * kv_width)
            for (int64_t g = 0, first = l; g < group; g++, first += share) {
                int64_t left = l + WIDE - first;
                fetch(next, first, first + (left < share ? left : share), dim);
                wide_t q[LONGEST / WIDE];
#pragma GCC unroll 16
                for (int v = 0; v < dim / WIDE; v++)
                    q[v] = *(const wide_t *)(query + g * dim + v * WIDE);
                *(wide_t *)(scores + g * score_stride + l) =
                    dot_keys(q, key, kv_width, dim / WIDE);
            }
#endif
    for (; l < length; l++, key += kv_width) {
        fetch(next, l, l + 1, dim);
        for (int64_t g = 0; g < group; g++) {
            const float *restrict q = query + g * dim;
            float sum = 0.0f;
            for (int64_t d = 0; d < dim; d++) sum += q[d] * key[d];
            scores[g * score_stride + l] = sum;
        }
    }
}

/* The largest of whole registers; NaN where the last one of a lane is. */
static float largest_of(const float *row, int64_t length) {
    wide_t most = *(const wide_t *)row;
    for (int64_t l = WIDE; l < length; l += WIDE)
        most = larger_of(most, *(const wide_t *)(row + l));
    float largest = most[0];
    for (int i = 1; i < WIDE; i++) largest = most[i] > largest ? most[i] : largest;
    return largest;
}

/* In place. Up to the end of the cache line behind its last number the row is used too. */
static void softmax(float *restrict row, int64_t length) {
    int64_t padded = (length + LINE - 1) / LINE * LINE;
    wide_t sums = {0.0f};
    float sum = 0.0f;
    for (int64_t l = length; l < padded; l++) row[l] = -INFINITY;
    float largest = largest_of(row, padded);
    for (int64_t l = 0; l < padded; l += WIDE) { /* what is padded becomes 1e-38, nothing beside 1 */
        wide_t share = exp_of(*(const wide_t *)(row + l) - largest);
        *(wide_t *)(row + l) = share;
        sums += share;
    }
    for (int i = 0; i < WIDE; i++) sum += sums[i];
    float share = 1.0f / sum;
    for (int64_t l = 0; l < padded; l++) row[l] *= share;
}

/* AVX2's 16 registers are all in use: had the next part been loaded before, a sum would be in memory. */
#if defined(__AVX2__) && !defined(__AVX512F__)
#define LOADED_AFTER(from, sum) __asm__("" : "+r"(from) : "x"(sum))
#else
#define LOADED_AFTER(from, sum)
#endif

/* out[g, :vecs] += sum over l of scores[g, l] * value[l, :vecs]; `group` and `vecs` are constants,
 * so that all sums stay in registers. */
INLINE void
mix_tile(const float *restrict value, int64_t length, const int group, const int vecs,
         int64_t kv_width, const float *restrict scores, int64_t score_stride,
         float *restrict out, int64_t out_stride, next_t next) {
    wide_t sums[GROUP][VECS];
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) sums[g][v] = *(wide_t *)(out + g * out_stride + v * WIDE);
    for (int64_t l = 0; l < length; l++, value += kv_width) {
        fetch(next, l, l + 1, vecs * WIDE);
        wide_t weights[GROUP];
#pragma GCC unroll 4
        for (int g = 0; g < group; g++)
            weights[g] = (wide_t){0.0f} + scores[g * score_stride + l];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            wide_t part = *(const wide_t *)(value + v * WIDE);
            if (v + 1 < vecs) LOADED_ONCE(part);
#pragma GCC unroll 4
            for (int g = 0; g < group; g++) sums[g][v] += weights[g] * part;
            LOADED_AFTER(value, sums[group - 1][v]);
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) *(wide_t *)(out + g * out_stride + v * WIDE) = sums[g][v];
}

INLINE void
mix_group(const float *value, int64_t length, const int group, int64_t dim, int64_t kv_width,
          const float *scores, int64_t score_stride, float *out, int64_t out_stride,
          next_t next) {
    int64_t d = 0;
    for (; d + VECS * WIDE <= dim; d += VECS * WIDE)
        mix_tile(value + d, length, group, VECS, kv_width, scores, score_stride, out + d,
                 out_stride, (next_t){next.at + d, next.step});
    for (; d + WIDE <= dim; d += WIDE)
        mix_tile(value + d, length, group, 1, kv_width, scores, score_stride, out + d, out_stride,
                 (next_t){next.at + d, next.step});
    for (; d < dim; d++)
        for (int g = 0; g < group; g++) {
            float sum = out[g * out_stride + d];
            for (int64_t l = 0; l < length; l++)
                sum += scores[g * score_stride + l] * value[l * kv_width + d];
            out[g * out_stride + d] = sum;
        }
}

/* out[g] += scores[g] times `length` values, for any number of rows of scores. */
static void mix(const float *value, int64_t length, int64_t group, int64_t dim, int64_t kv_width,
                const float *scores, int64_t score_stride, float *out, int64_t out_stride,
                next_t next) {
#define MIX(n)                                                                                \
    case n:                                                                                   \
        mix_group(value, length, n, dim, kv_width, scores, score_stride, out, out_stride, next); \
        break;
    while (group > 0) {
        int64_t heads = group <= GROUP ? group : group == GROUP + 1 ? GROUP - 1 : GROUP;
        switch (heads) {
            MIX(1)
            MIX(2)
            MIX(3)
#if GROUP > 3
            MIX(4)
#endif
        }
        group -= heads, scores += heads * score_stride, out += heads * out_stride;
    }
#undef MIX
}

/* Keys or values of `num_heads` heads in the pages of one row. */
typedef struct {
    const float *base;
    const int64_t *pages;
    int64_t length, page_size, num_heads, dim, kv_width;
} paged_t;

static const float *page_of(const paged_t *paged, int64_t index) {
    return paged->base + paged->pages[index] * paged->page_size * paged->kv_width;
}

/* How many places of the page that begins at `start` are the row's. */
static int64_t places_in(const paged_t *paged, int64_t start) {
    int64_t left = paged->length - start;
    return left < paged->page_size ? left : paged->page_size;
}

/* What head `head` fetches of a page. All heads of a row fetch it in its order, one alone its own
 * pieces. */
static next_t next_of(const paged_t *paged, const float *page, int64_t head) {
    if (paged->num_heads == 1) return (next_t){page, paged->kv_width};
    return (next_t){page + head * paged->page_size * paged->dim, paged->dim};
}

/* Floats from one head's scores of `length` keys to the next one's: registers of scores may end behind
 * the last key. */
static int64_t score_stride_of(int64_t length) { return (length + 2 * LINE - 2) / LINE * LINE; }

/* The query heads of some key heads, of one row: out = softmax(q k^T * scale) v over its pages. All
 * these heads pass over a page together, so that memory is read in its order; with the last page they
 * fetch `after`, one of keys. `room` is for all queries and scores. */
static void attend(const float *query, const paged_t *keys, const paged_t *values, int64_t group,
                   const float *after, float *room, float *out) {
    int64_t dim = keys->dim, length = keys->length, num_heads = keys->num_heads * group;
    int64_t page_size = keys->page_size, stride = score_stride_of(length);
    float scale = 1.0f / sqrtf((float)dim), *scaled = room, *scores = room + num_heads * dim;
    for (int64_t i = 0; i < num_heads * dim; i++) scaled[i] = query[i] * scale;
    for (int64_t l = 0, index = 0; l < length; l += page_size, index++) {
        const float *page = page_of(keys, index);
        const float *ahead = l + page_size < length ? page_of(keys, index + 1) : page_of(values, 0);
        /* Whole registers of scores, where the page has so many places; softmax forgets what is too much. */
        int64_t places = (places_in(keys, l) + WIDE - 1) / WIDE * WIDE;
        if (places > page_size) places = page_size;
        for (int64_t h = 0; h < keys->num_heads; h++) {
#define SCORE(d)                                                                              \
    score_keys(scaled + h * group * dim, page + h * dim, places, group, d, keys->kv_width,    \
               scores + h * group * stride + l, stride, next_of(keys, ahead, h))
            if (dim == 64)
                SCORE(64);
            else if (dim == 128)
                SCORE(128);
            else
                SCORE(dim);
#undef SCORE
        }
    }
    for (int64_t h = 0; h < num_heads; h++) softmax(scores + h * stride, length);
    memset(out, 0, num_heads * dim * sizeof(float));
    for (int64_t l = 0, index = 0; l < length; l += page_size, index++) {
        const float *page = page_of(values, index);
        const float *ahead = l + page_size < length ? page_of(values, index + 1) : after;
        for (int64_t h = 0; h < values->num_heads; h++)
            mix(page + h * dim, places_in(values, l), group, dim, values->kv_width,
                scores + h * group * stride + l, stride, out + h * group * dim, dim,
                next_of(values, ahead, h));
    }
}

#define ROWS_PER_THREAD 2 /* with fewer, threads share rows */

/* query[s] starts at query + s * query_stride; pages is [rows, max_pages]. Returns 0, or 1 when
 * there is no memory for the scores. */
int decode_attention(const float *query, int64_t query_stride, const float *keys,
                     const float *values, const int64_t *pages, const int64_t *lengths, float *out,
                     int64_t rows, int64_t max_pages, int64_t page_size, int64_t num_heads,
                     int64_t num_kv_heads, int64_t dim, int num_threads) {
    int64_t group = num_heads / num_kv_heads, kv_width = num_kv_heads * dim, longest = 0, total = 0;
    for (int64_t s = 0; s < rows; s++) {
        longest = lengths[s] > longest ? lengths[s] : longest;
        total += lengths[s];
    }
    int used = threads_for(total * num_heads * dim, num_threads), failed = 0;
    int64_t parts = rows < ROWS_PER_THREAD * used ? num_kv_heads : 1; /* of a row's heads */
    int64_t heads = num_kv_heads / parts, items = rows * parts;
    share_t shares[used];
    share_out(shares, items, used);
#pragma omp parallel num_threads(used) reduction(| : failed)
    {
        int64_t floats = heads * group * (dim + score_stride_of(longest)), direction;
        float *room = aligned_alloc(64, (floats + LINE - 1) / LINE * LINE * sizeof(float));
        failed = room == NULL;
        for (int64_t item; room && (item = next_item(shares, used, &direction)) >= 0;) {
            int64_t s = item / parts, head = item % parts * heads, after = item + direction;
            paged_t of_keys = {keys + head * dim, pages + s * max_pages, lengths[s], page_size,
                               heads,             dim,                   kv_width};
            paged_t of_values = of_keys, of_next = of_keys;
            of_values.base = values + head * dim;
            if (after >= 0 && after < items) {
                of_next.base = keys + after % parts * heads * dim;
                of_next.pages = pages + after / parts * max_pages;
            }
            attend(query + s * query_stride + head * group * dim, &of_keys, &of_values, group,
                   page_of(&of_next, 0), room, out + (s * num_heads + head * group) * dim);
        }
        free(room);
    }
    return failed;
}

#define PROMPT_BLOCK 64 /* rows of a prompt that one thread takes at a time */

/* The first `length` keys times `scale`, transposed: panels of TILE_WIDTH keys, [dim, width] each,
 * zeros beyond `length`. */
static void pack_keys(const float *keys, const int64_t *pages, int64_t length, int64_t page_size,
                      int64_t dim, int64_t kv_width, float scale, float *panels) {
    int64_t padded = (length + TILE_WIDTH - 1) / TILE_WIDTH * TILE_WIDTH;
    const float *key = NULL;
    for (int64_t l = 0; l < padded; l++, key += kv_width) {
        if (l < length && l % page_size == 0) key = keys + *pages++ * page_size * kv_width;
        float *to = panels + l / TILE_WIDTH * TILE_WIDTH * dim + l % TILE_WIDTH;
        for (int64_t d = 0; d < dim; d++) to[d * TILE_WIDTH] = l < length ? key[d] * scale : 0.0f;
    }
}

/* The first `length` values behind each other, [length, dim]. */
static void gather_values(const float *values, const int64_t *pages, int64_t length,
                          int64_t page_size, int64_t dim, int64_t kv_width, float *to) {
    const float *value = NULL;
    for (int64_t l = 0; l < length; l++, value += kv_width, to += dim) {
        if (l % page_size == 0) value = values + *pages++ * page_size * kv_width;
        memcpy(to, value, dim * sizeof(float));
    }
}

/* What stays the same for all rows of one call. */
typedef struct {
    const float *query, *keys, *values;
    float *out;
    int64_t query_stride, page_size, num_heads, num_kv_heads, dim;
} prompt_t;

/* Causal attention of rows first..last-1 of a span, for the query heads of one key head. `panels`
 * and `values` have room for all that they see, `scores` for TILE_ROWS rows of as many. */
static void attend_block(const prompt_t *p, const span_t *span, const int64_t *pages,
                         int64_t kv_head, int64_t first, int64_t last, float *panels,
                         float *values, float *scores) {
    int64_t dim = p->dim, kv_width = p->num_kv_heads * dim, group = p->num_heads / p->num_kv_heads;
    int64_t out_stride = p->num_heads * dim, seen = span->before + last - span->start;
    int64_t stride = (seen + TILE_WIDTH - 1) / TILE_WIDTH * TILE_WIDTH;
    pack_keys(p->keys + kv_head * dim, pages, seen, p->page_size, dim, kv_width,
              1.0f / sqrtf((float)dim), panels);
    gather_values(p->values + kv_head * dim, pages, seen, p->page_size, dim, kv_width, values);
    for (int64_t g = 0; g < group; g++)
        for (int64_t t = first; t < last; t += TILE_ROWS) {
            int64_t rows = last - t < TILE_ROWS ? last - t : TILE_ROWS;
            int64_t head = (kv_head * group + g) * dim, length = span->before + t - span->start + 1;
            for (int64_t l = 0; l < length + rows - 1; l += TILE_WIDTH) {
                target_t to = {scores + l, stride, TILE_WIDTH, 0, {{NULL}}};
                multiply_rows(p->query + t * p->query_stride + head, p->query_stride,
                              panels + l * dim, dim, rows, &to, NOTHING, NOTHING);
            }
            for (int64_t r = 0; r < rows; r++) {
                softmax(scores + r * stride, length + r);
                memset(scores + r * stride + length + r, 0, (rows - 1 - r) * sizeof(float));
            }
            float *out = p->out + t * out_stride + head;
            for (int64_t r = 0; r < rows; r++) memset(out + r * out_stride, 0, dim * sizeof(float));
            mix(values, length + rows - 1, rows, dim, dim, scores, stride, out, out_stride,
                (next_t){values, 0});
        }
}

/* Row t of `query` starts at query + t * query_stride; pages is [spans, max_pages]. Rows of no span
 * stay as they are. Returns 0, or 1 when there is no memory for keys and scores. */
int prompt_attention(const float *query, int64_t query_stride, const float *keys,
                     const float *values, const int64_t *pages, const span_t *spans, float *out,
                     int64_t num_spans, int64_t max_pages, int64_t page_size, int64_t num_heads,
                     int64_t num_kv_heads, int64_t dim, int num_threads) {
    prompt_t prompt = {query, keys, values, out, query_stride, page_size, num_heads, num_kv_heads,
                       dim};
    int64_t longest = 0, num_blocks = 0, total = 0;
    for (int64_t s = 0; s < num_spans; s++) {
        int64_t rows = spans[s].end - spans[s].start, seen = spans[s].before + rows;
        longest = seen > longest ? seen : longest;
        num_blocks += (rows + PROMPT_BLOCK - 1) / PROMPT_BLOCK;
        total += rows * seen;
    }
    int64_t padded = (longest + TILE_WIDTH - 1) / TILE_WIDTH * TILE_WIDTH;
    int used = threads_for(total * num_heads * dim, num_threads), failed = 0;
#pragma omp parallel num_threads(used) reduction(| : failed)
    {
        float *panels = aligned_alloc(64, padded * (2 * dim + TILE_ROWS) * sizeof(float));
        failed = panels == NULL;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = num_blocks * num_kv_heads - 1; item >= 0; item--) {
            int64_t s = 0, block = item / num_kv_heads;
            for (;; s++) {
                int64_t blocks = (spans[s].end - spans[s].start + PROMPT_BLOCK - 1) / PROMPT_BLOCK;
                if (block < blocks) break;
                block -= blocks;
            }
            int64_t first = spans[s].start + block * PROMPT_BLOCK, last = first + PROMPT_BLOCK;
            if (panels)
                attend_block(&prompt, &spans[s], pages + s * max_pages, item % num_kv_heads, first,
                             last < spans[s].end ? last : spans[s].end, panels,
                             panels + padded * dim, panels + 2 * padded * dim);
        }
        free(panels);
    }
    return failed;
}
