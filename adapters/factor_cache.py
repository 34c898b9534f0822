"""`FactorCache`: factors by digest under a byte budget, rebuilt in the background; a FactorSource.

    ask (prefetch, try_acquire) → one flight per digest on a background thread:
    compact form (from memory or `load`) → rebuild → entry → lease … release → idle → evicted

Least recently used goes first. An entry is held while it is leased, and for `claim_seconds` after
its rebuild while the one who asked for it by `try_acquire` has not come back for it: else two cold
adapters could evict each other for ever. Held entries alone may exceed the budget; a mere prefetch
that finds no room is dropped, and its compact form stays.

Knows nothing of names, stores or what an engine does with factors.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapters.background_threads import single_core_pool
from adapters.compact import CompactAdapter
from adapters.compact_cache import CompactCache
from adapters.rebuild import rebuild_factors
from core.errors import AdapterUnavailableError
from core.factors import AdapterFactors

_MAX_FLIGHTS = 1024
_MAX_FAILURES = 1024
_MAX_TIMINGS = 4096

logger = logging.getLogger(__name__)


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
class _Entry:
    """Factors that are there."""

    factors: AdapterFactors
    claimed_until: float  # on the cache's clock; minus infinity when nobody waits
    fresh: bool = True  # not leased yet: its first lease is the miss that brought it
    num_leases: int = 0


@dataclass
class _Counters:
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


class _Lease:
    """One lease; see core.factors.FactorLease."""

    def __init__(self, cache: FactorCache, entry: _Entry) -> None:
        self._cache = cache
        self._entry: _Entry | None = entry

    @property
    def factors(self) -> AdapterFactors:
        if self._entry is None:
            raise RuntimeError("this lease has been released")
        return self._entry.factors

    def release(self) -> None:
        entry, self._entry = self._entry, None
        if entry is None:
            raise RuntimeError("this lease has been released before")
        self._cache._release(entry)


class FactorCache:
    """See the module. Every method may be called from any thread and returns without waiting for
    loads; `close` alone waits for the flights that are under way.

    load                  digest → compact form; called on a background thread
    budget_bytes          for factors
    compact_budget_bytes  for compact forms kept in memory, banks counted once
    num_threads           flights at a time
    on_ready              called on a background thread after each flight, whatever its outcome
    """

    def __init__(
        self,
        load: Callable[[str], CompactAdapter],
        *,
        budget_bytes: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        num_threads: int = 1,
        compact_budget_bytes: int = 256 * 1024**2,
        on_ready: Callable[[], None] | None = None,
        claim_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("budget_bytes", budget_bytes), ("num_threads", num_threads)):
            if value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        self.budget_bytes = budget_bytes
        self._load = load
        self._device = device
        self._dtype = dtype
        self._on_ready = on_ready
        self._claim_seconds = claim_seconds
        self._clock = clock
        self._pool = single_core_pool(num_threads, "factor-cache")
        self._lock = threading.Lock()  # guards all below; held for dictionary work only
        self._closed = False
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._flights: dict[str, bool] = {}  # digest → whether try_acquire asked for it
        self._failures: OrderedDict[str, str] = OrderedDict()  # to be raised once
        self._compacts = CompactCache(compact_budget_bytes)
        self._used_bytes = 0
        self._counters = _Counters()
        self._timings: deque[float] = deque(maxlen=_MAX_TIMINGS)

    def prefetch(self, digest: str) -> None:
        """Start loading unless loaded, loading or closed. Never raises."""
        with self._lock:
            if digest not in self._entries:
                self._start_flight(digest, claim=False)

    def try_acquire(self, digest: str) -> _Lease | None:
        """A lease, or None while the factors are being loaded (starts a load).

        Raises AdapterUnavailableError when the last load failed; asking again tries again.
        """
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None:
                return self._lease(digest, entry)
            failure = self._failures.pop(digest, None)
            if failure is None and not self._closed:
                self._start_flight(digest, claim=True)
                return None
        raise AdapterUnavailableError(failure or f"adapter {digest}: the factor cache is closed")

    def set_on_ready(self, on_ready: Callable[[], None] | None) -> None:
        """Replace `on_ready`: for an engine that is built after its factor source."""
        self._on_ready = on_ready

    def evict(self, digest: str) -> bool:
        """Drop the factors and compact form of a digest, unless leased; whether factors went."""
        with self._lock:
            self._compacts.drop(digest)
            entry = self._entries.get(digest)
            if entry is None or entry.num_leases:
                return False
            self._drop(digest)
            return True

    @property
    def stats(self) -> FactorCacheStats:
        """Counters and sizes, of one moment."""
        with self._lock:
            return FactorCacheStats(
                **vars(self._counters),
                num_adapters=len(self._entries),
                num_leases=sum(entry.num_leases for entry in self._entries.values()),
                used_bytes=self._used_bytes,
                budget_bytes=self.budget_bytes,
                num_compact=len(self._compacts),
                compact_bytes=self._compacts.adapter_bytes,
                bank_bytes=self._compacts.bank_bytes,
            )

    def take_rebuild_seconds(self) -> list[float]:
        """The durations of the rebuilds since the last call (the latest 4096), for a histogram."""
        with self._lock:
            timings = list(self._timings)
            self._timings.clear()
            return timings

    def close(self) -> None:
        """Give up waiting flights, wait for those under way. Leases stay valid."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._flights.clear()

    def check_integrity(self) -> None:
        """Assert what must hold between any two calls."""
        with self._lock:
            entries = self._entries
            assert self._used_bytes == sum(e.factors.num_bytes for e in entries.values())
            assert all(entry.num_leases >= 0 for entry in entries.values())
            assert not (entries.keys() & self._flights.keys()), "loading what is there"
            assert not (entries.keys() & self._failures.keys()), "failed, yet there"
            assert len(self._failures) <= _MAX_FAILURES and len(self._flights) <= _MAX_FLIGHTS
            fresh_leased = [e for e in entries.values() if e.fresh and e.num_leases]
            assert not fresh_leased
            unclaimed = [e for e in entries.values() if not e.num_leases and not _is_claim(e)]
            assert self._used_bytes <= self.budget_bytes or not unclaimed
            self._compacts.check_integrity()

    # the rest is called with the lock held, or on a background thread

    def _lease(self, digest: str, entry: _Entry) -> _Lease:
        self._counters.hits += not entry.fresh
        entry.fresh = False
        entry.claimed_until = _NO_CLAIM
        entry.num_leases += 1
        self._entries.move_to_end(digest)
        return _Lease(self, entry)

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            assert entry.num_leases > 0
            entry.num_leases -= 1
            self._make_room(0)

    def _start_flight(self, digest: str, *, claim: bool) -> None:
        if digest in self._flights:
            self._flights[digest] |= claim
        elif not self._closed and len(self._flights) < _MAX_FLIGHTS:
            self._flights[digest] = claim
            self._failures.pop(digest, None)
            self._counters.misses += 1
            self._pool.submit(self._fly, digest)

    def _fly(self, digest: str) -> None:
        """One flight, on a background thread."""
        try:
            adapter = self._compact_form(digest)
            start = time.perf_counter()
            factors = rebuild_factors(adapter, device=self._device, dtype=self._dtype)
            seconds = time.perf_counter() - start
        except Exception as error:  # any failure ends this flight alone and is told to who asks
            self._land_failure(digest, f"adapter {digest}: {error}")
        else:
            self._land(digest, factors, seconds)
        self._notify()

    def _compact_form(self, digest: str) -> CompactAdapter:
        with self._lock:
            adapter = self._compacts.get(digest)
        if adapter is not None:
            return adapter
        start = time.perf_counter()
        adapter = self._load(digest)
        seconds = time.perf_counter() - start
        with self._lock:
            self._compacts.put(digest, adapter)
            self._counters.num_loads += 1
            self._counters.load_seconds += seconds
        return adapter

    def _land(self, digest: str, factors: AdapterFactors, seconds: float) -> None:
        with self._lock:
            wanted = self._flights.pop(digest, False)
            self._counters.num_rebuilds += 1
            self._counters.rebuild_seconds += seconds
            self._timings.append(seconds)
            has_room = self._make_room(factors.num_bytes)
            if not has_room and not wanted:
                self._counters.dropped_prefetches += 1
                return
            self._counters.over_budget += not has_room
            claimed_until = self._clock() + self._claim_seconds if wanted else _NO_CLAIM
            self._entries[digest] = _Entry(factors, claimed_until)
            self._used_bytes += factors.num_bytes

    def _land_failure(self, digest: str, message: str) -> None:
        logger.warning("%s", message)
        with self._lock:
            self._flights.pop(digest, None)
            self._counters.failures += 1
            self._failures[digest] = message
            while len(self._failures) > _MAX_FAILURES:
                self._failures.popitem(last=False)

    def _notify(self) -> None:
        try:
            if self._on_ready is not None:
                self._on_ready()
        except Exception:
            logger.exception("on_ready failed")

    def _make_room(self, num_bytes: int) -> bool:
        """Evict idle entries, least recently used first, until `num_bytes` fit; whether they do."""
        now = self._clock()
        for digest, entry in list(self._entries.items()):
            if self._used_bytes + num_bytes <= self.budget_bytes:
                break
            if not entry.num_leases and entry.claimed_until <= now:
                self._drop(digest)
                self._counters.evictions += 1
        return self._used_bytes + num_bytes <= self.budget_bytes

    def _drop(self, digest: str) -> None:
        self._used_bytes -= self._entries.pop(digest).factors.num_bytes


_NO_CLAIM = float("-inf")


def _is_claim(entry: _Entry) -> bool:
    return entry.claimed_until > _NO_CLAIM
