"""The engine's thread: many callers, one stepper, no request without an end."""

import subprocess  # a process of its own has no other threads
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import Result, greedy, request
from memory_factors import MemoryFactorSource
from tiny_models import random_prompt, small_engine, write_tiny_llama
from transformers_oracle import assert_same_greedy, reference_greedy

from core.engine_thread import EngineThread
from core.errors import CoreError, EngineOverloadedError, InvalidRequestError
from core.requests import FinishReason, RequestOutput, SamplingParams

PROMPT = random_prompt(1, 6)
PATIENCE_SECONDS = 60.0  # far more than needed: reached only where something is broken


class Listener:
    """Collects what `on_step` brings."""

    def __init__(self) -> None:
        self.steps: list[list[RequestOutput]] = []
        self.results: dict[str, Result] = {}
        self.threads: set[int] = set()
        self._changed = threading.Condition()

    def __call__(self, outputs: list[RequestOutput]) -> None:
        with self._changed:
            self.threads.add(threading.get_ident())
            self.steps.append(outputs)
            for output in outputs:
                result = self.results.setdefault(output.request_id, Result())
                if result.outputs:
                    assert result.finish_reason is None, "an output after the last one"
                result.outputs.append(output)
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_SECONDS), "nothing happens"

    def wait_until_ended(self, *names: str) -> None:
        self.wait_for(
            lambda: all(n in self.results and self.results[n].finish_reason for n in names)
        )


@pytest.fixture
def source(adapters) -> MemoryFactorSource:
    return MemoryFactorSource.of(*adapters.values())


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def make(tiny_path: Path, source, listener) -> Iterator[Callable[..., EngineThread]]:
    """Builds a thread that is started and, at the end of the test, stopped."""
    made: list[EngineThread] = []

    def build(*, start: bool = True, **options: Any) -> EngineThread:
        options.setdefault("num_pages", 400)
        thread = EngineThread(small_engine(tiny_path, source, **options), listener)
        made.append(thread)
        if start:
            thread.start()
        return thread

    yield build
    for thread in made:
        thread.stop()
        assert not thread.is_alive


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.005)


