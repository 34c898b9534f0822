/* The most probable token of rows, without their logits. Called through screened_head.py.
 *
 * A sketch of the head, panels of 8 bits, is multiplied with rows that are rounded too: sums of
 * integers, up to four times as many at a time. What rounding can have changed is bounded, output by
 * output, so that few outputs can be the largest; their logits alone are computed, as panels.c
 * computes them, bit for bit. */
#include "common.h"
#include "kernels.h"
#include "panel_forms.h"
#include "shares.h"
#include "tiles.h"

#include <omp.h>

#if defined(__AVX2__) && defined(__F16C__)

#define QUAD 4       /* features of a word of a sketch */
#define ZERO 128     /* the number that stands for 0 in a sketch */
#define MOST_SIZE 1e30 /* of a row: beyond, sums may overflow; a sketch has no weight above 65504 */
#define MOST 1024    /* candidates of a row that a thread keeps */
#define EXACT_MOST (4 * TILE_WIDTH) /* candidates whose logits are computed */
#define UNDECIDED (-1)

#if defined(__AVX512VNNI__) && defined(__AVX512F__) || defined(__AVXVNNI__)
typedef int8_t number_t; /* of a rounded row */
#define GREATEST 127
#define PARTS 1          /* vectors that a vector of words is taken apart into */
#else
typedef int16_t number_t; /* the first and third of a quad first, then the second and fourth */
#define GREATEST 32767
#define PARTS 2
#endif
typedef int32_t part_t __attribute__((aligned(2), may_alias)); /* of a row's quad */
#define AGAIN_SHARE (PARTS == 1 ? 8 : 0) /* of so many blocks one is rounded again */
#define LINES 4 /* rows that share a pass over a panel */

/* Rows in whole numbers: [rows, places of BLOCK numbers]. A place is a block of features, or, behind all
 * blocks, what rounding left over of one of `again`: those where it was most. `scale` and
 * `offset`, what ZERO adds to the sum of a place, negated, are [rows, places]; `lost`, the squares that
 * rounding left over, is [rows, blocks]. A logit is at most `reach` times its output's norm, plus
 * `size` times its error in the sketch, away from the sum of numbers. */
typedef struct {
    number_t *numbers;
    float *scale, *reach, *size;
    double *lost;
    int32_t *offset;
    int64_t *again;
    int64_t rows, in, blocks, places;
} rounded_t;

/* What one thread knows of a row: outputs whose logits may be the largest, and a number that the
 * largest reaches at least. More candidates than MOST mean that there is no room. */
typedef struct {
    float floor;
    int32_t count;
    int32_t outputs[MOST];
    float most[MOST];
} best_t;

/* Round BLOCK numbers, of which `rest` then has what is left over; returns the sum of its squares. */
static double round_block(float *rest, int64_t row, int64_t place, const rounded_t *to) {
    int64_t index = row * to->places + place;
    number_t *numbers = to->numbers + index * BLOCK;
    float most = 0.0f;
    double lost = 0.0; /* in fp32 squares of small rows would vanish */
    int32_t sum = 0;
    for (int i = 0; i < BLOCK; i++) most = fabsf(rest[i]) > most ? fabsf(rest[i]) : most;
    float scale = most / GREATEST, inverse = scale > 0x1p-100f ? 1.0f / scale : 0.0f;
    for (int i = 0; i < BLOCK; i++) {
        float number = nearbyintf(rest[i] * inverse);
        numbers[PARTS == 1 ? i : i / QUAD * QUAD + (i % 2 * 2 + i / 2 % 2)] = (number_t)number;
        sum += (int32_t)number;
        rest[i] -= number * scale;
        lost += (double)rest[i] * rest[i];
    }
    to->scale[index] = scale;
    to->offset[index] = -ZERO * sum;
    return lost;
}

static void round_row(const float *x, int64_t row, const rounded_t *to) {
    for (int64_t block = 0; block < to->blocks; block++) {
        float rest[BLOCK];
        memcpy(rest, x + block * BLOCK, sizeof rest);
        to->lost[row * to->blocks + block] = round_block(rest, row, block, to);
    }
}

/* Choose the blocks that are rounded again; rows that are not finite have no say. */
static void choose_again(const rounded_t *to) {
    for (int64_t i = 0; i < to->places - to->blocks; i++) {
        double most = -1.0;
        for (int64_t block = 0; block < to->blocks; block++) {
            double lost = 0.0;
            for (int64_t r = 0; r < to->rows; r++) {
                double own = to->lost[r * to->blocks + block];
                lost += own == own ? own : 0.0;
            }
            for (int64_t j = 0; j < i; j++)
                if (to->again[j] == block) lost = -1.0;
            if (lost > most) most = lost, to->again[i] = block;
        }
    }
}

