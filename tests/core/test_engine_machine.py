"""The engine under random traffic: whatever comes and goes, every token is the oracle's."""

from pathlib import Path
from typing import Any

import pytest
from engine_runs import Result, collect, greedy, request, run_all
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from memory_factors import MemoryFactorSource
from tiny_models import random_prompt, small_engine
from transformers_oracle import ReferenceGreedy, assert_same_greedy, reference_greedy

from core.errors import EngineOverloadedError
from core.requests import FinishReason, GenerationRequest, RequestOutput, SamplingParams

MAX_TOKENS = 12
STREAMS = [random_prompt(seed, 24) for seed in range(3)]  # prompts are beginnings of these
DIGESTS = ("all-4", "one-1", "mlp-2", "wide-16")

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "logprobs": {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
    "seeded": {"seed": 5, "top_p": 0.9},
    "penalised": {"seed": 6, "presence_penalty": 1.0, "temperature": 0.8},
}


class Oracle:
    """What each request would say alone; every question is computed once per session."""

    def __init__(self, path: Path, reference: Any, adapters: Any) -> None:
        self._path, self._reference, self._adapters = path, reference, adapters
        self._greedy: dict[Any, ReferenceGreedy] = {}
        self._sampled: dict[Any, tuple[int, ...]] = {}

    def check(self, asked: GenerationRequest, kind: str, token_ids: tuple[int, ...]) -> None:
        """Assert that `token_ids` begin what `asked` brings alone."""
        if KINDS[kind].get("temperature") == 0:
            whole = self._greedy_of(asked)
            num = len(token_ids)
            assert_same_greedy(token_ids, ReferenceGreedy(whole.token_ids[:num], whole.gaps[:num]))
        else:
            assert token_ids == self._sampled_of(asked, kind)[: len(token_ids)]

    def _greedy_of(self, asked: GenerationRequest) -> ReferenceGreedy:
        key = asked.prompt_token_ids, asked.adapter_digest
        if key not in self._greedy:
            factors = None if key[1] is None else self._adapters[key[1]]
            self._greedy[key] = reference_greedy(self._reference, key[0], MAX_TOKENS, factors)
        return self._greedy[key]

    def _sampled_of(self, asked: GenerationRequest, kind: str) -> tuple[int, ...]:
        key = asked.prompt_token_ids, asked.adapter_digest, kind
        if key not in self._sampled:
            source = MemoryFactorSource.of(*self._adapters.values())
            engine = small_engine(self._path, source, enable_prefix_caching=False)
            sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, **KINDS[kind])
            alone = GenerationRequest("alone", key[0], sampling, key[1])
            self._sampled[key] = run_all(engine, [alone])["alone"].token_ids
        return self._sampled[key]


