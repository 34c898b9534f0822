"""What one request may ask for, and how it ends."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import Result, greedy, request, run_all
from memory_factors import MemoryFactorSource
from tiny_models import random_prompt, small_engine, write_tiny_llama
from transformers_oracle import assert_same_greedy, reference_greedy, reference_logits

from core.engine import Engine
from core.errors import InvalidRequestError, PromptTooLongError
from core.requests import FinishReason, RequestOutput, SamplingParams

PROMPT = random_prompt(1, 11)


@pytest.fixture
def source(adapters) -> MemoryFactorSource:
    return MemoryFactorSource.of(*adapters.values())


def run_one(engine: Engine, sampling: SamplingParams, prompt: Any = PROMPT) -> Result:
    return run_all(engine, [request("a", prompt, sampling)])["a"]


@pytest.fixture(scope="module")
def best(reference) -> tuple[int, ...]:
    """The base's greedy answer to PROMPT."""
    return reference_greedy(reference, PROMPT, 20).token_ids


# -- how a request ends ------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_max_tokens(num_tokens: int, tiny_path: Path, best) -> None:
    result = run_one(small_engine(tiny_path), greedy(num_tokens))
    assert result.token_ids == best[:num_tokens]
    assert result.finish_reason is FinishReason.LENGTH
    assert [output.finish_reason for output in result.outputs[:-1]] == [None] * (num_tokens - 1)


def test_no_tokens_at_all(tiny_path: Path) -> None:
    """max_tokens 0 computes the prompt, answers nothing, and leaves its pages for others."""
    engine = small_engine(tiny_path)
    result = run_one(engine, greedy(0))
    assert [output.token_ids for output in result.outputs] == [()]
    assert result.finish_reason is FinishReason.LENGTH
    assert result.prompt_logprobs is None
    assert run_one(engine, greedy(1)).outputs[-1].num_cached_tokens == 8


def test_a_stop_token_ends_and_is_included(tiny_path: Path, best) -> None:
    stop = best[4]
    first = best.index(stop)
    sampling = greedy(20, stop_token_ids=frozenset({stop, 127}))
    result = run_one(small_engine(tiny_path), sampling)
    assert result.token_ids == best[: first + 1]
    assert result.finish_reason is FinishReason.STOP


def test_a_stop_token_within_the_prompt_stops_nothing(tiny_path: Path, best) -> None:
    sampling = greedy(3, stop_token_ids=frozenset(PROMPT) - set(best))
    assert run_one(small_engine(tiny_path), sampling).token_ids == best[:3]


def test_end_of_sequence_and_ignoring_it(tmp_path: Path, best) -> None:
    """The model's own end, here set to what it says third; any of several counts."""
    path = write_tiny_llama(tmp_path / "m", eos_token_id=[2, best[2]])
    first = best.index(best[2])
    engine = small_engine(path)
    stopped = run_one(engine, SamplingParams(temperature=0, max_tokens=20))
    assert (stopped.token_ids, stopped.finish_reason) == (best[: first + 1], FinishReason.STOP)
    ignoring = run_one(engine, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    assert (ignoring.token_ids, ignoring.finish_reason) == (best, FinishReason.LENGTH)


def test_min_tokens_forbids_ends_until_then(tmp_path: Path, best, reference) -> None:
    path = write_tiny_llama(tmp_path / "m", eos_token_id=best[0])
    engine = small_engine(path)
    params = {"temperature": 0, "max_tokens": 8}
    assert run_one(engine, SamplingParams(**params)).token_ids == best[:1]
    result = run_one(engine, SamplingParams(**params, min_tokens=3))
    assert best[0] not in result.token_ids[:3]
    assert len(result.token_ids) >= 4
    logits = reference_logits(reference, PROMPT)[-1].clone()
    logits[best[0]] = -math.inf
    assert result.token_ids[0] == int(logits.argmax())


def test_the_end_wins_over_the_length(tiny_path: Path, best) -> None:
    result = run_one(small_engine(tiny_path), greedy(1, stop_token_ids=frozenset({best[0]})))
    assert result.finish_reason is FinishReason.STOP


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "param", "named"),
    [
        ((), {}, "prompt", "empty"),
        ((3, 128), {}, "prompt", "128"),
        ((-1, 3), {}, "prompt", "-1"),
        ((3,), {"stop_token_ids": frozenset({128})}, "stop_token_ids", "128"),
        ((3,), {"stop_token_ids": frozenset({-1}), "min_tokens": 1}, "stop_token_ids", "-1"),
        ((3,), {"logit_bias": {500: 1.0}}, "logit_bias", "500"),
        ((3,), {"stop_token_ids": frozenset(range(128)), "min_tokens": 1}, "stop_token_ids", "min"),
    ],
)
def test_bad_requests_are_refused_by_field(
    prompt: Any, options: dict[str, Any], param: str, named: str, tiny_path: Path
) -> None:
    engine = small_engine(tiny_path)
    with pytest.raises(InvalidRequestError, match=named) as caught:
        engine.add(request("a", prompt, greedy(4, **options)))
    assert caught.value.param == param
    assert not engine.has_work