/* Round again what was left over, and say how far sums can be away. */
static void finish_row(const float *x, int64_t row, const rounded_t *to) {
    double *losts = to->lost + row * to->blocks;
    double lost = 0.0, size = 0.0;
    for (int64_t i = 0; i < to->places - to->blocks; i++) {
        int64_t block = to->again[i], index = row * to->places + block;
        const number_t *numbers = to->numbers + index * BLOCK;
        float rest[BLOCK];
        for (int k = 0; k < BLOCK; k++)
            rest[k] = x[block * BLOCK + k] - (float)numbers[k] * to->scale[index];
        losts[block] = round_block(rest, row, to->blocks + i, to);
    }
    for (int64_t block = 0; block < to->blocks; block++) lost += losts[block];
    for (int64_t k = 0; k < to->in; k++) size += (double)x[k] * x[k];
    /* Sums in fp32, here and of the exact logits, are at most `in` roundings away; and what is smaller
     * than fp32's normal numbers may be lost. */
    size = sqrt(size), lost = sqrt(lost);
    double reach = lost + 2.0 * (to->in + 64) * 0x1p-24 * size + to->in * 0x1p-120;
    to->size[row] = 1.001f * (float)(size + lost);
    to->reach[row] = size < MOST_SIZE ? 1.001f * (float)reach : NAN;
}

typedef struct {
    ints_t of[PARTS];
} weights_t;

INLINE weights_t take_apart(words_t words) {
#if PARTS == 1
    return (weights_t){{(ints_t)words}};
#else
    return (weights_t){{(ints_t)(words & 0x00ff00ff), (ints_t)(words >> 8 & 0x00ff00ff)}};
#endif
}

INLINE ints_t spread(const part_t *x) {
#if WIDE == 16
    return (ints_t)_mm512_set1_epi32(*x);
#else
    return (ints_t)_mm256_broadcast_ss((const float *)x); /* else GCC loads two at once and takes them apart */
#endif
}

/* sum[o] += the product of an output's quad with a row's. */
INLINE ints_t add_quad(ints_t sum, weights_t w, const number_t *quad) {
    const part_t *x = (const part_t *)quad;
#if PARTS == 1 && WIDE == 16
    return (ints_t)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w.of[0], (__m512i)spread(x));
#elif PARTS == 1
    return (ints_t)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w.of[0], (__m256i)spread(x));
#elif WIDE == 16
    sum += (ints_t)_mm512_madd_epi16((__m512i)w.of[0], (__m512i)spread(x));
    return sum + (ints_t)_mm512_madd_epi16((__m512i)w.of[1], (__m512i)spread(x + 1));
#else
    sum += (ints_t)_mm256_madd_epi16((__m256i)w.of[0], (__m256i)spread(x));
    return sum + (ints_t)_mm256_madd_epi16((__m256i)w.of[1], (__m256i)spread(x + 1));
#endif
}

/* y[lines, TILE_WIDTH] = rounded rows times one panel of the sketch; `lines` is a constant where this is
 * inlined. */
INLINE void multiply_lines(const rounded_t *x, int64_t row, const uint32_t *restrict panel,
                           float *restrict y, const int lines, ahead_t ahead) {
    wide_t sums[LINES][COLS];
    int64_t places = x->places, index = row * places;
    const number_t *numbers = x->numbers + index * BLOCK;
#pragma GCC unroll 4
    for (int r = 0; r < lines; r++)
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) sums[r][c] = (wide_t){0.0f};
    for (int64_t place = 0; place < places; place++, index++, numbers += BLOCK) {
        int64_t block = place < x->blocks ? place : x->again[place - x->blocks];
        const uint32_t *at = panel + block * words_of_block(GRID_8) * TILE_WIDTH;
        const uint16_t *steps = (const uint16_t *)at;
        ints_t dots[LINES][COLS];
        fetch_lot(&ahead);
        at += TILE_WIDTH;
#pragma GCC unroll 4
        for (int r = 0; r < lines; r++)
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++) dots[r][c] = (ints_t){0} + x->offset[index + r * places];
#pragma GCC unroll 8
        for (int k = 0; k < BLOCK; k += QUAD, at += TILE_WIDTH) {
            weights_t w[COLS];
#pragma GCC unroll 3
            for (int c = 0; c < COLS; c++) w[c] = take_apart(*(const words_t *)(at + c * WIDE));
#pragma GCC unroll 4
            for (int r = 0; r < lines; r++)
#pragma GCC unroll 3
                for (int c = 0; c < COLS; c++)
                    dots[r][c] = add_quad(dots[r][c], w[c], numbers + r * places * BLOCK + k);
        }
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) {
            wide_t step = wide_of_halves(steps + c * WIDE);
#pragma GCC unroll 4
            for (int r = 0; r < lines; r++)
                sums[r][c] += step * x->scale[index + r * places] *
                              __builtin_convertvector(dots[r][c], wide_t);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < lines; r++)
