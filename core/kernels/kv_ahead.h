/* Keys and values of a layer's decodes, fetched by the products before it, which leave the memory idle: into
 * the second cache, and from there, as more comes, into the third.
 */
#pragma once

#include "common.h"

#include <omp.h>

#define KV_LINES 2 /* cache lines of them in a lot */

/* Where a thread is among the pages of its rows, `end` of them: a row's keys, then its values. */
typedef struct {
    int64_t row, end, page, floats;
} __attribute__((aligned(64))) kv_place_t;

/* What is to come: rows as `decode_attention` has them, and a place for each thread. */
typedef struct {
    const float *keys, *values;
    const int64_t *pages, *lengths;
    int64_t max_pages, page_size, kv_width;
    kv_place_t *places;
} kv_ahead_t;

/* Each thread fetches what it will attend to first. */
static inline void begin_kv(const kv_ahead_t *kv, int64_t rows, int num_threads) {
    for (int64_t t = 0; t < num_threads; t++)
        kv->places[t] = (kv_place_t){rows * t / num_threads, rows * (t + 1) / num_threads, 0, 0};
}

/* This thread's next at most `floats`, which lie together; returns how many, 0 at the end. */
static inline int64_t next_kv(const kv_ahead_t *kv, int64_t floats, const float **from) {
    kv_place_t *place = &kv->places[omp_get_thread_num()];
    if (place->row == place->end) return 0;
    const int64_t *pages = kv->pages + place->row * kv->max_pages;
    int64_t number = (kv->lengths[place->row] + kv->page_size - 1) / kv->page_size;
    int64_t page_floats = kv->page_size * kv->kv_width, is_value = place->page >= number;
    int64_t page = pages[place->page - (is_value ? number : 0)];
    *from = (is_value ? kv->values : kv->keys) + page * page_floats + place->floats;
    place->floats += floats;
    if (place->floats < page_floats) return floats;
    floats -= place->floats - page_floats;
    place->floats = 0;
    if (++place->page == 2 * number) place->page = 0, place->row++;
    return floats;
}
