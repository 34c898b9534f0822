"""Random factors in memory, and a source of them whose loads last and fail as a test wants."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from core.errors import AdapterUnavailableError
from core.factors import PROJECTIONS, AdapterFactors, LowRankPair, ModuleKey
from core.model_config import ModelConfig


def random_factors(
    config: ModelConfig,
    digest: str,
    *,
    rank: int | Mapping[str, int] = 4,
    projections: Sequence[str] = PROJECTIONS,
    layers: Sequence[int] | None = None,
    scale: float = 1.0,
    std: float = 0.15,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    gained: Sequence[str] = (),
) -> AdapterFactors:
    """Random factors; `rank` is one for all modules or one per projection.

    Of the projections those in `gained` have gains, between -0.5 and 2.5.
    """
    generator = torch.Generator().manual_seed(seed * 7919 + sum(digest.encode()))
    pairs, gains = {}, {}
    for layer in range(config.num_layers) if layers is None else layers:
        for name in projections:
            num_out, num_in = config.projection_shape(name)
            own_rank = rank if isinstance(rank, int) else rank[name]
            a_RI = torch.randn(own_rank, num_in, generator=generator) * std
            b_RO = torch.randn(own_rank, num_out, generator=generator) * std
            pairs[ModuleKey(layer, name)] = LowRankPair(a_RI.to(dtype), b_RO.to(dtype), scale)
            if name in gained:
                gain_O = 3 * torch.rand(num_out, generator=generator) - 0.5
                gains[ModuleKey(layer, name)] = gain_O.to(dtype)
    num_bytes = sum(pair.a_RI.nbytes + pair.b_RO.nbytes for pair in pairs.values())
    num_bytes += sum(gain_O.nbytes for gain_O in gains.values())
    return AdapterFactors(digest, pairs, num_bytes, gains)


@dataclass
class MemoryLease:
    """Counts itself at its source; a second release is an error, as the protocol says."""

    source: MemoryFactorSource
    factors: AdapterFactors
    released: bool = False

    def release(self) -> None:
        assert not self.released, f"the lease on {self.factors.digest} is released twice"
        self.released = True
        self.source.num_leases[self.factors.digest] -= 1


@dataclass
class MemoryFactorSource:
    """A FactorSource over factors in memory, whose loads last and fail as a test wants.

    polls_left   times that `try_acquire` of a digest still answers "not yet"
    failures     digests whose next `try_acquire` raises, and the message (kept until removed)
    """

    known: dict[str, AdapterFactors] = field(default_factory=dict)
    polls_left: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    num_leases: Counter[str] = field(default_factory=Counter)
    prefetched: list[str] = field(default_factory=list)
    num_acquire_calls: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, *factors: AdapterFactors) -> MemoryFactorSource:
        return cls({each.digest: each for each in factors})

    @property
    def num_open_leases(self) -> int:
        assert min(self.num_leases.values(), default=0) >= 0
        return self.num_leases.total()

    def hold(self, digest: str) -> None:
        """Keep `digest` loading until `let_go`."""
        with self._lock:
            self.polls_left[digest] = 10**9

    def let_go(self, digest: str) -> None:
        """Its factors are there from now on."""
        with self._lock:
            self.polls_left[digest] = 0

    def prefetch(self, digest: str) -> None:
        self.prefetched.append(digest)

    def try_acquire(self, digest: str) -> MemoryLease | None:
        with self._lock:
            self.num_acquire_calls += 1
            if self.polls_left[digest] > 0:
                self.polls_left[digest] -= 1
                return None
            if digest in self.failures or digest not in self.known:
                raise AdapterUnavailableError(self.failures.get(digest, f"no adapter {digest}"))
            self.num_leases[digest] += 1
            return MemoryLease(self, self.known[digest])