#pragma GCC unroll 3
        for (int c = 0; c < COLS; c++) *(wide_t *)(y + r * TILE_WIDTH + c * WIDE) = sums[r][c];
}

/* Forget candidates that the largest logit is above of. */
static void sift(best_t *best, float floor) {
    int32_t kept = 0;
    for (int32_t i = 0; i < best->count; i++)
        if (best->most[i] >= floor) {
            best->outputs[kept] = best->outputs[i];
            best->most[kept++] = best->most[i];
        }
    best->count = kept;
}

/* Take what a panel says of a row: y and its reach, [TILE_WIDTH]; the first `cols` are outputs. */
static void take_panel(best_t *best, const float *y, const float *reach, int64_t first,
                       int64_t cols) {
    ints_t hits = {0};
    for (int c = 0; c < COLS; c++)
        hits |= *(const wide_t *)(y + c * WIDE) + *(const wide_t *)(reach + c * WIDE) >= best->floor;
    int32_t any = 0;
    for (int i = 0; i < WIDE; i++) any |= hits[i];
    if (!any || best->count > MOST) return;
    for (int64_t c = 0; c < cols; c++)
        best->floor = y[c] - reach[c] > best->floor ? y[c] - reach[c] : best->floor;
    for (int64_t c = 0; c < cols; c++) {
        if (!(y[c] + reach[c] >= best->floor)) continue;
        if (best->count == MOST) sift(best, best->floor);
        if (best->count == MOST) {
            best->count = MOST + 1;
            return;
        }
        best->outputs[best->count] = (int32_t)(first + c);
        best->most[best->count++] = y[c] + reach[c];
    }
}

/* One thread's pass over a panel of the sketch with all rows. */
static void take_all_rows(const head_t *head, int64_t panel, const rounded_t *x, best_t *best) {
    int64_t rows = x->rows, words = words_of_panel(x->in, GRID_8), first = panel * TILE_WIDTH;
    int64_t left = head->exact.out - first, cols = left < TILE_WIDTH ? left : TILE_WIDTH;
    int64_t tiles = (rows + LINES - 1) / LINES;
    int64_t lines = (words / LINE + tiles * x->places - 1) / (tiles * x->places);
    const uint32_t *at = (const uint32_t *)head->sketch.panels + panel * words;
    const float *norms = head->norms + first, *errors = head->errors + first;
    float y[LINES * TILE_WIDTH], reach[TILE_WIDTH];
    for (int64_t row = 0; row < rows; row += LINES) {
        int64_t count = rows - row < LINES ? rows - row : LINES;
        const float *next = (const float *)at + words + row / LINES * x->places * lines * LINE;
        ahead_t ahead = {next, lines};
#define LINES_CASE(n)                                   \
    case n:                                             \
        multiply_lines(x, row, at, y, n, ahead);        \
        break;
        switch (count) {
            LINES_CASE(1)
            LINES_CASE(2)
            LINES_CASE(3)
            LINES_CASE(4)
        }
#undef LINES_CASE
        for (int64_t r = 0; r < count; r++) {
            for (int64_t c = 0; c < TILE_WIDTH; c++)
                reach[c] = x->reach[row + r] * norms[c] + x->size[row + r] * errors[c];
            take_panel(best + row + r, y + r * TILE_WIDTH, reach, first, cols);
        }
    }
}

/* One output's weights, to[k * TILE_WIDTH]. */
static void weights_of(const matrix_t *w, int64_t output, float *to) {
    int64_t in = w->in, form = w->form, bits = bits_of(form), c = output % TILE_WIDTH;
    const uint32_t *at =
        (const uint32_t *)w->panels + output / TILE_WIDTH * words_of_panel(in, form);
    if (form == FP32) {
        for (int64_t k = 0; k < in; k++) to[k * TILE_WIDTH] = ((const float *)at)[k * TILE_WIDTH + c];
        return;
    }
    for (int64_t block = 0; block < in / BLOCK; block++) {
        float step = 0.0f, base = 0.0f;
        if (bits < 16) {
            step = _cvtsh_ss(((const uint16_t *)at)[c]);
            base = _cvtsh_ss(((const uint16_t *)at)[TILE_WIDTH + c]);
            at += TILE_WIDTH;
        }
        for (int64_t word = 0; word < bits; word++, at += TILE_WIDTH) {
            uint32_t numbers = at[c];
            for (int64_t i = 0; i < 32 / bits; i++, numbers >>= bits, to += TILE_WIDTH) {
                union { uint32_t i; float f; } wide = {.i = numbers << 16};
                if (form == FP16) *to = _cvtsh_ss(((const uint16_t *)at)[i * TILE_WIDTH + c]);
                else if (form == BF16) *to = wide.f;
                else *to = fmaf((float)(numbers & ((1u << bits) - 1)), step, base);
            }
        }
    }
}

