/* All decoder layers of a Llama for the rows of one step: one call, no way back to Python between. */
#include "common.h"
#include "kernels.h"

#define NUM_PROJECTIONS 7

/* One layer: its norms and its matrices in the order of the forward. Where `increments` is given,
 * it has a pair for each projection, rank 0 where there is none. */
typedef struct {
    const float *input_norm, *post_attention_norm;
    matrix_t qkv, o, gate_up, down;
    const pair_t *increments;
} layer_t;

/* What does not change from step to step. `outs` are the outputs of the projections in their
 * order; keys of layer l begin at keys + l * kv_stride, its values likewise. The projections of one
 * matrix have at most `most_ranks` ranks of increments. */
typedef struct {
    const layer_t *layers;
    const float *last_norm;
    float *keys, *values;
    int64_t kv_stride, page_size, num_layers, num_heads, num_kv_heads, head_dim;
    int64_t most_ranks;
    int64_t outs[NUM_PROJECTIONS];
    double eps;
} model_t;

/* One step. x is [rows, hidden] and is used up. Decodes are rows 0..num_decodes-1, prompts the rows
 * of the spans. Without segments no row has an adapter. out is [num_wanted, hidden], of the rows
 * that `wanted` names in ascending order. */
typedef struct {
    float *x, *out, *workspace;
    const float *cosines, *sines;
    const int64_t *slots, *decode_pages, *decode_lengths, *prompt_pages;
    const span_t *spans;
    const segment_t *segments;
    const int64_t *wanted;
    int64_t rows, num_decodes, decode_max_pages, num_spans, prompt_max_pages;
    int64_t num_segments, inner_stride, num_wanted;
} step_t;

enum { QKV, OUT, GATE_UP, DOWN };
static const int64_t first_projection[] = {0, 3, 4, 6, NUM_PROJECTIONS};

int multiply(const matrix_t *w, const float *x, float *y, int64_t rows, const increments_t *incs,
             const low_rank_t *adds, const kv_ahead_t *kv, int num_threads) {
    if (w->terms == 0) {
        multiply_panels(w, x, y, rows, incs, adds, kv, num_threads);
        return 0;
    }
    if (multiply_int8(w, x, y, rows, num_threads)) return 1;
    if (incs) add_increments(incs, x, y, rows, w->in, w->out, num_threads);
    if (adds) add_low_rank(adds, x, y, rows, w->in, w->out, num_threads);
    return 0;
}

int multiply_gated(const matrix_t *w, const float *x, float *both, float *y, int64_t rows,
                   const increments_t *incs, const low_rank_t *adds, const kv_ahead_t *kv,
                   int num_threads) {
    if (w->terms == 0) {
        multiply_panels_gated(w, x, both, y, rows, incs, adds, kv, num_threads);
        return 0;
    }
    int failed = multiply(w, x, both, rows, incs, adds, kv, num_threads);
    silu_mul(both, y, rows, w->half, num_threads);
    return failed;
}

typedef struct {
    float *normed, *wide, *mixed, *delta, *inner, *own_inner;
    segment_t *segments;
    int64_t *segment_of;
} room_t;

static int64_t wider(int64_t a, int64_t b) { return a > b ? a : b; }

/* The next `count` floats of the workspace, on a cache line of their own. */
static float *take(float **at, int64_t count) {
    float *taken = *at;
    *at += (count + LINE - 1) / LINE * LINE;
    return taken;
}

/* Divide the workspace; returns how many floats it must have. */
static int64_t divide(const model_t *m, const step_t *s, room_t *room) {
    const layer_t *layer = m->layers;
    float *at = s->workspace;
    int64_t rows = s->rows;
    room->segments = (segment_t *)take(&at, s->num_segments * sizeof(segment_t) / sizeof(float));
    room->segment_of = (int64_t *)take(&at, rows * 2);
    room->normed = take(&at, rows * layer->qkv.in);
    room->wide = take(&at, rows * wider(layer->qkv.out, layer->gate_up.out));
    room->mixed = take(&at, rows * wider(layer->o.in, layer->down.in));
    room->delta = take(&at, rows * layer->o.out);
    room->inner = take(&at, rows * s->inner_stride);
    room->own_inner = take(&at, rows * m->most_ranks);
    return at - s->workspace;
}

int64_t workspace_floats(const model_t *m, const step_t *s) {
    room_t room;
    return divide(m, s, &room);
}

static void name_segments(const room_t *room, int64_t num_segments, int64_t rows) {
    for (int64_t t = 0; t < rows; t++) room->segment_of[t] = -1;
    for (int64_t i = 0; i < num_segments; i++)
        for (int64_t t = room->segments[i].start; t < room->segments[i].end; t++)
            room->segment_of[t] = i;
}

/* Let only the wanted rows of x and mixed go on, behind each other. */
static void keep_wanted(const step_t *s, const room_t *room, int64_t hidden, int64_t width) {
    for (int64_t i = 0; i < s->num_wanted; i++) {
        memmove(s->x + i * hidden, s->x + s->wanted[i] * hidden, hidden * sizeof(float));
        memmove(room->mixed + i * width, room->mixed + s->wanted[i] * width, width * sizeof(float));
    }
    for (int64_t i = 0, before = 0; i < s->num_segments; i++) {
        segment_t *segment = &room->segments[i];
        while (before < s->num_wanted && s->wanted[before] < segment->start) before++;
        segment->start = before;
        while (before < s->num_wanted && s->wanted[before] < segment->end) before++;
        segment->end = before;
    }
    name_segments(room, s->num_segments, s->num_wanted);
}

