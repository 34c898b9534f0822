"""FactorCache under random operations, against a model of what it may hold."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

from fake_store import FACTOR_BYTES, FakeStore
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters import (
    FactorCache,
)
from core.errors import AdapterUnavailableError
from core.factors import FactorLease, ModuleKey
from core.model_config import BaseInfo, ModelConfig


class ManualExecutor(Executor):
    """Runs a submitted call when told to, in the caller's thread: every order can be tried."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], object]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.waiting.append(partial(fn, *args, **kwargs))
        return Future()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        assert wait and cancel_futures
        self.waiting.clear()


class CacheMachine(RuleBasedStateMachine):
    """Random calls; the model is the list of open leases and the digests that are in flight."""

    model_config: ModelConfig

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeStore(self.model_config, 5)
        self.now = 0.0
        self.executor = ManualExecutor()
        self.cache = FactorCache(
            self.fake.load,
            budget_bytes=2 * FACTOR_BYTES,
            compact_budget_bytes=3 * FACTOR_BYTES,
            claim_seconds=3.0,
            clock=lambda: self.now,
            executor=self.executor,
        )
        self.leases: list[tuple[int, FactorLease]] = []

    adapters = st.integers(0, 4)

    @rule(number=adapters)
    def prefetch(self, number: int) -> None:
        self.cache.prefetch(self.fake.digests[number])

    @rule(number=adapters)
    def try_acquire(self, number: int) -> None:
        digest = self.fake.digests[number]
        held = any(other == number for other, _ in self.leases)
        try:
            lease = self.cache.try_acquire(digest)
        except AdapterUnavailableError:
            assert not held
            return
        assert lease is not None or not held, "leased factors were evicted"
        if lease is not None:
            assert lease.factors.digest == digest
            self.leases.append((number, lease))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.leases) - 1))
        number, lease = self.leases.pop(at)
        assert bool((lease.factors.pairs[ModuleKey(0, "q_proj")].a_RI == number).all())
        lease.release()

    @rule(number=adapters)
    def evict(self, number: int) -> None:
        held = any(other == number for other, _ in self.leases)
        assert not (self.cache.evict(self.fake.digests[number]) and held)

    @rule(number=adapters)
    def break_or_mend(self, number: int) -> None:
        self.fake.broken ^= {self.fake.digests[number]}

    @rule(seconds=st.floats(0, 5))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.executor.waiting)
    @rule(data=st.data())
    def a_flight_lands(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.executor.waiting) - 1))
        self.executor.waiting.pop(at)()

    @invariant()
    def integrity(self) -> None:
        self.cache.check_integrity()
        stats = self.cache.stats
        assert stats.num_leases == len(self.leases)
        assert stats.misses == stats.num_rebuilds + stats.failures + len(self.executor.waiting)
        in_flight = [call.args[0] for call in self.executor.waiting]  # type: ignore[attr-defined]
        assert len(set(in_flight)) == len(in_flight), "two flights for one digest"

    def teardown(self) -> None:
        for _, lease in self.leases:
            lease.release()
        self.cache.close()
        self.cache.check_integrity()
        assert self.cache.stats.num_leases == 0


def test_random_operations(base: BaseInfo) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    CacheMachine.model_config = base.config
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        CacheMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )
