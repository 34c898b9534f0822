/* Products with a frozen matrix that was packed in panels once. */
#include "common.h"
#include "digits.h"
#include "exponential.h"
#include "low_rank.h"
#include "packed.h"
#include "shares.h"
#include "tiles.h"

#include <omp.h>

#define FACTOR_LINES 4 /* cache lines of factors in a lot */

static int64_t panels_for(int64_t outs) { return (outs + TILE_WIDTH - 1) / TILE_WIDTH; }

static int64_t num_panels(int64_t half, int64_t out) {
    return panels_for(half) + panels_for(out - half);
}

/* The outputs of a panel. */
typedef struct {
    int64_t start, width;
} columns_t;

/* The panels of two halves stand in turns, as they are passed over. */
static columns_t columns_of(int64_t panel, int64_t half, int64_t out) {
    int halves = half < out ? 2 : 1;
    int64_t start = panel / halves * TILE_WIDTH, left = half - start;
    return (columns_t){panel % halves * half + start, left < TILE_WIDTH ? left : TILE_WIDTH};
}

/* Whether rows are multiplied in digits where they can be. */
int has_digits(void) { return HAS_DIGITS; }

/* Words of 32 bits that packing takes. */
int64_t packed_words(int64_t in, int64_t half, int64_t out, int64_t form) {
    return num_panels(half, out) * words_of_panel(in, form);
}

/* w is [out, in]; panels is [number, in, TILE_WIDTH], zeros beyond a panel's outputs. */
void pack_panels(const float *w, float *panels, int64_t in, int64_t half, int64_t out,
                 int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t i = 0; i < num_panels(half, out); i++) {
        columns_t columns = columns_of(i, half, out);
        for (int64_t c = 0; c < TILE_WIDTH; c++) {
            const float *from = w + (columns.start + c) * in;
            float *to = panels + i * TILE_WIDTH * in + c;
            for (int64_t k = 0; k < in; k++)
                to[k * TILE_WIDTH] = c < columns.width ? from[k] : 0.0f;
        }
    }
}

/* Panels as packed.h has them, zeros beyond a panel's outputs. `numbers` is [out, in], the
 * bits of bf16 or fp16 or a grid's numbers; `steps` and `bases` are a grid's, [out, in / BLOCK]. */
void pack_words(const uint16_t *numbers, const uint16_t *steps, const uint16_t *bases,
                uint32_t *panels, int64_t in, int64_t half, int64_t out, int64_t form,
                int num_threads) {
    int64_t blocks = in / BLOCK, bits = bits_of(form), in_word = 32 / bits;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t i = 0; i < num_panels(half, out); i++) {
        columns_t columns = columns_of(i, half, out);
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t c = 0; c < TILE_WIDTH; c++) {
                int64_t row = columns.start + c, is_used = c < columns.width;
                uint32_t *to = panels + i * words_of_panel(in, form) +
                               b * words_of_block(form) * TILE_WIDTH;
                if (bits < 16) {
                    ((uint16_t *)to)[c] = is_used ? steps[row * blocks + b] : 0;
                    ((uint16_t *)to)[TILE_WIDTH + c] = is_used ? bases[row * blocks + b] : 0;
                    to += TILE_WIDTH;
                }
                for (int64_t k = 0; k < BLOCK; k += in_word, to += TILE_WIDTH) {
                    const uint16_t *from = numbers + row * in + b * BLOCK + k;
                    if (form == FP16) {
                        ((uint16_t *)to)[c] = is_used ? from[0] : 0;
                        ((uint16_t *)to)[TILE_WIDTH + c] = is_used ? from[1] : 0;
                        continue;
                    }
                    to[c] = 0;
                    for (int64_t j = 0; is_used && j < in_word; j++)
                        to[c] |= (uint32_t)from[j] << (j * bits);
                }
            }
    }
}

static int any_fills_tile(const low_rank_t *adds, int64_t rows) {
    for (int64_t r = 0; r + TILE_ROWS <= rows; r += TILE_ROWS)
        if (fills_tile(adds, r, TILE_ROWS)) return 1;
    return 0;
}

static int has_lone_row(const low_rank_t *adds, int64_t row, int64_t rows) {
    if (!adds || fills_tile(adds, row, rows)) return 0;
    for (int64_t r = row; r < row + rows; r++)
        if (adds->segment_of[r] >= 0) return 1;
    return 0;
}

