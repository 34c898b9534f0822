"""What a factor cache counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FactorCacheStats:
    """Counters since the start, and sizes now.

    hits                   leases on factors that were there when they were first asked for
    misses                 flights that were started
    evictions              entries dropped to make room
    failures               flights that ended in an error
    dropped_prefetches     rebuilt for a prefetch, but without room
    over_budget            insertions after which held entries exceeded the budget
    rebuild_seconds        sum over `num_rebuilds`, without loading
    load_seconds           sum over `num_loads` of compact forms
    """

    hits: int
    misses: int
    evictions: int
    failures: int
    dropped_prefetches: int
    over_budget: int
    num_rebuilds: int
    rebuild_seconds: float
    num_loads: int
    load_seconds: float
    num_adapters: int
    num_leases: int
    used_bytes: int
    budget_bytes: int
    num_compact: int
    compact_bytes: int
    bank_bytes: int


@dataclass
class Counters:
    """What only grows; see FactorCacheStats."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failures: int = 0
    dropped_prefetches: int = 0
    over_budget: int = 0
    num_rebuilds: int = 0
    rebuild_seconds: float = 0.0
    num_loads: int = 0
    load_seconds: float = 0.0
