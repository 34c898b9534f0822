"""A thread pool whose torch operations use one core each, so that they do not stall the engine."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_lock = threading.Lock()


def single_core_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """A pool of `num_threads` threads, each limited to one intra-op thread of torch.

    Other threads, also those started later, keep the number that torch has when a thread of the
    pool starts.
    """

    def start() -> None:
        # torch keeps the number per thread, but also notes the last one set for threads that have
        # not asked yet: so set it and ask, then let a passing thread note the usual one again
        with _lock:
            usual = torch.get_num_threads()
            torch.set_num_threads(1)
            torch.get_num_threads()
            passing = threading.Thread(target=torch.set_num_threads, args=(usual,))
            passing.start()
            passing.join()

    return ThreadPoolExecutor(num_threads, thread_name_prefix=name, initializer=start)