/* One thread's way through a product: all passes over a panel, then the next panel.
 *
 * A panel is read from memory once and then used from the cache for all rows. With one pass over it
 * its own next features are fetched ahead; with several, each pass fetches its share of the next
 * panel, so that memory is read all the time and not only in first passes. What increments and
 * adapters add to a tile goes there while it is in the cache; the last passes fetch the factors of lone rows, those
 * before them keys and values. Where there are several, a packed panel is widened into `widened` by the first,
 * or before it; where rows are in digits, it is unpacked there. */
typedef struct {
    const matrix_t *w;
    const float *x;
    const increments_t *incs;
    const low_rank_t *adds;
    const kv_ahead_t *kv;
    int64_t rows, passes, halves, lots, lines, direction, panel_words, panel_room;
    int is_kept; /* a panel, widened or unpacked */
    float *widened;
    int in_digits;
    digits_t digits;
    coming_t coming;
    int64_t floats_left, passes_left;
} sweep_t;

/* The lone rows of a product, in the order in which threads take them. */
typedef struct {
    const int32_t *rows;
    int64_t number;
    share_t *shares;
} lone_t;

/* The next one for this thread, its own share first; -1 when there is none. */
static int64_t next_lone_row(const lone_t *lone, int num_threads) {
    int64_t direction, i = next_item(lone->shares, num_threads, &direction);
    return i < 0 ? i : lone->rows[i];
}

/* Room for `floats` that stays the thread's; NULL when there is no memory. */
static float *room_of_thread(int64_t floats) {
    static _Thread_local float *room;
    static _Thread_local int64_t size;
    if (size < floats) {
        free(room);
        room = aligned_alloc(64, floats * sizeof(float));
        size = room ? floats : 0;
    }
    return room;
}

/* Whether one tile has all rows: threads split them each for itself, and unpack a block at a time. */
static int is_one_tile(int64_t rows) { return rows <= DIGIT_ROWS; }

/* Room for rows in digits, which the thread that begins a product keeps; NULL where there is none or
 * they are multiplied in fp32. */
static float *room_for_digits(const matrix_t *w, int64_t rows, int num_threads) {
    static _Thread_local float *room;
    static _Thread_local int64_t size;
    if (!HAS_DIGITS || w->form != GRID_4) return NULL;
    int64_t floats = floats_of_digits(rows, w->in) * (is_one_tile(rows) ? num_threads : 1);
    if (size < floats) {
        free(room);
        room = aligned_alloc(64, floats * sizeof(float));
        size = room ? floats : 0;
    }
    return room;
}

/* The rows in digits; the threads of the region share the work and wait for each other. */
static digits_t split_rows(const float *x, int64_t rows, int64_t in, float *room) {
    if (is_one_tile(rows)) {
        float *own = room + omp_get_thread_num() * floats_of_digits(rows, in);
        digits_t digits = digits_in(own, rows, in);
        for (int64_t r = 0; r < rows; r++) split_row(x + r * in, r, &digits);
        return digits;
    }
    digits_t digits = digits_in(room, rows, in);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) split_row(x + r * in, r, &digits);
    return digits;
}

/* Begin, in all threads of a region; `room` is what `room_for_digits` gave. */
static sweep_t begin_sweep(const matrix_t *w, const float *x, int64_t rows,
                           const increments_t *incs, const low_rank_t *adds, const lone_t *lone,
                           const kv_ahead_t *kv, float *room) {
    int64_t passes = (rows + TILE_ROWS - 1) / TILE_ROWS, threads = omp_get_num_threads();
    sweep_t s = {w, x, incs, adds, .rows = rows, .passes = passes};
    s.kv = w->form ? kv : NULL; /* panels of fp32 need the memory themselves */
    s.lots = (w->in + TILE_STEP - 1) / TILE_STEP;
    s.halves = w->half < w->out ? 2 : 1;
    s.panel_words = words_of_panel(w->in, w->form);
    s.is_kept = room ? !is_one_tile(rows) : widens(w->form, rows);
    s.lines = passes ? (s.panel_words / LINE + s.lots * passes - 1) / (s.lots * passes) : 0;
    s.panel_room = room ? (s.is_kept ? w->in / BLOCK + 1 : 2) * UNPACKED_WORDS : TILE_WIDTH * w->in;
    if (room || s.is_kept) s.widened = room_of_thread(s.halves * s.panel_room);
    if (room) s.digits = split_rows(x, rows, w->in, room);
    s.in_digits = room && s.widened;
    if (lone->number) {
        int64_t own = omp_get_thread_num(), first = lone->number * own / threads;
        s.floats_left = begin_coming(&s.coming, adds, lone->rows + first,
                                     lone->number * (own + 1) / threads - first, w->in);
    }
    s.passes_left = (num_panels(w->half, w->out) + threads - 1) / threads * passes;
    if (incs) shrink_all(incs, x, rows, w->in);
    if (adds && any_fills_tile(adds, rows)) shrink_tiles(adds, x, rows, w->in);
    return s;
}

