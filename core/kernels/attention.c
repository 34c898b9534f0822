/* Attention over keys and values in pages: of single rows, and of the rows of prompts. */
#include "common.h"
#include "kernels.h"
#include "tiles.h"

#ifdef __AVX512F__
#define VECS 4 /* vectors of a value row that are summed in one pass */
#else
#define VECS 1
#endif
#define GROUP 4 /* query heads of one key head that share a pass over the values */

#ifdef __AVX512F__
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ivec_t){__VA_ARGS__})
typedef int32_t ivec_t __attribute__((vector_size(64)));
#endif

static inline vec_t dot_lanes(const vec_t *q, const float *key, const int vecs) {
    vec_t sum = q[0] * *(const vec_t *)key;
#pragma GCC unroll 8
    for (int v = 1; v < vecs; v++) sum += q[v] * *(const vec_t *)(key + v * VEC);
    return sum;
}

/* The dot products of one query with 16 keys: their lanes are summed in a tree, all 16 at once. */
INLINE vec_t
dot_16_keys(const vec_t *q, const float *key, int64_t stride, const int vecs) {
    vec_t halves[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        vec_t quarters[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            vec_t pairs[2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++, key += 2 * stride) {
                vec_t a = dot_lanes(q, key, vecs), b = dot_lanes(q, key + stride, vecs);
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
#endif

/* Fetch `rows` rows of a page that is used next. Its lines are asked for a few at a time between
 * the products of the present one: a burst would keep the core from computing. */
INLINE void fetch_rows(const float *row, int64_t rows, int64_t dim, int64_t kv_width) {
    for (int64_t l = 0; l < rows; l++, row += kv_width)
        for (int64_t d = 0; d < dim; d += LINE) __builtin_prefetch(row + d, 0, 2);
}

/* scores[g, l] = scale * (query[g] . key[l]); fastest where `dim` is a constant. `then` is read
 * after the last page. */
INLINE void
score_keys(const float *restrict query, const float *restrict keys, const int64_t *restrict pages,
           int64_t length, int64_t page_size, int64_t group, const int64_t dim, int64_t kv_width,
           float scale, float *restrict scores, const float *then) {
    for (int64_t start = 0; start < length; start += page_size) {
        const float *restrict key = keys + *pages++ * page_size * kv_width;
        int64_t end = start + page_size < length ? start + page_size : length, l = start;
        const float *next = end < length ? keys + *pages * page_size * kv_width : then;
#ifdef __AVX512F__
        if (__builtin_constant_p(dim))
            for (; l + 16 <= end; l += 16, key += 16 * kv_width)
                for (int64_t g = 0; g < group; g++) {
                    int64_t row = l - start + 16 * g / group, last = l - start + 16 * (g + 1) / group;
                    fetch_rows(next + row * kv_width, last - row, dim, kv_width);
                    vec_t q[8];
#pragma GCC unroll 8
                    for (int v = 0; v < dim / VEC; v++)
                        q[v] = *(const vec_t *)(query + g * dim + v * VEC) * scale;
                    *(vec_t *)(scores + g * length + l) = dot_16_keys(q, key, kv_width, dim / VEC);
                }
#endif
        for (; l < end; l++, key += kv_width) {
            fetch_rows(next + (l - start) * kv_width, 1, dim, kv_width);
            for (int64_t g = 0; g < group; g++) {
                const float *restrict q = query + g * dim;
                float sum = 0.0f;
                for (int64_t d = 0; d < dim; d++) sum += q[d] * key[d];
                scores[g * length + l] = sum * scale;
            }
        }
    }
}

static void softmax(float *restrict row, int64_t length) {
    float largest = -INFINITY, sum = 0.0f;
    for (int64_t l = 0; l < length; l++) largest = row[l] > largest ? row[l] : largest;
    for (int64_t l = 0; l < length; l++) {
        row[l] = exp_of_nonpositive(row[l] - largest);
        sum += row[l];
    }
    float share = 1.0f / sum;
    for (int64_t l = 0; l < length; l++) row[l] *= share;
}

/* out[g, :vecs] = sum over l of scores[g, l] * value[l, :vecs]; `group` and `vecs` are constants,
 * so that all sums stay in registers. */
INLINE void
mix_tile(const float *restrict values, const int64_t *restrict pages, int64_t length,
         int64_t page_size, const int group, const int vecs, int64_t kv_width,
         const float *restrict scores, int64_t score_stride, float *restrict out,
         int64_t out_stride) {
    vec_t sums[GROUP][VECS];
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) sums[g][v] = (vec_t){0.0f};
    for (int64_t start = 0; start < length; start += page_size) {
        const float *restrict value = values + *pages++ * page_size * kv_width;
        int64_t end = start + page_size < length ? start + page_size : length;
        const float *next = end < length ? values + *pages * page_size * kv_width : value;
        for (int64_t l = start; l < end; l++, value += kv_width, next += kv_width) {
            fetch_rows(next, 1, vecs * VEC, kv_width);
#pragma GCC unroll 4
            for (int g = 0; g < group; g++)
#pragma GCC unroll 4
                for (int v = 0; v < vecs; v++)
                    sums[g][v] += scores[g * score_stride + l] * *(const vec_t *)(value + v * VEC);
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) *(vec_t *)(out + g * out_stride + v * VEC) = sums[g][v];
}

INLINE void
mix_group(const float *values, const int64_t *pages, int64_t length, int64_t page_size,
          const int group, int64_t dim, int64_t kv_width, const float *scores,
          int64_t score_stride, float *out, int64_t out_stride) {
    int64_t d = 0;
    for (; d + VECS * VEC <= dim; d += VECS * VEC)
        mix_tile(values + d, pages, length, page_size, group, VECS, kv_width, scores,
                 score_stride, out + d, out_stride);
    for (; d + VEC <= dim; d += VEC)
        mix_tile(values + d, pages, length, page_size, group, 1, kv_width, scores,
                 score_stride, out + d, out_stride);
    for (; d < dim; d++)
        for (int g = 0; g < group; g++) {
            float sum = 0.0f;
            for (int64_t l = 0; l < length; l++)
                sum += scores[g * score_stride + l] *
                       values[(pages[l / page_size] * page_size + l % page_size) * kv_width + d];
            out[g * out_stride + d] = sum;
        }
}

/* out[g] = scores[g] times the values, for any number of rows of scores. */
static void mix(const float *values, const int64_t *pages, int64_t length, int64_t page_size,
                int64_t group, int64_t dim, int64_t kv_width, const float *scores,
                int64_t score_stride, float *out, int64_t out_stride) {
#define MIX(n)                                                                               \
    mix_group(values, pages, length, page_size, n, dim, kv_width, scores + g * score_stride, \
              score_stride, out + g * out_stride, out_stride)
    int64_t g = 0;
    for (; g + GROUP <= group; g += GROUP) MIX(GROUP);
    if (group - g == 3)
        MIX(3);
    else
        for (; g < group; g++) MIX(1);
#undef MIX
}

/* The query heads of one key head, of one row: out = softmax(q k^T * scale) v over its pages. */
static void attend(const float *query, const float *keys, const float *values,
                   const int64_t *pages, int64_t length, int64_t page_size, int64_t group,
                   int64_t dim, int64_t kv_width, float scale, float *scores, float *out) {
    const float *then = values + *pages * page_size * kv_width;
#define SCORE(d) \
    score_keys(query, keys, pages, length, page_size, group, d, kv_width, scale, scores, then)
    if (dim == 64)
        SCORE(64);
    else if (dim == 128)
        SCORE(128);
    else
        SCORE(dim);
#undef SCORE
    for (int64_t g = 0; g < group; g++) softmax(scores + g * length, length);
    mix(values, pages, length, page_size, group, dim, kv_width, scores, length, out, dim);
}

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
    float scale = 1.0f / sqrtf((float)dim);
#pragma omp parallel num_threads(used) reduction(| : failed)
    {
        float *scores = malloc((size_t)(group * longest) * sizeof(float));
        failed = scores == NULL;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < rows * num_kv_heads; item++) {
            int64_t s = item / num_kv_heads, head = item % num_kv_heads;
            if (scores)
                attend(query + s * query_stride + head * group * dim, keys + head * dim,
                       values + head * dim, pages + s * max_pages, lengths[s], page_size, group,
                       dim, kv_width, scale, scores, out + (s * num_heads + head * group) * dim);
        }
        free(scores);
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

/* What stays the same for all rows of one call. */
typedef struct {
    const float *query, *keys, *values;
    float *out;
    int64_t query_stride, page_size, num_heads, num_kv_heads, dim;
} prompt_t;

/* Causal attention of rows first..last-1 of a span, for the query heads of one key head. `panels`
 * has room for all keys that they see, `scores` for TILE_ROWS rows of as many. */
static void attend_block(const prompt_t *p, const span_t *span, const int64_t *pages,
                         int64_t kv_head, int64_t first, int64_t last, float *panels,
                         float *scores) {
    int64_t dim = p->dim, kv_width = p->num_kv_heads * dim, group = p->num_heads / p->num_kv_heads;
    int64_t out_stride = p->num_heads * dim, seen = span->before + last - span->start;
    int64_t stride = (seen + TILE_WIDTH - 1) / TILE_WIDTH * TILE_WIDTH;
    pack_keys(p->keys + kv_head * dim, pages, seen, p->page_size, dim, kv_width,
              1.0f / sqrtf((float)dim), panels);
    for (int64_t g = 0; g < group; g++)
        for (int64_t t = first; t < last; t += TILE_ROWS) {
            int64_t rows = last - t < TILE_ROWS ? last - t : TILE_ROWS;
            int64_t head = (kv_head * group + g) * dim, length = span->before + t - span->start + 1;
            for (int64_t l = 0; l < length + rows - 1; l += TILE_WIDTH)
                multiply_rows(p->query + t * p->query_stride + head, p->query_stride,
                              panels + l * dim, scores + l, stride, dim, rows, TILE_WIDTH, NOTHING,
                              NOTHING);
            for (int64_t r = 0; r < rows; r++) {
                softmax(scores + r * stride, length + r);
                memset(scores + r * stride + length + r, 0, (rows - 1 - r) * sizeof(float));
            }
            mix(p->values + kv_head * dim, pages, length + rows - 1, p->page_size, rows, dim,
                kv_width, scores, stride, p->out + t * out_stride + head, out_stride);
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
        float *panels = malloc((size_t)(padded * (dim + TILE_ROWS)) * sizeof(float));
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
                             panels + padded * dim);
        }
        free(panels);
    }
    return failed;
}
