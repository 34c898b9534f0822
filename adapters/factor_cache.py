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
from concurrent.futures import Executor

import torch

from adapters.background_threads import single_core_pool
from adapters.compact import CompactAdapter
from adapters.compact_cache import CompactCache
from adapters.factor_cache_stats import Counters, FactorCacheStats
from adapters.factor_entries import NO_CLAIM, FactorEntries, FactorEntry
from adapters.rebuild import rebuild_factors
from core.errors import AdapterUnavailableError
from core.factors import AdapterFactors

_MAX_FLIGHTS = 1024
_MAX_FAILURES = 1024
_MAX_TIMINGS = 4096

logger = logging.getLogger(__name__)


class _Lease:
    """One lease; see core.factors.FactorLease."""

    def __init__(self, cache: FactorCache, entry: FactorEntry) -> None:
        self._cache = cache
        self._entry: FactorEntry | None = entry

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
    executor              runs the flights instead of `num_threads` threads; `close` shuts it down
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
        executor: Executor | None = None,
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
        self._executor = executor or single_core_pool(num_threads, "factor-cache")
        self._lock = threading.Lock()  # guards all below; held for dictionary work only
        self._closed = False
        self._entries = FactorEntries(budget_bytes)
        self._flights: dict[str, bool] = {}  # digest → whether try_acquire asked for it
        self._failures: OrderedDict[str, str] = OrderedDict()  # to be raised once
        self._compacts = CompactCache(compact_budget_bytes)
        self._counters = Counters()
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
            leased = self._entries.lease(digest)
            if leased is not None:
                entry, hit = leased
                self._counters.hits += hit
                return _Lease(self, entry)
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
            return self._entries.evict(digest)

    @property
    def stats(self) -> FactorCacheStats:
        """Counters and sizes, of one moment."""
        with self._lock:
            return FactorCacheStats(
                **vars(self._counters),
                num_adapters=len(self._entries),
                num_leases=self._entries.num_leases,
                used_bytes=self._entries.used_bytes,
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
        self._executor.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._flights.clear()

    def check_integrity(self) -> None:
        """Assert what must hold between any two calls."""
        with self._lock:
            self._entries.check_integrity()
            for digest in (*self._flights, *self._failures):
                assert digest not in self._entries, "there, yet loading or failed"
            assert len(self._failures) <= _MAX_FAILURES and len(self._flights) <= _MAX_FLIGHTS
            self._compacts.check_integrity()

    # the rest is called with the lock held, or on a background thread

    def _release(self, entry: FactorEntry) -> None:
        with self._lock:
            self._entries.release(entry)
            self._make_room(0)

    def _start_flight(self, digest: str, *, claim: bool) -> None:
        if digest in self._flights:
            self._flights[digest] |= claim
        elif not self._closed and len(self._flights) < _MAX_FLIGHTS:
            self._flights[digest] = claim
            self._failures.pop(digest, None)
            self._counters.misses += 1
            self._executor.submit(self._fly, digest)

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
            claimed_until = self._clock() + self._claim_seconds if wanted else NO_CLAIM
            self._entries.insert(factors, claimed_until)

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
        self._counters.evictions += self._entries.make_room(num_bytes, self._clock())
        return self._entries.has_room(num_bytes)
