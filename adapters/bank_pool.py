"""One vector bank in memory per content, however many adapters use it.

A bank lives as long as some compact form refers to it. Knows nothing of files or adapters.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class Bank:
    """A vector bank (h, b) in the dtype of its file, never written to after construction.

    `digest` (hex sha256) covers dtype, shape and values; equal banks have equal digests.
    """

    __slots__ = ("__weakref__", "digest", "vectors_HB")

    def __init__(self, vectors_HB: Tensor, digest: str | None = None) -> None:
        self.vectors_HB = vectors_HB
        self.digest = digest or tensor_digest("bank", {"vectors": vectors_HB})

    @property
    def num_bytes(self) -> int:
        """Size of the bank's values."""
        return self.vectors_HB.nbytes


class BankPool:
    """Banks by digest, held weakly. Safe to call from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._banks: weakref.WeakValueDictionary[str, Bank] = weakref.WeakValueDictionary()

    def intern(self, bank: Bank) -> Bank:
        """The pool's bank of this content: `bank` itself if the pool had none."""
        with self._lock:
            return self._banks.setdefault(bank.digest, bank)

    def get(self, digest: str, load: Callable[[], Bank]) -> Bank:
        """The bank of `digest`, from `load` where the pool has none (two may load at once)."""
        with self._lock:
            bank = self._banks.get(digest)
        return bank if bank is not None else self.intern(load())

    @property
    def num_bytes(self) -> int:
        """Size of all banks that are in memory now."""
        with self._lock:
            return sum(bank.num_bytes for bank in self._banks.values())


def tensor_digest(header: str, tensors: dict[str, Tensor]) -> str:
    """Hex sha256 over `header` and each tensor's name, dtype, shape and little-endian values."""
    digest = hashlib.sha256(f"vbserve-1\0{header}\0".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a CPU tensor as bytes, without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