/* Where the tile of a pass begins. What is left over from whole tiles comes first where it is to widen
 * the panel. */
static int64_t row_of_pass(const sweep_t *s, int64_t pass) {
    if (!WIDENS_APART || !s->widened) return pass * TILE_ROWS;
    return (pass ? pass - 1 : s->passes - 1) * TILE_ROWS;
}

static int64_t rows_of_tile(const sweep_t *s, int64_t row) {
    return s->rows - row < TILE_ROWS ? s->rows - row : TILE_ROWS;
}

/* Pass number `pass` over a panel; `y` is where its columns of the tile's first row begin. */
static void pass_over(sweep_t *s, int64_t panel, int64_t pass, float *y, int64_t y_stride) {
    int64_t in = s->w->in, lots = s->lots, r = row_of_pass(s, pass), rows = rows_of_tile(s, r);
    int64_t room = lots * FACTOR_LINES * LINE; /* floats of factors that a pass can fetch */
    const float *at = (const float *)s->w->panels + panel * s->panel_words;
    /* The thread's next panel, or what comes next of this one. */
    int64_t distance = s->passes > 1 || s->is_kept ? s->direction * s->panel_words * s->halves
                                                   : TILE_WIDTH * FEATURES_AHEAD;
    int64_t fetched = pass * lots * s->lines * LINE;
    columns_t columns = columns_of(panel, s->w->half, s->w->out);
    ahead_t panels = {at + distance + fetched, fetched < s->panel_words ? s->lines : 0};
    ahead_t others = NOTHING;
    int64_t floats = 0;
    if (s->floats_left && s->passes_left-- * room < s->floats_left + 2 * room) {
        floats = next_coming(&s->coming, room, &others.at);
        s->floats_left -= floats;
    } else if (s->kv)
        floats = next_kv(s->kv, lots * KV_LINES * LINE, &others.at);
    others.lines = (floats + lots * LINE - 1) / (lots * LINE);
    float *widened = s->widened ? s->widened + panel % s->halves * s->panel_room : NULL;
    const float *x = s->x + r * in;
    target_t to = {y, y_stride, columns.width, 0, {{NULL}}};
    int late_incs = s->incs && add_all_rows(s->incs, r, columns.start, &to);
    int late_adds = s->adds && fills_tile(s->adds, r, rows) &&
                    add_segment(s->adds, r, columns.start, &to);
    int widens_apart = widened && !s->in_digits && pass == 0 && rows > FUSED_ROWS;
    if (widens_apart) widen_panel((const uint32_t *)at, in, s->w->form, widened);
    if (s->in_digits) {
        int64_t tiles = rows > DIGIT_ROWS ? 2 : 1, lots_in_block = BLOCK / TILE_STEP;
        panels.lines = is_one_tile(s->rows) ? 0 : (panels.lines * lots_in_block + tiles - 1) / tiles;
        others.lines = (others.lines * lots_in_block + tiles - 1) / tiles;
        multiply_digits(&s->digits, r, pass ? NULL : (const uint32_t *)at, widened,
                        !is_one_tile(s->rows), rows, &to, panels, others);
    } else if (widened && (pass > 0 || widens_apart))
        multiply_rows(x, in, widened, in, rows, &to, panels, others);
    else if (s->w->form) {
        /* One pass alone fetches what comes next of the panel itself. */
        panels.lines *= s->passes > 1 ? BLOCK / TILE_STEP : 0;
        others.lines *= BLOCK / TILE_STEP;
        multiply_packed(x, in, (const uint32_t *)at, in, rows, &to, s->w->form, widened, panels,
                        others);
    } else if (s->passes == 1 && rows <= STREAM_ROWS && s->w->shared)
        stream_rows(x, in, at, in, rows, &to, others, AGAIN);
    else if (s->passes == 1 && rows <= STREAM_ROWS)
        stream_rows(x, in, at, in, rows, &to, others, ONCE);
    else
        multiply_rows(x, in, at, in, rows, &to, panels, others);
    if (late_incs) expand_rows(s->incs, r, rows, columns.start, columns.width, y, y_stride);
    if (late_adds) expand_tile(s->adds, r, columns.start, columns.width, y, y_stride);
}