/* The candidate with the largest logit, the first of equal ones; UNDECIDED where there are too many. `room` is
 * [in, TILE_WIDTH]. */
static int64_t decide(const head_t *head, const float *x, best_t *bests, int64_t row, int64_t rows,
                      int threads, float *room) {
    const matrix_t *w = &head->exact;
    float floor = -INFINITY, largest = -INFINITY;
    int64_t found = UNDECIDED, total = 0;
    for (int t = 0; t < threads; t++) {
        const best_t *best = bests + t * rows + row;
        if (best->count > MOST) return UNDECIDED;
        floor = best->floor > floor ? best->floor : floor;
    }
    for (int t = 0; t < threads; t++) {
        sift(bests + t * rows + row, floor);
        total += bests[t * rows + row].count;
    }
    if (total > EXACT_MOST) return UNDECIDED;
    for (int t = 0; t < threads; t++) {
        const best_t *best = bests + t * rows + row;
        for (int32_t i = 0; i < best->count; i += TILE_WIDTH) {
            int64_t left = best->count - i, count = left < TILE_WIDTH ? left : TILE_WIDTH;
            float logits[TILE_WIDTH];
            target_t to = {logits, TILE_WIDTH, count, 0, {{NULL}}};
            for (int64_t c = 0; c < count; c++) weights_of(w, best->outputs[i + c], room + c);
            multiply_rows(x, w->in, room, w->in, 1, &to, NOTHING, NOTHING);
            for (int64_t c = 0; c < count; c++)
                if (logits[c] > largest) {
                    largest = logits[c];
                    found = best->outputs[i + c];
                }
        }
    }
    return found;
}

/* The next `count` of `size` bytes of room, on a cache line of their own. */
static void *take(char **at, int64_t count, int64_t size) {
    char *taken = *at;
    *at += (count * size + 63) / 64 * 64;
    return taken;
}

/* Divide room; returns where it ends. */
static char *divide(char *at, rounded_t *x, float **panels, best_t **bests, int threads) {
    int64_t places = x->rows * x->places;
    x->numbers = take(&at, places * BLOCK, sizeof(number_t));
    x->scale = take(&at, places, sizeof(float));
    x->offset = take(&at, places, sizeof(int32_t));
    x->lost = take(&at, x->rows * x->blocks, sizeof(double));
    x->reach = take(&at, x->rows, sizeof(float));
    x->size = take(&at, x->rows, sizeof(float));
    x->again = take(&at, x->places - x->blocks, sizeof(int64_t));
    *panels = take(&at, threads * x->in * TILE_WIDTH, sizeof(float));
    *bests = take(&at, threads * x->rows, sizeof(best_t));
    return at;
}

/* tokens[rows] = the most probable token of each row of x, [rows, in]; UNDECIDED where too many may be,
 * or where a row is not finite. Returns 0, or 1 when there is no memory. */
int argmax_rows(const head_t *head, const float *x, int64_t rows, int64_t *tokens, int num_threads) {
    int64_t in = head->exact.in, out = head->exact.out, blocks = in / BLOCK;
    int64_t again = AGAIN_SHARE ? (blocks + AGAIN_SHARE - 1) / AGAIN_SHARE : 0;
    rounded_t rounded = {.rows = rows, .in = in, .blocks = blocks, .places = blocks + again};
    float *panels;
    best_t *bests;
    if (!rows) return 0;
    char *room = malloc(divide(NULL, &rounded, &panels, &bests, num_threads) - (char *)NULL);
    if (!room) return 1;
    divide(room, &rounded, &panels, &bests, num_threads);
    share_t shares[num_threads];
    share_out(shares, (out + TILE_WIDTH - 1) / TILE_WIDTH, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        best_t *own = bests + thread * rows;
        for (int64_t r = 0; r < rows; r++) own[r].count = 0, own[r].floor = -INFINITY;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) round_row(x + r * in, r, &rounded);
#pragma omp single
        choose_again(&rounded);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) finish_row(x + r * in, r, &rounded);
        for (int64_t i, direction; (i = next_item(shares, num_threads, &direction)) >= 0;)
            take_all_rows(head, i, &rounded, own);
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < rows; r++)
            tokens[r] = decide(head, x + r * in, bests, r, rows, threads,
                               panels + thread * in * TILE_WIDTH);
    }
    free(room);
    return 0;
}

int can_argmax(void) { return 1; }
#else
int argmax_rows(const head_t *head, const float *x, int64_t rows, int64_t *tokens, int num_threads) {
    return 1;
}

int can_argmax(void) { return 0; }
#endif