def test_sequences_beyond_the_context_are_refused(tiny_path: Path) -> None:
    engine = small_engine(tiny_path, max_model_len=20)
    assert run_one(engine, greedy(9)).finish_reason is FinishReason.LENGTH  # 11 + 9
    for prompt, num_tokens, param in ((PROMPT, 10, "max_tokens"), (PROMPT * 2, 0, "prompt")):
        with pytest.raises(PromptTooLongError, match="20") as caught:
            engine.add(request("a", prompt, greedy(num_tokens)))
        assert caught.value.param == param


def test_the_cache_bounds_the_context(tiny_path: Path, best) -> None:
    """A sequence that could never have enough pages is refused, one that fills all runs."""
    engine = small_engine(tiny_path, num_pages=4)
    assert engine.max_model_len == 16
    assert run_one(engine, greedy(5)).token_ids == best[:5]
    with pytest.raises(PromptTooLongError):
        engine.add(request("a", PROMPT, greedy(6)))


def test_an_id_in_use_is_refused_and_free_again_at_the_end(tiny_path: Path, best) -> None:
    engine = small_engine(tiny_path)
    engine.add(request("a", PROMPT, greedy(3)))
    with pytest.raises(InvalidRequestError, match="'a'"):
        engine.add(request("a", PROMPT, greedy(9)))
    assert run_all(engine)["a"].token_ids == best[:3]
    assert run_one(engine, greedy(4)).token_ids == best[:4]


# -- logprobs ----------------------------------------------------------------------------------


def check_entry(entry: Any, logprobs_V: torch.Tensor, token: int, num_top: int) -> None:
    """One reported position against the oracle's distribution."""
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(float(logprobs_V[token]), abs=1e-3)
    better = int((logprobs_V > logprobs_V[token] + 1e-3).sum())
    as_good = int((logprobs_V > logprobs_V[token] - 1e-3).sum())
    assert better < entry.rank <= as_good
    assert list(entry.top.values()) == sorted(entry.top.values(), reverse=True)
    expected = logprobs_V.topk(num_top).values if num_top else torch.empty(0)
    assert list(entry.top.values()) == pytest.approx(expected.tolist(), abs=1e-3)
    for top_token, logprob in entry.top.items():
        assert logprob == pytest.approx(float(logprobs_V[top_token]), abs=1e-3)


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_of_generated_tokens(num_top: int, tiny_path: Path, reference) -> None:
    """Of the model's own distribution, whatever the temperature, biases and penalties are."""
    sampling = SamplingParams(
        temperature=1.7, seed=3, max_tokens=6, ignore_eos=True, logprobs=num_top, top_k=60,
        presence_penalty=1.0, logit_bias={5: 4.0},
    )  # fmt: skip
    result = run_one(small_engine(tiny_path), sampling)
    logprobs = reference_logits(reference, (*PROMPT, *result.token_ids)).log_softmax(-1)
    assert len(result.logprobs) == 6
    for place, (entry, token) in enumerate(zip(result.logprobs, result.token_ids, strict=True)):
        check_entry(entry, logprobs[len(PROMPT) + place - 1], token, num_top)
    for output in result.outputs:
        assert len(output.logprobs) == len(output.token_ids)


def test_no_logprobs_unasked(tiny_path: Path) -> None:
    result = run_one(small_engine(tiny_path), greedy(3))
    assert result.logprobs == []
    assert result.prompt_logprobs is None


def check_prompt_logprobs(result: Result, prompt: Any, logprobs: torch.Tensor, top: int) -> None:
    assert result.outputs[0].prompt_logprobs is not None, "not given with the first output"
    given = result.prompt_logprobs
    assert len(given) == len(prompt)
    assert given[0] is None
    for place in range(1, len(prompt)):
        check_entry(given[place], logprobs[place - 1], prompt[place], top)


@pytest.mark.parametrize("budget", [2, 3, 64])
@pytest.mark.parametrize("digest", [None, "all-4"])
@pytest.mark.parametrize("num_tokens", [0, 1, 4])
def test_prompt_logprobs(
    budget: int, digest: str | None, num_tokens: int, tiny_path: Path, source, reference, adapters
) -> None:
    """With the prompt in chunks, and when another request has left the prompt's pages."""
    factors = None if digest is None else adapters[digest]
    logprobs = reference_logits(reference, PROMPT, factors).log_softmax(-1)
    engine = small_engine(tiny_path, source, max_num_seqs=2, max_num_batched_tokens=budget)
    run_all(engine, [request("before", PROMPT, greedy(2), digest)])
    sampling = greedy(num_tokens, prompt_logprobs=3)
    result = run_all(engine, [request("a", PROMPT, sampling, digest)])["a"]
    check_prompt_logprobs(result, PROMPT, logprobs, 3)
    assert len(result.token_ids) == num_tokens
    assert result.outputs[-1].num_cached_tokens == 0