void multiply_panels(const matrix_t *w, const float *x, float *y, int64_t rows,
                     const increments_t *incs, const low_rank_t *adds, const kv_ahead_t *kv,
                     int num_threads) {
    int64_t in = w->in, out = w->out;
    float *room = room_for_digits(w, rows, num_threads);
    share_t shares[num_threads], lone_shares[num_threads];
    int32_t lone_rows[rows + 1];
    lone_t lone = {lone_rows, adds ? list_lone_rows(adds, rows, lone_rows) : 0, lone_shares};
    share_out(shares, num_panels(w->half, out), num_threads);
    share_out(lone_shares, lone.number, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        sweep_t sweep = begin_sweep(w, x, rows, incs, adds, &lone, kv, room);
        for (int64_t i; (i = next_item(shares, num_threads, &sweep.direction)) >= 0;)
            for (int64_t p = 0; p < sweep.passes; p++)
                pass_over(&sweep, i, p,
                          y + row_of_pass(&sweep, p) * out + columns_of(i, w->half, out).start, out);
        if (lone.number) {
#pragma omp barrier
            for (int64_t row; (row = next_lone_row(&lone, num_threads)) >= 0;)
                add_lone_row(adds, row, x + row * in, y + row * out, in);
        }
    }
}

/* y[rows, width] = silu(gate) * up, of which each is [rows, TILE_WIDTH]. */
static void activate_tile(const float *gate, const float *up, float *y, int64_t y_stride,
                          int64_t rows, int64_t width) {
    for (; rows > 0; rows--, gate += TILE_WIDTH, up += TILE_WIDTH, y += y_stride)
        if (width == TILE_WIDTH) silu_row(gate, up, y, TILE_WIDTH);
        else silu_row(gate, up, y, width);
}

/* Both halves of a tile are activated while they are in the cache; lone rows, which lack something
 * then, when they have it. */
void multiply_panels_gated(const matrix_t *w, const float *x, float *both, float *y, int64_t rows,
                           const increments_t *incs, const low_rank_t *adds, const kv_ahead_t *kv,
                           int num_threads) {
    int64_t in = w->in, out = w->out, half = w->half, first = panels_for(half);
    float *room = room_for_digits(w, rows, num_threads);
    share_t shares[num_threads], lone_shares[num_threads];
    int32_t lone_rows[rows + 1];
    lone_t lone = {lone_rows, adds ? list_lone_rows(adds, rows, lone_rows) : 0, lone_shares};
    share_out(shares, first, num_threads);
    share_out(lone_shares, lone.number, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        sweep_t sweep = begin_sweep(w, x, rows, incs, adds, &lone, kv, room);
        float gate[TILE_ROWS * TILE_WIDTH], up[TILE_ROWS * TILE_WIDTH];
        for (int64_t i; (i = next_item(shares, num_threads, &sweep.direction)) >= 0;) {
            columns_t columns = columns_of(2 * i, half, out);
            for (int64_t p = 0; p < sweep.passes; p++) {
                int64_t r = row_of_pass(&sweep, p), tile = rows_of_tile(&sweep, r);
                float *to = both + r * out + columns.start;
                if (has_lone_row(adds, r, tile)) {
                    pass_over(&sweep, 2 * i, p, to, out);
                    pass_over(&sweep, 2 * i + 1, p, to + half, out);
                    for (int64_t t = 0; t < tile; t++)
                        if (adds->segment_of[r + t] < 0)
                            silu_row(to + t * out, to + t * out + half,
                                     y + (r + t) * half + columns.start, columns.width);
                    continue;
                }
                pass_over(&sweep, 2 * i, p, gate, TILE_WIDTH);
                pass_over(&sweep, 2 * i + 1, p, up, TILE_WIDTH);
                activate_tile(gate, up, y + r * half + columns.start, half, tile, columns.width);
            }
        }
        if (lone.number) {
#pragma omp barrier
            for (int64_t row; (row = next_lone_row(&lone, num_threads)) >= 0;) {
                float *to = both + row * out;
                add_lone_row(adds, row, x + row * in, to, in);
                silu_row(to, to + half, y + row * half, half);
            }
        }
    }
}
