/* What adapters add: products with their low-rank factors, read where the leases hold them. */
#include "low_rank.h"
#include "low_rank_blocks.h"

static const pair_t *pairs_of(const low_rank_t *adds, int64_t row) {
    return adds->segments[adds->segment_of[row]].pairs + adds->first;
}

void shrink_tiles(const low_rank_t *adds, const float *x, int64_t rows, int64_t in) {
    int64_t tiles = rows / TILE_ROWS;
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t start = tile * TILE_ROWS;
        if (!fills_tile(adds, start, TILE_ROWS)) continue;
        const pair_t *pair = pairs_of(adds, start);
        float *inner = adds->inner + start * adds->inner_stride;
        for (int64_t j = 0; j < adds->num_projections; inner += pair->rank, j++, pair++)
            for (int64_t t = 0; t < TILE_ROWS; t += ROWS)
                shrink(x + (start + t) * in, in, pair, inner + t * adds->inner_stride,
                       adds->inner_stride, ROWS);
    }
}

int add_segment(const low_rank_t *adds, int64_t row, int64_t column, target_t *to) {
    return add_pair(pairs_of(adds, row), adds->outs,
                    adds->inner + row * adds->inner_stride, adds->inner_stride, column, to);
}

void expand_tile(const low_rank_t *adds, int64_t row, int64_t column, int64_t width, float *y,
                 int64_t y_stride) {
    expand_columns(pairs_of(adds, row), adds->outs,
                   adds->inner + row * adds->inner_stride, adds->inner_stride, column, width, y,
                   y_stride, TILE_ROWS);
}

int64_t list_lone_rows(const low_rank_t *adds, int64_t rows, int32_t *lone) {
    int64_t number = 0;
    for (int64_t tile = 0; tile < rows; tile += TILE_ROWS) {
        int64_t end = tile + TILE_ROWS < rows ? tile + TILE_ROWS : rows;
        if (fills_tile(adds, tile, end - tile)) continue;
        for (int64_t row = tile; row < end; row++)
            if (adds->segment_of[row] >= 0) lone[number++] = (int32_t)row;
    }
    return number;
}

/* y += scale * (x a^T) b for one row, rank by rank, as tiles have it; `ranks` is a constant where this is
 * inlined. */
INLINE void add_row(const float *restrict x, float *restrict y, const float *restrict a,
                    const float *restrict b, float scale, int64_t in, int64_t out,
                    const int ranks) {
    float inner[RANKS];
    int64_t o = 0;
    shrink_block(x, in, a, scale, inner, RANKS, 1, ranks);
    for (; o + WIDE <= out; o += WIDE) {
        wide_t sum = *(const wide_t *)(y + o);
#pragma GCC unroll 4
        for (int r = 0; r < ranks; r++) {
            sum += inner[r] * *(const wide_t *)(b + r * out + o);
            KEPT(sum);
        }
        *(wide_t *)(y + o) = sum;
    }
    for (int r = 0; r < ranks; r++)
        for (int64_t i = o; i < out; i++) y[i] += inner[r] * b[r * out + i];
}

void add_lone_row(const low_rank_t *adds, int64_t row, const float *x, float *y, int64_t in) {
    const pair_t *pair = pairs_of(adds, row);
    for (int64_t j = 0; j < adds->num_projections; y += adds->outs[j++], pair++) {
        int64_t r = 0, out = adds->outs[j];
        float scale = (float)pair->scale;
        if (pair->gain)
            for (int64_t o = 0; o < out; o++) y[o] *= pair->gain[o];
        for (; r + RANKS <= pair->rank; r += RANKS)
            add_row(x, y, pair->a + r * in, pair->b + r * out, scale, in, out, RANKS);
        for (; r < pair->rank; r++)
            add_row(x, y, pair->a + r * in, pair->b + r * out, scale, in, out, 1);
    }
}

int64_t begin_coming(coming_t *coming, const low_rank_t *adds, const int32_t *lone, int64_t number,
                     int64_t in) {
    int64_t floats = 0;
    for (int64_t i = 0; i < number; i++)
        for (int64_t j = 0; j < adds->num_projections; j++)
            floats += pairs_of(adds, lone[i])[j].rank * (in + adds->outs[j]);
    *coming = (coming_t){.adds = adds, .lone = lone, .number = number, .in = in};
    return floats;
}

/* Pieces are the a of all projections, then their b; what lies together is one run. */
static int next_run(coming_t *coming) {
    const low_rank_t *adds = coming->adds;
    int64_t n = adds->num_projections;
    for (coming->at = coming->end = NULL; coming->number;) {
        const pair_t *pair = pairs_of(adds, *coming->lone);
        int64_t j = coming->piece % n, is_b = coming->piece >= n;
        const float *from = is_b ? pair[j].b : pair[j].a;
        int64_t floats = pair[j].rank * (is_b ? adds->outs[j] : coming->in);
        if (coming->at && floats && from != coming->end) return 1;
        if (floats) {
            if (!coming->at) coming->at = from;
            coming->end = from + floats;
        }
        if (++coming->piece == 2 * n) {
            coming->piece = 0, coming->lone++, coming->number--;
            if (coming->at) return 1;
        }
    }
    return 0;
}

int64_t next_coming(coming_t *coming, int64_t floats, const float **from) {
    if (coming->at == coming->end && !next_run(coming)) return 0;
    int64_t left = coming->end - coming->at;
    *from = coming->at;
    if (floats > left) floats = left;
    coming->at += floats;
    return floats;
}

/* Add everything to y[rows, out], after the product. */
void add_low_rank(const low_rank_t *adds, const float *x, float *y, int64_t rows, int64_t in,
                  int64_t out, int num_threads) {
    int64_t count = (out + TILE_WIDTH - 1) / TILE_WIDTH, tiles = rows / TILE_ROWS;
    int32_t lone[rows + 1];
    int64_t num_lone = list_lone_rows(adds, rows, lone);
#pragma omp parallel num_threads(num_threads)
    {
        shrink_tiles(adds, x, rows, in);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count * tiles; i++) {
            int64_t column = i / tiles * TILE_WIDTH, row = i % tiles * TILE_ROWS;
            int64_t left = out - column;
            if (fills_tile(adds, row, TILE_ROWS))
                expand_tile(adds, row, column, left < TILE_WIDTH ? left : TILE_WIDTH,
                            y + row * out + column, out);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_lone; i++)
            add_lone_row(adds, lone[i], x + lone[i] * in, y + lone[i] * out, in);
    }
}