#define FEW_DECODES 2 /* so few rows' products wait for memory themselves */

/* Begin to fetch what the decodes of `layer` will attend to; NULL where that is not worth it. */
static const kv_ahead_t *begin_kv_of(const model_t *m, const step_t *s, int64_t layer, kv_ahead_t *kv,
                                     int num_threads) {
    if (layer == m->num_layers || s->num_decodes <= FEW_DECODES) return NULL;
    kv->keys = m->keys + layer * m->kv_stride, kv->values = m->values + layer * m->kv_stride;
    begin_kv(kv, s->num_decodes, num_threads);
    return kv;
}

static int attend_all(const model_t *m, const step_t *s, const float *query, int64_t layer,
                      int64_t stride, float *out, int num_threads) {
    const float *keys = m->keys + layer * m->kv_stride, *values = m->values + layer * m->kv_stride;
    int failed = 0;
    if (s->num_decodes)
        failed |= decode_attention(query, stride, keys, values, s->decode_pages, s->decode_lengths,
                                   out, s->num_decodes, s->decode_max_pages, m->page_size,
                                   m->num_heads, m->num_kv_heads, m->head_dim, num_threads);
    if (s->num_spans)
        failed |= prompt_attention(query, stride, keys, values, s->prompt_pages, s->spans, out,
                                   s->num_spans, s->prompt_max_pages, m->page_size, m->num_heads,
                                   m->num_kv_heads, m->head_dim, num_threads);
    return failed;
}

/* Writes keys and values of the rows, then out. Returns 0, or 1 when there is no memory. */
int run_layers(const model_t *m, const step_t *s, int num_threads) {
    room_t room;
    divide(m, s, &room);
    int64_t rows = s->rows, hidden = m->layers->qkv.in;
    float *normed = room.normed, *wide = room.wide, *mixed = room.mixed, *delta = room.delta;
    float eps = (float)m->eps;
    int failed = 0;
    kv_place_t places[num_threads];
    kv_ahead_t room_of_kv = {.pages = s->decode_pages, .lengths = s->decode_lengths,
                             .max_pages = s->decode_max_pages, .page_size = m->page_size,
                             .kv_width = m->num_kv_heads * m->head_dim, .places = places};
    const kv_ahead_t *kv = NULL;
    if (s->num_segments)
        memcpy(room.segments, s->segments, s->num_segments * sizeof(segment_t));
    name_segments(&room, s->num_segments, rows);
    rms_norm(s->x, NULL, m->layers->input_norm, normed, rows, hidden, eps, num_threads);
    for (int64_t l = 0; l < m->num_layers; l++) {
        const layer_t *layer = &m->layers[l];
        int is_last = l + 1 == m->num_layers;
        low_rank_t adds[4], *add[4];
        increments_t incs[4], *inc[4];
        for (int i = 0; i < 4; i++) {
            int64_t first = first_projection[i], count = first_projection[i + 1] - first;
            adds[i] = (low_rank_t){room.segments, room.segment_of, m->outs + first, s->num_segments,
                                   count, l * NUM_PROJECTIONS + first, s->inner_stride, room.inner};
            add[i] = s->num_segments ? &adds[i] : NULL;
            incs[i] = (increments_t){layer->increments + first, m->outs + first, count,
                                     m->most_ranks, room.own_inner};
            inc[i] = layer->increments ? &incs[i] : NULL;
        }
        failed |= multiply(&layer->qkv, normed, wide, rows, inc[QKV], add[QKV], kv, num_threads);
        rotate_and_store(wide, s->cosines, s->sines, s->slots, m->keys + l * m->kv_stride,
                         m->values + l * m->kv_stride, rows, m->num_heads, m->num_kv_heads,
                         m->head_dim, num_threads);
        failed |= attend_all(m, s, wide, l, layer->qkv.out, mixed, num_threads);
        if (is_last) {
            rows = s->num_wanted;
            keep_wanted(s, &room, hidden, layer->o.in);
        }
        failed |= multiply(&layer->o, mixed, delta, rows, inc[OUT], add[OUT], NULL,
                           num_threads);
        rms_norm(s->x, delta, layer->post_attention_norm, normed, rows, hidden, eps, num_threads);
        kv = begin_kv_of(m, s, l + 1, &room_of_kv, num_threads);
        failed |= multiply_gated(&layer->gate_up, normed, wide, mixed, rows, inc[GATE_UP],
                                 add[GATE_UP], kv, num_threads);
        failed |= multiply(&layer->down, mixed, delta, rows, inc[DOWN], add[DOWN], kv,
                           num_threads);
        rms_norm(s->x, delta, is_last ? m->last_norm : layer[1].input_norm,
                 is_last ? s->out : normed, rows, hidden, eps, num_threads);
    }
    return failed;
}