def test_requests_from_many_threads_all_get_their_own_answer(
    make, listener, source, reference, adapters
) -> None:
    thread = make()
    digests = [None, *adapters]
    refused: list[BaseException] = []

    def submit(worker: int) -> None:
        try:
            for n in range(6):
                name, digest = f"{worker}-{n}", digests[(worker + n) % len(digests)]
                thread.submit(request(name, random_prompt(n, 5), greedy(5), digest))
        except BaseException as error:
            refused.append(error)

    workers = [threading.Thread(target=submit, args=(n,)) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert refused == []
    listener.wait_until_ended(*(f"{worker}-{n}" for worker in range(6) for n in range(6)))
    for worker in range(6):
        for n in range(6):
            digest = digests[(worker + n) % len(digests)]
            factors = None if digest is None else adapters[digest]
            expected = reference_greedy(reference, random_prompt(n, 5), 5, factors)
            assert_same_greedy(listener.results[f"{worker}-{n}"].token_ids, expected)
    assert len(listener.threads) == 1
    assert source.num_open_leases == 0


def test_a_step_is_handed_over_in_one_call(make, listener) -> None:
    thread = make(start=False)
    for n in range(5):
        thread.submit(request(str(n), random_prompt(n, 4), greedy(6)))
    thread.start()
    listener.wait_until_ended(*"01234")
    assert [len(outputs) for outputs in listener.steps] == [5] * 6
    assert thread.stats().num_steps == 6


def test_an_abort_ends_its_request_within_a_step(make, listener, source) -> None:
    thread = make()
    endless = greedy(200)
    thread.submit(request("a", PROMPT, endless, "all-4"))
    thread.submit(request("b", PROMPT, endless))
    listener.wait_for(lambda: {"a", "b"} <= listener.results.keys())
    thread.abort("a")
    listener.wait_until_ended("a")
    assert listener.results["a"].finish_reason is FinishReason.ABORT
    assert listener.results["b"].finish_reason is None
    assert source.num_open_leases == 0
    thread.abort("a")  # over already
    thread.abort("never there")
    thread.abort("b")
    listener.wait_until_ended("b")
    wait_until(lambda: thread.stats().kv_bytes_used == 0)
    assert thread.is_alive


def test_an_abort_before_the_first_step(make, listener) -> None:
    thread = make(start=False)
    thread.submit(request("a", PROMPT, greedy(5)))
    thread.abort("a")
    thread.start()
    listener.wait_until_ended("a")
    assert listener.results["a"].finish_reason is FinishReason.ABORT
    assert listener.results["a"].token_ids == ()


def test_aborts_and_requests_from_many_threads_leave_nothing_behind(make, listener, source) -> None:
    thread = make(num_pages=24)

    def work(worker: int) -> None:
        for n in range(8):
            name = f"{worker}-{n}"
            thread.submit(request(name, random_prompt(n, 5), greedy(12), ("all-4", None)[n % 2]))
            if n % 3:
                thread.abort(name)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    names = [f"{worker}-{n}" for worker in range(4) for n in range(8)]
    listener.wait_until_ended(*names)
    for name in names:
        result = listener.results[name]
        assert result.finish_reason in (FinishReason.LENGTH, FinishReason.ABORT)
        if result.finish_reason is FinishReason.LENGTH:
            assert len(result.token_ids) == 12
    wait_until(lambda: thread.stats().kv_bytes_used == 0)
    assert source.num_open_leases == 0
    thread.engine.check_integrity()


def test_bad_requests_are_refused_in_the_callers_thread(make) -> None:
    thread = make()
    with pytest.raises(InvalidRequestError):
        thread.submit(request("a", ()))
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        thread.submit(request("a", (1000,)))
    assert not thread.engine.has_work


def test_an_id_in_use_is_refused_and_the_first_goes_on(make, listener, source) -> None:
    """Were it an ERROR output, it would end the stream of the request that has the id."""
    thread = make()
    source.hold("all-4")
    thread.submit(request("a", PROMPT, greedy(4), "all-4"))
    with pytest.raises(InvalidRequestError, match="'a'"):
        thread.submit(request("a", PROMPT, greedy(4)))
    source.let_go("all-4")
    thread.wake()
    listener.wait_until_ended("a")
    assert listener.results["a"].finish_reason is FinishReason.LENGTH
    assert len(listener.results["a"].token_ids) == 4
    del listener.results["a"]
    thread.submit(request("a", PROMPT, greedy(4)))  # free again
    listener.wait_until_ended("a")


@pytest.mark.parametrize("options", [{"max_waiting": 3}, {"max_waiting_per_adapter": 3}], ids=str)
def test_overload_is_refused_at_once_and_counts_the_inbox(
    options: dict[str, int], make, listener
) -> None:
    thread = make(start=False, **options)
    for n in range(3):
        thread.submit(request(str(n), PROMPT))
    with pytest.raises(EngineOverloadedError, match="limit is 3"):
        thread.submit(request("more", PROMPT))
    thread.start()
    listener.wait_until_ended("0", "1", "2")
    thread.submit(request("again", PROMPT))
    listener.wait_until_ended("again")
    assert "more" not in listener.results


def test_an_error_in_a_step_ends_every_request_and_the_thread(
    make, listener, source, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = make(max_num_seqs=2)
    plain_forward = thread.engine.model.forward
    calls: list[int] = []

    def forward(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("the device is gone")
        return plain_forward(*arguments)

    monkeypatch.setattr(thread.engine.model, "forward", forward)
    source.hold("one-1")
    thread.submit(request("loading", PROMPT, greedy(100), "one-1"))
    for n in range(4):
        thread.submit(request(str(n), PROMPT, greedy(100)))
    listener.wait_until_ended(*"0123", "loading")
    wait_until(lambda: not thread.is_alive)
    for name in (*"0123", "loading"):
        assert listener.results[name].finish_reason is FinishReason.ERROR
        assert "the device is gone" in (listener.results[name].error or "")
    assert isinstance(thread.error, RuntimeError)
    with pytest.raises(CoreError, match="the device is gone"):
        thread.submit(request("late", PROMPT))
    thread.abort("0")
    thread.wake()


def test_stop_ends_what_is_open_and_frees_what_it_held(make, listener, source) -> None:
    thread = make(max_num_seqs=2)
    source.hold("one-1")
    thread.submit(request("loading", PROMPT, greedy(100), "one-1"))
    for n in range(4):
        thread.submit(request(str(n), PROMPT, greedy(200), "all-4"))
    listener.wait_for(lambda: len(listener.results) >= 2)
    thread.stop()
    assert not thread.is_alive
    assert {result.finish_reason for result in listener.results.values()} == {FinishReason.ABORT}
    assert set(listener.results) == {*"0123", "loading"}
    assert source.num_open_leases == 0
    assert not thread.engine.has_work
    with pytest.raises(CoreError, match="stopped"):
        thread.submit(request("late", PROMPT))
    thread.stop()  # twice is once


def test_stop_before_the_start_ends_what_was_submitted(make, listener) -> None:
    thread = make(start=False)
    thread.submit(request("a", PROMPT))
    thread.stop()
    thread.start()
    listener.wait_until_ended("a")
    assert listener.results["a"].finish_reason is FinishReason.ABORT


def test_an_idle_thread_does_not_step_nor_spin(make, listener, monkeypatch) -> None:
    thread = make()
    schedules: list[float] = []
    plain_step = thread.engine.step

    def step() -> list[RequestOutput]:
        schedules.append(time.monotonic())
        return plain_step()

    monkeypatch.setattr(thread.engine, "step", step)
    thread.submit(request("a", PROMPT, greedy(3)))
    listener.wait_until_ended("a")
    wait_until(lambda: not thread.engine.has_work)
    time.sleep(0.1)
    num_steps, num_schedules = thread.engine.num_steps, len(schedules)
    time.sleep(0.6)
    assert thread.engine.num_steps == num_steps == 3
    assert len(schedules) - num_schedules <= 3


def test_a_wake_up_brings_a_loaded_adapter_on_at_once(
    make, listener, source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the thread's own patience out of the way, only `wake` can bring it on."""
    monkeypatch.setattr("core.engine_thread._IDLE_WAIT_SECONDS", 2 * PATIENCE_SECONDS)
    thread = make()
    source.hold("all-4")
    thread.submit(request("a", PROMPT, SamplingParams(temperature=0, max_tokens=3), "all-4"))
    wait_until(lambda: source.num_acquire_calls >= 1)
    time.sleep(0.05)
    source.let_go("all-4")
    thread.wake()
    listener.wait_until_ended("a")
    assert listener.results["a"].finish_reason is FinishReason.LENGTH


def test_wake_ups_are_never_lost(make, listener, source, monkeypatch) -> None:
    """Submissions that come at any point of the loop are seen without the idle timeout."""
    monkeypatch.setattr("core.engine_thread._IDLE_WAIT_SECONDS", 2 * PATIENCE_SECONDS)
    thread = make()
    for n in range(60):
        thread.submit(request(str(n), PROMPT, greedy(1)))
        listener.wait_until_ended(str(n))
        if n % 3 == 0:
            time.sleep(0.001 * (n % 4))


def test_a_failing_adapter_answers_without_the_idle_timeout(
    make, listener, source, monkeypatch
) -> None:
    monkeypatch.setattr("core.engine_thread._IDLE_WAIT_SECONDS", 2 * PATIENCE_SECONDS)
    source.failures["all-4"] = "no such blob"
    thread = make(start=False)
    for n in range(5):
        thread.submit(request(str(n), PROMPT, greedy(3), "all-4"))
    thread.start()
    listener.wait_until_ended(*"01234")
    assert {result.error for result in listener.results.values()} == {"no such blob"}


def test_a_request_that_comes_during_an_idle_step_is_seen_at_once(
    make, listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is too late for that step's inbox and too early to wake a sleeper."""
    monkeypatch.setattr("core.engine_thread._IDLE_WAIT_SECONDS", 2 * PATIENCE_SECONDS)
    thread = make(start=False)
    plain_step, submitted = thread.engine.step, []

    def step() -> list[RequestOutput]:
        outputs = plain_step()
        if not submitted:
            submitted.append("a")
            thread.submit(request("a", PROMPT, greedy(2)))
        return outputs

    monkeypatch.setattr(thread.engine, "step", step)
    thread.start()
    listener.wait_until_ended("a")
    assert len(listener.results["a"].token_ids) == 2


_COUNT_THREADS = """
import os, sys, threading, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from engine_runs import greedy, request
from tiny_models import random_prompt
from core.engine_config import EngineConfig
from core.loading import load_engine

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
at_first = count()
engine = load_engine(sys.argv[1], EngineConfig(device="cpu", kv_cache_bytes=1 << 24, num_threads=3))
engine.add(request("a", random_prompt(1, 200), greedy(2)))

def run():
    while engine.has_work:
        engine.step()
    print(at_first, loaded, count())

deadline = time.monotonic() + 10
while count() > at_first and time.monotonic() < deadline:
    time.sleep(0.01)  # the pool's threads end on their own
loaded = count()
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_loading_leaves_no_pool_of_threads_beside_the_one_that_steps(tmp_path: Path) -> None:
    """Two pools have more threads than cores: OpenMP's would sleep instead of spinning."""
    base = write_tiny_llama(tmp_path / "wide", hidden_size=512, intermediate_size=1024)
    script = [sys.executable, "-c", _COUNT_THREADS, str(base), str(Path(__file__).parent)]
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=120)
    at_first, loaded, stepping = map(int, done.stdout.split())
    assert loaded == at_first, "loading has left threads"
    assert stepping == at_first + 3, "the one that steps makes a pool of three"


def test_it_computes_with_the_threads_that_its_engine_was_loaded_with(tiny_path: Path) -> None:
    """Whatever another thread has told torch before the first step."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine = small_engine(tiny_path)
        passing = threading.Thread(target=torch.set_num_threads, args=(1,))
        passing.start()
        passing.join()
        seen: list[int] = []
        thread = EngineThread(engine, lambda outputs: seen.append(torch.get_num_threads()))
        thread.start()
        thread.submit(request("x", random_prompt(1, 4)))
        while not seen:
            time.sleep(0.01)
        thread.stop()
        assert set(seen) == {2}
    finally:
        torch.set_num_threads(before)