class EngineMachine(RuleBasedStateMachine):
    """Subclassed per test with the model's path, the adapters and the oracle."""

    path: Path
    adapters: dict[str, Any]
    oracle: Oracle

    @initialize(
        num_pages=st.sampled_from([10, 12, 16, 40]),
        budget=st.sampled_from([4, 7, 32]),
        prefix_caching=st.booleans(),
        compiled=st.booleans(),
    )
    def start(self, num_pages: int, budget: int, prefix_caching: bool, compiled: bool) -> None:
        self.source = MemoryFactorSource.of(*(self.adapters[digest] for digest in DIGESTS))
        self.engine = small_engine(
            self.path,
            self.source,
            num_pages=num_pages,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            max_waiting=12,
            enable_prefix_caching=prefix_caching,
            compiled_kernels=compiled,
        )
        self.asked: dict[str, tuple[GenerationRequest, str]] = {}
        self.results: dict[str, Result] = {}
        self.may_fail: set[str] = set()  # digests whose loads failed at some time

    def open_names(self) -> list[str]:
        ended = {name for name, result in self.results.items() if result.finish_reason}
        return [name for name in self.asked if name not in ended]

    def take(self, outputs: list[RequestOutput]) -> None:
        collect(self.results, outputs)
        for output in outputs:
            asked, kind = self.asked[output.request_id]
            assert len(output.logprobs) == (len(output.token_ids) if kind == "logprobs" else 0)
            if output.finish_reason is FinishReason.ERROR:
                assert asked.adapter_digest in self.may_fail
            if output.finish_reason is not None:
                self.oracle.check(asked, kind, self.results[output.request_id].token_ids)

    # -- what may happen -----------------------------------------------------------------------

    @rule(
        stream=st.sampled_from(STREAMS),
        length=st.integers(1, 24),
        num_tokens=st.sampled_from([0, 1, 3, 8, MAX_TOKENS]),
        digest=st.sampled_from([None, *DIGESTS]),
        kind=st.sampled_from(sorted(KINDS)),
    )
    def submit(
        self, stream: tuple[int, ...], length: int, num_tokens: int, digest: str | None, kind: str
    ) -> None:
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, **KINDS[kind])
        name = f"r{len(self.asked)}"
        asked = request(name, stream[:length], sampling, digest)
        try:
            self.engine.add(asked)
        except EngineOverloadedError:
            assert self.engine.stats().num_waiting >= 12
        else:
            self.asked[name] = (asked, kind)

    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.take(self.engine.step())
            self.engine.check_integrity()

    @precondition(lambda self: hasattr(self, "engine") and self.open_names())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.open_names()))
        output = self.engine.abort(name)
        assert output is not None
        assert output.finish_reason is FinishReason.ABORT
        assert output.token_ids == ()
        self.take([output])

    @rule(digest=st.sampled_from(DIGESTS), polls=st.integers(1, 12))
    def delay(self, digest: str, polls: int) -> None:
        self.source.polls_left[digest] = polls

    @rule(digest=st.sampled_from(DIGESTS))
    def break_or_mend(self, digest: str) -> None:
        if self.source.failures.pop(digest, None) is None:
            self.source.failures[digest] = "broken for a while"
            self.may_fail.add(digest)

    # -- what must hold ------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check_integrity()
        stats = self.engine.stats()
        assert stats.num_running + stats.num_waiting == len(self.open_names())
        assert self.source.num_open_leases <= len(self.open_names())

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.take(self.engine.step())
            self.engine.check_integrity()
        assert not self.engine.has_work, "requests that never end"
        assert self.open_names() == []
        assert self.source.num_open_leases == 0
        assert self.engine.stats().kv_bytes_used == 0
        for name, (asked, kind) in self.asked.items():
            result = self.results[name]
            if result.finish_reason is FinishReason.LENGTH:
                assert len(result.token_ids) == asked.sampling.max_tokens
                if kind == "logprobs":
                    assert len(result.prompt_logprobs) == len(asked.prompt_token_ids)


@pytest.fixture(scope="module")
def oracle(tiny_path: Path, reference, adapters) -> Oracle:
    return Oracle(tiny_path, reference, adapters)


def test_random_traffic(tiny_path: Path, adapters, oracle) -> None:
    own = {"path": tiny_path, "adapters": adapters, "oracle": oracle}
    case = type("Machine", (EngineMachine,), own).TestCase()
    case.settings = settings(
        max_examples=25,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    case.runTest()


def test_the_same_traffic_preempts_and_hits(tiny_path: Path, adapters, oracle) -> None:
    """The machine's smallest engine by hand: proof that its settings reach both paths."""
    source = MemoryFactorSource.of(*adapters.values())
    engine = small_engine(tiny_path, source, num_pages=10, max_num_seqs=4, max_num_batched_tokens=7)
    asked = [
        request(f"r{n}", STREAMS[n % 2][: 6 + n], greedy(MAX_TOKENS), [None, "all-4"][n % 2])
        for n in range(8)
    ]
    results = run_all(engine, asked)
    for each in asked:
        oracle.check(each, "greedy", results[each.request_id].token_ids)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_prefix_hit_tokens > 0
