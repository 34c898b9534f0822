/* Kernels of one engine step on the CPU in fp32. Called through cpu_ops.py and
 * cpu_linear.py, which say shapes.
 *
 * All matrices are row-major; a stride counts floats between rows. Every kernel takes the number
 * of threads and uses one where the work is too small to share. Nothing is allocated but a score
 * buffer per attention call. Compiled with -ffast-math -fno-finite-math-only: sums may be
 * reordered, infinities and NaN stay what they are.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MIN_PARALLEL_FLOATS 65536

/* Shared by all: does `floats` of work pay for waking the other threads? */
static int threads_for(int64_t floats, int num_threads) {
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

/* out[t] = x[t] / rms(x[t]) * weight, after x[t] += delta[t] where delta is given. */
void rms_norm(float *x, const float *delta, const float *weight, float *out, int64_t rows,
              int64_t width, float eps, int num_threads) {
#pragma omp parallel for num_threads(threads_for(rows * width, num_threads))
    for (int64_t t = 0; t < rows; t++) {
        float *restrict xt = x + t * width;
        float *restrict ot = out + t * width;
        float squares = 0.0f;
        if (delta) {
            const float *restrict dt = delta + t * width;
            for (int64_t i = 0; i < width; i++) xt[i] += dt[i];
        }
        for (int64_t i = 0; i < width; i++) squares += xt[i] * xt[i];
        float scale = 1.0f / sqrtf(squares / (float)width + eps);
        for (int64_t i = 0; i < width; i++) ot[i] = xt[i] * scale * weight[i];
    }
}

/* out[t] = silu(x[t, :width]) * x[t, width:]. */
void silu_mul(const float *x, float *out, int64_t rows, int64_t width, int num_threads) {
#pragma omp parallel for num_threads(threads_for(rows * width, num_threads))
    for (int64_t t = 0; t < rows; t++) {
        const float *restrict gate = x + t * 2 * width, *restrict up = gate + width;
        float *restrict ot = out + t * width;
        for (int64_t i = 0; i < width; i++) {
            float e = exp_of_nonpositive(-fabsf(gate[i])); /* one side of the sigmoid, no overflow */
            float sigmoid = (gate[i] < 0.0f ? e : 1.0f) / (1.0f + e);
            ot[i] = gate[i] * sigmoid * up[i];
        }
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

typedef float vec_t __attribute__((vector_size(64), aligned(4), may_alias));

#define VEC 16 /* floats of a vec_t; compilers split it where registers are narrower */
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
static inline __attribute__((always_inline)) vec_t
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

/* scores[g, l] = scale * (query[g] . key[l]); fastest where `dim` is a constant. */
static inline __attribute__((always_inline)) void
score_keys(const float *restrict query, const float *restrict keys, const int64_t *restrict pages,
           int64_t length, int64_t page_size, int64_t group, const int64_t dim, int64_t kv_width,
           float scale, float *restrict scores) {
    for (int64_t start = 0; start < length; start += page_size) {
        const float *restrict key = keys + *pages++ * page_size * kv_width;
        int64_t end = start + page_size < length ? start + page_size : length, l = start;
#ifdef __AVX512F__
        if (__builtin_constant_p(dim))
            for (; l + 16 <= end; l += 16, key += 16 * kv_width)
                for (int64_t g = 0; g < group; g++) {
                    vec_t q[8];
#pragma GCC unroll 8
                    for (int v = 0; v < dim / VEC; v++)
                        q[v] = *(const vec_t *)(query + g * dim + v * VEC) * scale;
                    *(vec_t *)(scores + g * length + l) = dot_16_keys(q, key, kv_width, dim / VEC);
                }
#endif
        for (; l < end; l++, key += kv_width)
            for (int64_t g = 0; g < group; g++) {
                const float *restrict q = query + g * dim;
                float sum = 0.0f;
                for (int64_t d = 0; d < dim; d++) sum += q[d] * key[d];
                scores[g * length + l] = sum * scale;
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
static inline __attribute__((always_inline)) void
mix_tile(const float *restrict values, const int64_t *restrict pages, int64_t length,
         int64_t page_size, const int group, const int vecs, int64_t dim, int64_t kv_width,
         const float *restrict scores, float *restrict out) {
    vec_t sums[GROUP][VECS];
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) sums[g][v] = (vec_t){0.0f};
    for (int64_t start = 0; start < length; start += page_size) {
        const float *restrict value = values + *pages++ * page_size * kv_width;
        int64_t end = start + page_size < length ? start + page_size : length;
        for (int64_t l = start; l < end; l++, value += kv_width)
#pragma GCC unroll 4
            for (int g = 0; g < group; g++)
#pragma GCC unroll 4
                for (int v = 0; v < vecs; v++)
                    sums[g][v] += scores[g * length + l] * *(const vec_t *)(value + v * VEC);
    }
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) *(vec_t *)(out + g * dim + v * VEC) = sums[g][v];
}

static inline __attribute__((always_inline)) void
mix_group(const float *values, const int64_t *pages, int64_t length, int64_t page_size,
          const int group, int64_t dim, int64_t kv_width, const float *scores, float *out) {
    int64_t d = 0;
    for (; d + VECS * VEC <= dim; d += VECS * VEC)
        mix_tile(values + d, pages, length, page_size, group, VECS, dim, kv_width, scores, out + d);
    for (; d + VEC <= dim; d += VEC)
        mix_tile(values + d, pages, length, page_size, group, 1, dim, kv_width, scores, out + d);
    for (; d < dim; d++)
        for (int g = 0; g < group; g++) {
            float sum = 0.0f;
            for (int64_t l = 0; l < length; l++)
                sum += scores[g * length + l] *
                       values[(pages[l / page_size] * page_size + l % page_size) * kv_width + d];
            out[g * dim + d] = sum;
        }
}

/* The query heads of one key head, of one row: out = softmax(q k^T * scale) v over its pages. */
static void attend(const float *query, const float *keys, const float *values,
                   const int64_t *pages, int64_t length, int64_t page_size, int64_t group,
                   int64_t dim, int64_t kv_width, float scale, float *scores, float *out) {
    if (dim == 64)
        score_keys(query, keys, pages, length, page_size, group, 64, kv_width, scale, scores);
    else if (dim == 128)
        score_keys(query, keys, pages, length, page_size, group, 128, kv_width, scale, scores);
    else
        score_keys(query, keys, pages, length, page_size, group, dim, kv_width, scale, scores);
    for (int64_t g = 0; g < group; g++) softmax(scores + g * length, length);
    int64_t g = 0;
    for (; g + GROUP <= group; g += GROUP)
        mix_group(values, pages, length, page_size, GROUP, dim, kv_width, scores + g * length,
                  out + g * dim);
    if (group - g == 3)
        mix_group(values, pages, length, page_size, 3, dim, kv_width, scores + g * length,
                  out + g * dim);
    else
        for (; g < group; g++)
            mix_group(values, pages, length, page_size, 1, dim, kv_width, scores + g * length,
                      out + g * dim);
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

/* One module's factors: a is [rank, in], b is [rank, out]; rank 0 leaves the module alone. */
typedef struct {
    const float *a, *b;
    int64_t rank;
    double scale;
} pair_t;

/* Rows start..end-1 belong to the adapter whose pairs begin at `pairs`. */
typedef struct {
    int64_t start, end;
    const pair_t *pairs;
} rows_t;

#define BLOCK 4 /* rows, and ranks, that share one pass over what they read */

/* y[t] += scale * (x[t] a^T) b for `rows` rows and `ranks` ranks, both constants where this is
 * inlined: all sums stay in registers, x and a are read once, y is written once. */
static inline __attribute__((always_inline)) void
add_tile(const float *restrict x, int64_t x_stride, float *restrict y, int64_t y_stride,
         const float *restrict a, const float *restrict b, float scale, int64_t in, int64_t out,
         const int rows, const int ranks) {
    float weight[BLOCK][BLOCK] = {{0.0f}};
    for (int64_t i = 0; i < in; i++)
#pragma GCC unroll 4
        for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
            for (int t = 0; t < rows; t++) weight[r][t] += a[r * in + i] * x[t * x_stride + i];
#pragma GCC unroll 4
    for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++) weight[r][t] *= scale;
    for (int64_t o = 0; o < out; o++)
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++) {
            float sum = y[t * y_stride + o];
#pragma GCC unroll 4
            for (int r = 0; r < ranks; r++) sum += weight[r][t] * b[r * out + o];
            y[t * y_stride + o] = sum;
        }
}

/* Ask for the next factors while the present ones are used: each adapter's are read once a step. */
static void prefetch(const pair_t *pair, int64_t in, int64_t out) {
    for (int64_t i = 0; i < pair->rank * in; i += VEC) __builtin_prefetch(pair->a + i, 0, 2);
    for (int64_t i = 0; i < pair->rank * out; i += VEC) __builtin_prefetch(pair->b + i, 0, 2);
}

static void add_block(const float *x, int64_t x_stride, float *y, int64_t y_stride, int64_t rows,
                      const pair_t *pair, int64_t in, int64_t out) {
    float scale = (float)pair->scale;
    int64_t r = 0;
    for (; r + BLOCK <= pair->rank; r += BLOCK) {
        const float *a = pair->a + r * in, *b = pair->b + r * out;
        if (rows == BLOCK)
            add_tile(x, x_stride, y, y_stride, a, b, scale, in, out, BLOCK, BLOCK);
        else
            for (int64_t t = 0; t < rows; t++)
                add_tile(x + t * x_stride, x_stride, y + t * y_stride, y_stride, a, b, scale, in,
                         out, 1, BLOCK);
    }
    for (; r < pair->rank; r++)
        for (int64_t t = 0; t < rows; t++)
            add_tile(x + t * x_stride, x_stride, y + t * y_stride, y_stride, pair->a + r * in,
                     pair->b + r * out, scale, in, out, 1, 1);
}

/* y[t, offset of j :] += scale * (x[t] a_j^T) b_j for each projection j of the rows' adapter.
 * `first` is the index of the first projection's pair in each adapter's table. */
void add_low_rank(const float *x, int64_t x_stride, float *y, int64_t y_stride,
                  const rows_t *segments, int64_t num_segments, int64_t first,
                  int64_t num_projections, const int64_t *outs, int64_t in, int num_threads) {
    int64_t num_blocks = 0, floats = 0;
    for (int64_t s = 0; s < num_segments; s++) {
        int64_t rows = segments[s].end - segments[s].start;
        num_blocks += (rows + BLOCK - 1) / BLOCK;
        for (int64_t j = 0; j < num_projections; j++)
            floats += rows * segments[s].pairs[first + j].rank * (in + outs[j]);
    }
#pragma omp parallel for schedule(static) num_threads(threads_for(floats, num_threads))
    for (int64_t block = 0; block < num_blocks; block++) {
        int64_t s = 0, left = block;
        for (;; s++) {
            int64_t blocks = (segments[s].end - segments[s].start + BLOCK - 1) / BLOCK;
            if (left < blocks) break;
            left -= blocks;
        }
        int64_t start = segments[s].start + left * BLOCK;
        int64_t rows = segments[s].end - start < BLOCK ? segments[s].end - start : BLOCK;
        int64_t offset = 0;
        int ends = start + rows == segments[s].end && s + 1 < num_segments;
        for (int64_t j = 0; j < num_projections; j++) {
            if (j + 1 < num_projections)
                prefetch(&segments[s].pairs[first + j + 1], in, outs[j + 1]);
            else if (ends)
                prefetch(&segments[s + 1].pairs[first], in, outs[0]);
            add_block(x + start * x_stride, x_stride, y + start * y_stride + offset, y_stride,
                      rows, &segments[s].pairs[first + j], in, outs[j]);
            offset += outs[j];
        }
    }
}

/* -- products with a frozen matrix, packed in panels ------------------------------------------- */

#define COLS 3                  /* vectors of outputs in a panel */
#define PANEL_WIDTH (COLS * VEC)
#define PANEL_ROWS 8            /* rows that share a pass over a panel: 24 sums in registers */
#define PANEL_AHEAD 24          /* features that a panel is fetched ahead of its use */

/* Outputs of a panel; 0 where this machine has no registers for it and nobody should pack. */
int64_t panel_width(void) {
#ifdef __AVX512F__
    return PANEL_WIDTH;
#else
    return 0;
#endif
}

/* w is [out, in]; panels is [ceil(out / width), in, width], zeros beyond `out`. */
void pack_panels(const float *w, float *panels, int64_t in, int64_t out, int num_threads) {
    int64_t count = (out + PANEL_WIDTH - 1) / PANEL_WIDTH;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < PANEL_WIDTH; c++) {
            int64_t o = i * PANEL_WIDTH + c;
            float *to = panels + i * PANEL_WIDTH * in + c;
            for (int64_t k = 0; k < in; k++) to[k * PANEL_WIDTH] = o < out ? w[o * in + k] : 0.0f;
        }
}

/* y[rows, cols] = x[rows, in] times one panel; `rows` is a constant where this is inlined. */
static inline __attribute__((always_inline)) void
multiply_tile(const float *restrict x, const float *restrict panel, float *restrict y,
              int64_t y_stride, int64_t in, const int rows, int64_t cols, int is_first) {
    vec_t sums[PANEL_ROWS][COLS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) sums[r][c] = (vec_t){0.0f};
    for (int64_t k = 0; k < in; k++) {
        const float *w = panel + k * PANEL_WIDTH;
        if (is_first)
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++)
                __builtin_prefetch(w + PANEL_AHEAD * PANEL_WIDTH + c * VEC, 0, 3);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++)
                sums[r][c] += x[r * in + k] * *(const vec_t *)(w + c * VEC);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        if (cols >= PANEL_WIDTH)
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++) *(vec_t *)(y + r * y_stride + c * VEC) = sums[r][c];
        else
            memcpy(y + r * y_stride, sums[r], cols * sizeof(float));
}

/* y[rows, out] = x[rows, in] w^T, w as `pack_panels` left it. */
void multiply_panels(const float *x, const float *panels, float *y, int64_t rows, int64_t in,
                     int64_t out, int num_threads) {
    int64_t count = (out + PANEL_WIDTH - 1) / PANEL_WIDTH;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t i = 0; i < count; i++) {
        const float *panel = panels + i * PANEL_WIDTH * in;
        float *to = y + i * PANEL_WIDTH;
        int64_t cols = out - i * PANEL_WIDTH, r = 0;
        for (; r + PANEL_ROWS <= rows; r += PANEL_ROWS)
            multiply_tile(x + r * in, panel, to + r * out, out, in, PANEL_ROWS, cols, r == 0);
        for (; r + 4 <= rows; r += 4)
            multiply_tile(x + r * in, panel, to + r * out, out, in, 4, cols, r == 0);
        for (; r + 2 <= rows; r += 2)
            multiply_tile(x + r * in, panel, to + r * out, out, in, 2, cols, r == 0);
        if (r < rows) multiply_tile(x + r * in, panel, to + r * out, out, in, 1, cols, r == 0);
    }
}
