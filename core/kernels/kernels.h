/* What the files offer each other. All matrices are row-major. */
#pragma once

#include "kv_ahead.h"

#include <stdint.h>

/* How a panel has its weights: in fp32, or as packed.h says in fewer bits. */
enum { FP32, FP16, BF16, GRID_8, GRID_4 };

/* A frozen matrix [out, in], packed. `terms` is 0 for panels that are multiplied in fp32, else how
 * many terms of 8 bits an int8 matrix rounds its inputs to; `scales` is int8's. `half` is half of
 * `out` where no panel has outputs of both halves, else `out`. `form` is how a panel has its
 * weights. `shared` says that the next layer multiplies with it again. */
typedef struct {
    const void *panels, *scales;
    int64_t in, out, half, terms, form, shared;
} matrix_t;

/* A head and how to find its largest outputs: `sketch`, nearly the same matrix on a grid of 8 bits whose
 * bases are -128 steps, the norms of its outputs' weights and those of what the sketch changes in
 * them, [out], zeros up to whole panels. The sketch may be the head itself. */
typedef struct {
    matrix_t exact, sketch;
    const float *norms, *errors;
} head_t;

/* One module's factors: a is [rank, in], b is [rank, out]; rank 0 leaves the module alone. Where there
 * is a gain, [out], what the base gives is multiplied with it first. */
typedef struct {
    const float *a, *b;
    int64_t rank;
    double scale;
    const float *gain;
} pair_t;

/* Rows start..end-1 belong to the adapter whose pairs begin at `pairs`. */
typedef struct {
    int64_t start, end;
    const pair_t *pairs;
} segment_t;

/* What the base itself adds to the product with one matrix, for every row: pairs of the matrix's
 * projections, of which `outs` has the outputs. x a^T times the scale stands in `inner`, [rows,
 * inner_stride], a row's projections behind each other. */
typedef struct {
    const pair_t *pairs;
    const int64_t *outs;
    int64_t num_projections, inner_stride;
    float *inner;
} increments_t;

/* What adapters add to the product with one matrix. Its outputs are those of `num_projections`
 * projections, `outs` of each; `first` is the first one's place in every adapter's pairs.
 * `segment_of` names each row's segment, -1 for the base's. x a^T times the scale stands in
 * `inner`, [rows, inner_stride], a row's projections behind each other. */
typedef struct {
    const segment_t *segments;
    const int64_t *segment_of, *outs;
    int64_t num_segments, num_projections, first, inner_stride;
    float *inner;
} low_rank_t;

/* Rows start..end-1 are consecutive tokens of one sequence, `before` tokens of it come first. */
typedef struct {
    int64_t start, end, before;
} span_t;

/* y[rows, out] = x[rows, in] w^T, plus `incs` and what adapters add, where those are given. Where `kv` is
 * given, some of it is fetched meanwhile. Returns 0, or 1 when there is no memory. */
int multiply(const matrix_t *w, const float *x, float *y, int64_t rows, const increments_t *incs,
             const low_rank_t *adds, const kv_ahead_t *kv, int num_threads);

/* y[rows, out / 2] = silu(gate) * up of both halves of what `multiply` gives; `both` [rows, out] is
 * room. */
int multiply_gated(const matrix_t *w, const float *x, float *both, float *y, int64_t rows,
                   const increments_t *incs, const low_rank_t *adds, const kv_ahead_t *kv,
                   int num_threads);

void multiply_panels(const matrix_t *w, const float *x, float *y, int64_t rows,
                     const increments_t *incs, const low_rank_t *adds, const kv_ahead_t *kv,
                     int num_threads);
void multiply_panels_gated(const matrix_t *w, const float *x, float *both, float *y, int64_t rows,
                           const increments_t *incs, const low_rank_t *adds, const kv_ahead_t *kv,
                           int num_threads);
int multiply_int8(const matrix_t *w, const float *x, float *y, int64_t rows, int num_threads);
int argmax_rows(const head_t *head, const float *x, int64_t rows, int64_t *tokens, int num_threads);
int can_argmax(void);
void add_increments(const increments_t *incs, const float *x, float *y, int64_t rows, int64_t in,
                    int64_t out, int num_threads);
void add_low_rank(const low_rank_t *adds, const float *x, float *y, int64_t rows, int64_t in,
                  int64_t out, int num_threads);

void rms_norm(float *x, const float *delta, const float *weight, float *out, int64_t rows,
              int64_t width, float eps, int num_threads);
void silu_mul(const float *x, float *out, int64_t rows, int64_t width, int num_threads);
void rotate_and_store(float *qkv, const float *cosines, const float *sines, const int64_t *slots,
                      float *keys, float *values, int64_t rows, int64_t num_heads,
                      int64_t num_kv_heads, int64_t dim, int num_threads);
int decode_attention(const float *query, int64_t query_stride, const float *keys,
                     const float *values, const int64_t *pages, const int64_t *lengths, float *out,
                     int64_t rows, int64_t max_pages, int64_t page_size, int64_t num_heads,
                     int64_t num_kv_heads, int64_t dim, int num_threads);
int prompt_attention(const float *query, int64_t query_stride, const float *keys,
                     const float *values, const int64_t *pages, const span_t *spans, float *out,
                     int64_t num_spans, int64_t max_pages, int64_t page_size, int64_t num_heads,
                     int64_t num_kv_heads, int64_t dim, int num_threads);