def test_prompt_logprobs_of_a_single_token(tiny_path: Path) -> None:
    result = run_one(small_engine(tiny_path), greedy(2, prompt_logprobs=1), prompt=(5,))
    assert result.prompt_logprobs == (None,)


def test_prompt_logprobs_after_preemption(tiny_path: Path, reference) -> None:
    """Preempted with its prompt half done, it counts no token twice and none short."""
    engine = small_engine(tiny_path, num_pages=13, max_num_seqs=2, max_num_batched_tokens=4)
    prompt = random_prompt(5, 36)
    preempted_within_prompt = False
    engine.add(request("old", random_prompt(2, 8), greedy(24)))
    engine.step()
    engine.step()
    engine.add(request("young", prompt, greedy(3, prompt_logprobs=2)))
    results: dict[str, list[RequestOutput]] = {"old": [], "young": []}
    while engine.has_work:
        before = engine.stats().num_preemptions
        for output in engine.step():
            results[output.request_id].append(output)
        if engine.stats().num_preemptions > before:
            preempted_within_prompt |= not results["young"]
    assert preempted_within_prompt
    logprobs = reference_logits(reference, prompt).log_softmax(-1)
    check_prompt_logprobs(Result(results["young"]), prompt, logprobs, 2)
    expected = reference_greedy(reference, prompt, 3)
    assert_same_greedy(Result(results["young"]).token_ids, expected)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_an_abort_gives_no_prompt_logprobs_twice_nor_in_part(
    num_steps: int, tiny_path: Path
) -> None:
    engine = small_engine(tiny_path, max_num_seqs=1, max_num_batched_tokens=6)
    engine.add(request("a", PROMPT, greedy(9, prompt_logprobs=0)))
    outputs = [output for _ in range(num_steps) for output in engine.step()]
    last = engine.abort("a")
    assert last is not None
    given = [out.prompt_logprobs for out in (*outputs, last) if out.prompt_logprobs is not None]
    assert len(given) == (1 if num_steps >= 2 else 0)
    assert all(len(entries) == len(PROMPT) for entries in given)


# -- seeds -------------------------------------------------------------------------------------


def seeded(seed: int | None, **options: Any) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=12, ignore_eos=True, **options)


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.8}, {"top_k": 5, "temperature": 1.5}, {"min_p": 0.1}], ids=str
)
def test_a_seed_gives_the_same_tokens_alone_and_among_others(
    options: dict[str, Any], compiled: bool, tiny_path: Path, source
) -> None:
    alone = run_one(
        small_engine(tiny_path, source, compiled_kernels=compiled), seeded(7, **options)
    ).token_ids
    engine = small_engine(
        tiny_path, source, compiled_kernels=compiled, num_pages=200, max_num_batched_tokens=24
    )
    others = [
        request("greedy", random_prompt(2, 9)),
        request("top_p", random_prompt(3, 3), seeded(None, top_p=0.3)),
        request("plain", random_prompt(4, 15), seeded(None)),
        request("adapter", PROMPT, seeded(7, **options), "all-4"),
        request("bias", PROMPT, seeded(7, logit_bias={4: 5.0}), "one-1"),
    ]
    results = run_all(
        engine, [*others[:3], request("a", PROMPT, seeded(7, **options)), *others[3:]]
    )
    assert results["a"].token_ids == alone
    assert results["adapter"].token_ids != alone


def test_different_seeds_and_no_seed_differ(tiny_path: Path) -> None:
    engine = small_engine(tiny_path, num_pages=400)
    seeds = [*range(8), None, None, None]
    results = run_all(
        engine, [request(f"{n}", PROMPT, seeded(seed)) for n, seed in enumerate(seeds)]
    )
    assert len({result.token_ids for result in results.values()}) == len(seeds)


# -- figures -----------------------------------------------------------------------------------


def test_timings_and_counts(tiny_path: Path) -> None:
    engine = small_engine(tiny_path)
    engine.add(request("a", PROMPT, greedy(4)))
    assert (engine.stats().num_waiting, engine.stats().num_running) == (1, 0)
    first = engine.step()[0]
    assert (engine.stats().num_waiting, engine.stats().num_running) == (0, 1)
    page_bytes = engine.stats().kv_bytes_total // 64
    assert engine.stats().kv_bytes_used == 3 * page_bytes  # 11 tokens in pages of 4
    last = run_all(engine)["a"].outputs[-1]
    assert engine.num_steps == 4
    assert first.timings is not None
    assert last.timings is not None
    times = [last.timings.arrived, last.timings.scheduled, last.timings.first_token]
    assert all(time is not None for time in times)
    times.append(last.timings.finished)
    assert times == sorted(times)
    assert first.timings.first_token == last.timings.first_token
