"""FactorCache: leases, budget, single flight, failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fake_store import FACTOR_BYTES, FakeStore

from adapters import (
    FactorCache,
    read_peft_adapter,
)
from adapters.background_threads import single_core_pool
from adapters.compact_cache import CompactCache
from core.errors import AdapterUnavailableError
from core.factors import FactorLease, FactorSource, ModuleKey
from core.model_config import BaseInfo


@pytest.fixture
def fake(base: BaseInfo) -> FakeStore:
    return FakeStore(base.config, 6)


@contextmanager
def cache_of(fake: FakeStore, num_fitting: int = 3, **settings: object) -> Iterator[FactorCache]:
    cache = FactorCache(fake.load, budget_bytes=num_fitting * FACTOR_BYTES, **settings)  # type: ignore[arg-type]
    try:
        yield cache
        cache.check_integrity()
    finally:
        fake.gate.set()
        cache.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.0005)


def acquire(cache: FactorCache, digest: str) -> FactorLease:
    leases: list[FactorLease] = []

    def arrived() -> bool:
        lease = cache.try_acquire(digest)
        if lease is not None:
            leases.append(lease)
        return bool(leases)

    wait_for(arrived)
    return leases[0]


def flights_landed(cache: FactorCache, number: int) -> Callable[[], bool]:
    return lambda: cache.stats.num_rebuilds + cache.stats.failures >= number


def test_it_is_a_factor_source(fake: FakeStore) -> None:
    with cache_of(fake) as cache:
        source: FactorSource = cache
        assert source.try_acquire(fake.digests[2]) is None
        lease = acquire(cache, fake.digests[2])
        pair = lease.factors.pairs[ModuleKey(0, "q_proj")]
        assert lease.factors.digest == fake.digests[2]
        assert pair.a_RI.dtype == torch.float32 and bool((pair.a_RI == 2).all())
        lease.release()


def test_dtype_of_the_engine(fake: FakeStore) -> None:
    with cache_of(fake, dtype=torch.bfloat16) as cache:
        lease = acquire(cache, fake.digests[1])
        assert lease.factors.pairs[ModuleKey(0, "q_proj")].b_RO.dtype == torch.bfloat16
        assert lease.factors.num_bytes == FACTOR_BYTES // 2


def test_one_flight_per_digest(fake: FakeStore) -> None:
    fake.gate.clear()
    with cache_of(fake, num_threads=2) as cache:
        for _ in range(5):
            assert cache.try_acquire(fake.digests[0]) is None
            cache.prefetch(fake.digests[0])
        fake.gate.set()
        acquire(cache, fake.digests[0])
        assert fake.loads == [fake.digests[0]]
        assert (cache.stats.misses, cache.stats.hits) == (1, 0)
        acquire(cache, fake.digests[0])
        assert (cache.stats.misses, cache.stats.hits) == (1, 1)


def test_asking_does_not_wait_for_a_slow_load(fake: FakeStore) -> None:
    fake.gate.clear()
    with cache_of(fake) as cache:
        start = time.perf_counter()
        assert cache.try_acquire(fake.digests[0]) is None
        cache.prefetch(fake.digests[1])
        assert cache.stats.misses == 2
        assert time.perf_counter() - start < 1  # the gate is closed for good


def test_the_least_recently_used_goes_first(fake: FakeStore) -> None:
    with cache_of(fake, 2) as cache:
        first, second, third = fake.digests[:3]
        for digest in (first, second, first, third):
            acquire(cache, digest).release()
        assert cache.stats.evictions == 1
        assert cache.try_acquire(first) is not None
        assert cache.try_acquire(second) is None


def test_leased_factors_are_never_evicted(fake: FakeStore) -> None:
    with cache_of(fake, 1) as cache:
        leases = [acquire(cache, digest) for digest in fake.digests[:3]]
        assert cache.stats.used_bytes == 3 * FACTOR_BYTES
        assert cache.stats.over_budget == 2 and cache.stats.num_leases == 3
        assert not cache.evict(fake.digests[0])
        for number, lease in enumerate(leases):
            assert bool((lease.factors.pairs[ModuleKey(0, "q_proj")].a_RI == number).all())
            lease.release()
            cache.check_integrity()
        assert cache.stats.used_bytes == FACTOR_BYTES


def test_two_leases_count_twice(fake: FakeStore) -> None:
    with cache_of(fake, 1) as cache:
        one, two = acquire(cache, fake.digests[0]), acquire(cache, fake.digests[0])
        one.release()
        acquire(cache, fake.digests[1]).release()
        assert two.factors.digest == fake.digests[0]
        assert cache.try_acquire(fake.digests[0]) is not None


def test_a_lease_is_released_once(fake: FakeStore) -> None:
    with cache_of(fake) as cache:
        lease = acquire(cache, fake.digests[0])
        lease.release()
        with pytest.raises(RuntimeError, match="released before"):
            lease.release()
        with pytest.raises(RuntimeError, match="has been released"):
            _ = lease.factors


def test_a_failure_is_told_once_and_then_tried_again(fake: FakeStore) -> None:
    digest = fake.digests[0]
    fake.broken.add(digest)
    with cache_of(fake) as cache:
        assert cache.try_acquire(digest) is None
        wait_for(flights_landed(cache, 1))
        with pytest.raises(AdapterUnavailableError, match=f"{digest}: it is gone"):
            cache.try_acquire(digest)
        fake.broken.clear()
        acquire(cache, digest)
        assert cache.stats.failures == 1 and len(fake.loads) == 2


def test_cold_adapters_do_not_evict_each_other_before_use(fake: FakeStore) -> None:
    """Both were asked for while there is room for one: both must come, or none ever would."""
    with cache_of(fake, 1) as cache:
        for digest in fake.digests[:2]:
            assert cache.try_acquire(digest) is None
        wait_for(flights_landed(cache, 2))
        for digest in fake.digests[:2]:
            lease = cache.try_acquire(digest)
            assert lease is not None
            lease.release()


def test_a_claim_runs_out(fake: FakeStore) -> None:
    now = [0.0]
    with cache_of(fake, 1, claim_seconds=5, clock=lambda: now[0]) as cache:
        assert cache.try_acquire(fake.digests[0]) is None
        wait_for(flights_landed(cache, 1))
        now[0] = 6
        acquire(cache, fake.digests[1]).release()
        assert cache.try_acquire(fake.digests[0]) is None


def test_a_prefetch_without_room_is_dropped_but_its_compact_form_stays(fake: FakeStore) -> None:
    with cache_of(fake, 1) as cache:
        acquire(cache, fake.digests[0])
        cache.prefetch(fake.digests[1])
        wait_for(flights_landed(cache, 2))
        assert cache.stats.dropped_prefetches == 1 and cache.stats.num_adapters == 1
        acquire(cache, fake.digests[1])
        assert fake.loads == fake.digests[:2]


def test_a_prefetch_that_is_asked_for_meanwhile_is_kept(fake: FakeStore) -> None:
    with cache_of(fake, 1) as cache:
        acquire(cache, fake.digests[0])
        fake.gate.clear()
        cache.prefetch(fake.digests[1])
        assert cache.try_acquire(fake.digests[1]) is None
        fake.gate.set()
        wait_for(flights_landed(cache, 2))
        assert cache.try_acquire(fake.digests[1]) is not None


def test_on_ready_after_success_and_failure(fake: FakeStore) -> None:
    calls = threading.Semaphore(0)
    fake.broken.add(fake.digests[1])
    with cache_of(fake, on_ready=calls.release) as cache:
        cache.prefetch(fake.digests[0])
        cache.prefetch(fake.digests[1])
        assert calls.acquire(timeout=10) and calls.acquire(timeout=10)


def test_an_on_ready_that_fails_harms_no_flight(
    fake: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("not my day")

    with cache_of(fake, on_ready=fail) as cache:
        acquire(cache, fake.digests[0])
        acquire(cache, fake.digests[1])
    assert "not my day" in caplog.text


def test_compact_forms_stay_for_a_second_rebuild(fake: FakeStore) -> None:
    with cache_of(fake) as cache:
        acquire(cache, fake.digests[0]).release()
        assert cache.stats.compact_bytes == FACTOR_BYTES
        with cache._lock:
            cache._entries.evict(fake.digests[0])
        acquire(cache, fake.digests[0]).release()
        assert len(fake.loads) == 1 and cache.stats.num_rebuilds == 2
        assert cache.evict(fake.digests[0])
        acquire(cache, fake.digests[0])
        assert len(fake.loads) == 2


def test_timings_are_handed_over_once(fake: FakeStore) -> None:
    with cache_of(fake) as cache:
        for digest in fake.digests[:3]:
            acquire(cache, digest).release()
        timings = cache.take_rebuild_seconds()
        assert len(timings) == cache.stats.num_rebuilds == 3 and min(timings) > 0
        assert cache.stats.rebuild_seconds == pytest.approx(sum(timings))
        assert cache.take_rebuild_seconds() == []


def test_after_close_nothing_starts_and_leases_stay(fake: FakeStore) -> None:
    with cache_of(fake) as cache:
        lease = acquire(cache, fake.digests[0])
        cache.close()
        cache.prefetch(fake.digests[1])
        with pytest.raises(AdapterUnavailableError, match="closed"):
            cache.try_acquire(fake.digests[1])
        assert lease.factors.digest == fake.digests[0]
        lease.release()
        cache.close()


@pytest.mark.parametrize("name", ["budget_bytes", "num_threads"])
def test_settings_out_of_range(name: str, fake: FakeStore) -> None:
    settings = {"budget_bytes": 1, "num_threads": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        FactorCache(fake.load, **settings)  # type: ignore[arg-type]


def test_banks_count_once(vblora_dirs: list[Path], base: BaseInfo) -> None:
    one, two, other = (read_peft_adapter(path, base) for path in vblora_dirs)
    assert one.bank is not None
    cache = CompactCache(one.bank.num_bytes + 2 * one.num_bytes)
    cache.put(one.digest, one)
    cache.put(two.digest, two)
    assert cache.bank_bytes == one.bank.num_bytes and len(cache) == 2
    cache.put(other.digest, other)
    assert cache.get(other.digest) is other and len(cache) == 1
    cache.check_integrity()
    cache.drop(other.digest)
    assert (cache.adapter_bytes, cache.bank_bytes) == (0, 0)


def test_background_threads_leave_the_number_of_threads_to_others() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pool = single_core_pool(1, "test")
        assert pool.submit(torch.get_num_threads).result() == 1
        with single_core_pool(1, "other") as other:
            assert other.submit(torch.get_num_threads).result() == 1
        seen: list[int] = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [2] and torch.get_num_threads() == 2
        pool.shutdown()
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_may_be_set_between_a_pool_and_its_first_task() -> None:
    """As a server does: its factor cache is there before its engine is loaded."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with single_core_pool(1, "test") as pool:
            torch.set_num_threads(2)
            assert pool.submit(torch.get_num_threads).result() == 1
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_many_threads_at_once(fake: FakeStore) -> None:
    def use(number: int) -> None:
        for step in range(40):
            digest = fake.digests[(number + step) % 6]
            lease = acquire(cache, digest)
            pair = lease.factors.pairs[ModuleKey(0, "q_proj")]
            wrong.extend([digest] * (not bool((pair.a_RI == fake.digests.index(digest)).all())))
            lease.release()
            cache.check_integrity()

    wrong: list[str] = []
    with cache_of(fake, 2, num_threads=2) as cache:
        threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and cache.stats.num_leases == 0
        assert cache.stats.used_bytes <= 2 * FACTOR_BYTES
