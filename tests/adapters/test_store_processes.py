"""A store under other processes: killed at any moment, or writing at the same time."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.context import ForkServerContext

import pytest
import store_children

from adapters import AdapterStore
from core.model_config import BaseInfo


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adapters"])  # torch is imported once, not per process
    return context


def run_until_killed(
    processes: ForkServerContext, store: AdapterStore, base: BaseInfo, prefix: str, delay: float
) -> list[tuple[str, str]]:
    """What a registering process had acknowledged when it was killed."""
    receiver, sender = processes.Pipe(duplex=False)
    arguments = (store.root, base.path, prefix, sender)
    process = processes.Process(target=store_children.register_forever, args=arguments, daemon=True)
    process.start()
    sender.close()
    acknowledged = [receiver.recv()]  # it is at work
    time.sleep(delay)
    process.kill()
    process.join()
    try:
        while True:
            acknowledged.append(receiver.recv())
    except EOFError:
        receiver.close()
    return acknowledged


def test_what_was_acknowledged_survives_kill_9(
    processes: ForkServerContext, store: AdapterStore, base: BaseInfo
) -> None:
    rng = random.Random(20260)
    for attempt in range(4):
        acknowledged = run_until_killed(processes, store, base, f"p{attempt}", rng.uniform(0, 0.15))
        reopened = AdapterStore.open(store.root, base)
        for adapter_id, digest in acknowledged:
            if adapter_id != "shared":
                assert reopened.resolve(adapter_id).digest == digest
                assert reopened.load(digest).digest == digest
        _check_shared(reopened, base, acknowledged)
        reopened.check_integrity()
        assert reopened.usage() == reopened._manifests.count()
        # the next writer is not held up by what the killed one left
        adapter = store_children.numbered_adapter(10_000 + attempt, base)
        reopened.add_compact(f"after/{attempt}", adapter)
        reopened.collect_garbage(0)
        reopened.check_integrity()


def _check_shared(store: AdapterStore, base: BaseInfo, acknowledged: list[tuple[str, str]]) -> None:
    """The replaced name is at its last acknowledged content, or at the next, never in between."""
    numbers = [number for number, (name, _) in enumerate(acknowledged) if name == "shared"]
    if numbers:
        last = len(numbers) - 1
        allowed = {store_children.numbered_adapter(n, base).digest for n in (last, last + 1)}
        assert store.resolve("shared").digest in allowed


def test_two_processes_register_at_once(
    processes: ForkServerContext, store: AdapterStore, base: BaseInfo
) -> None:
    num_adapters = 12
    children = []
    for prefix in "xy":
        receiver, sender = processes.Pipe(duplex=False)
        arguments = (store.root, base.path, prefix, num_adapters, sender)
        process = processes.Process(target=store_children.register_some, args=arguments)
        process.start()
        children.append((process, receiver))
    won = [receiver.recv() for _, receiver in children]
    for process, receiver in children:
        process.join()
        receiver.close()
        assert process.exitcode == 0
    assert sorted(won[0] + won[1]) == list(range(num_adapters))  # each name has one winner
    assert len(store.records()) == 3 * num_adapters
    for prefix, numbers in zip("xy", won, strict=True):
        for number in numbers:
            assert store.resolve(f"contested/{number}").digest == (
                store.resolve(f"{prefix}/{number}").digest
            )
    store.check_integrity()
    assert store.usage() == store._manifests.count()
