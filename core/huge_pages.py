"""Memory of the CPU in huge pages, where the system grants them on request.

What is read from end to end in every step spans tens of thousands of pages of 4 KiB, and each costs
a walk through the page tables (in a virtual machine through two). Knows nothing of what is kept.
"""

from __future__ import annotations

import math
import mmap
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

HUGE_PAGE = 2 * 1024**2
_LINE = 64  # bytes of a cache line


def empty(num_bytes: int) -> Tensor:
    """`num_bytes` zeros of uint8 that begin a huge page; they take no memory until touched.

    The tail beyond the last whole huge page lies in usual ones, so nothing is wasted. Raises
    OSError when there is no room for them.
    """
    if num_bytes < HUGE_PAGE:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    room = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(room, dtype=torch.uint8)  # keeps `room` until the last view is gone
    start = -whole.data_ptr() % HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            room.madvise(mmap.MADV_HUGEPAGE, start, num_bytes)
    return whole[start : start + num_bytes]


def write_zeros(room: Tensor, num_threads: int) -> None:
    """Zero a vector of uint8; two threads take half as long where the system has to find memory.

    The threads end with the call; torch's own would stay (`loading._load_weights`).
    """
    parts = np.array_split(room.numpy(), num_threads)
    with ThreadPoolExecutor(num_threads, "write-zeros") as threads:
        list(threads.map(lambda part: part.fill(0), parts))  # raises what a thread has raised


class Arena:
    """Hands out pieces of large blocks, for what is kept about as long as all of it.

    A block is freed when the last piece of it is. Not for several threads at once.
    """

    def __init__(self, block_bytes: int = 64 * 1024**2) -> None:
        self._block_bytes = block_bytes
        self._left = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor on a cache line of its own, not to be read before it is written."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > len(self._left):
            self._left = empty(max(num_bytes, self._block_bytes))
        piece, self._left = self._left[:num_bytes], self._left[-(-num_bytes // _LINE) * _LINE :]
        return piece.view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """`tensor` in a piece of its own."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)
