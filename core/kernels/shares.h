/* A loop's items, dealt to threads that help each other: a core that something else uses for a while
 * delays a loop by half of that.
 */
#pragma once

#include "common.h"

#include <omp.h>

/* What a thread still has: it takes its first, threads that have none left take its last. Both ends lie
 * in one word. */
typedef struct {
    uint64_t first_and_end;
} __attribute__((aligned(64))) share_t;

/* Before the threads begin. */
static void share_out(share_t *shares, int64_t items, int num_threads) {
    for (int64_t t = 0; t < num_threads; t++)
        shares[t].first_and_end = (uint64_t)(items * t / num_threads) << 32 |
                                  (uint64_t)(items * (t + 1) / num_threads);
}

static int64_t take_item(share_t *share, int is_first) {
    uint64_t seen = __atomic_load_n(&share->first_and_end, __ATOMIC_RELAXED), left;
    int64_t item;
    do {
        int64_t first = seen >> 32, end = seen & UINT32_MAX;
        if (first >= end) return -1;
        item = is_first ? first : end - 1;
        left = is_first ? seen + (1ull << 32) : seen - 1;
    } while (!__atomic_compare_exchange_n(&share->first_and_end, &seen, left, 0, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    return item;
}

/* This thread's next item, -1 when there is none; `direction`, 1 or -1, says where the one after it is. */
static int64_t next_item(share_t *shares, int num_threads, int64_t *direction) {
    int own = omp_get_thread_num();
    int64_t item = take_item(&shares[own], 1);
    *direction = 1;
    for (int i = 1; i < num_threads && item < 0; i++) {
        item = take_item(&shares[(own + i) % num_threads], 0);
        *direction = -1;
    }
    return item;
}
