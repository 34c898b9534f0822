"""What one request does, however broken, leaves the other requests of its batch as they were."""

from pathlib import Path

import pytest
import torch
from engine_runs import greedy, request, run_all
from memory_factors import MemoryFactorSource, random_factors
from tiny_models import random_prompt, small_engine
from transformers_oracle import assert_same_greedy, reference_greedy

from core.factors import AdapterFactors, LowRankPair
from core.requests import FinishReason, SamplingParams


def overflowing(factors: AdapterFactors, digest: str) -> AdapterFactors:
    """Finite factors whose products are not: every hidden state turns to inf, then NaN."""
    pairs = {
        key: LowRankPair(torch.full_like(pair.a_RI, 3e38), pair.b_RO * 1e30, 1.0)
        for key, pair in factors.pairs.items()
    }
    return AdapterFactors(digest, pairs, factors.num_bytes)


@pytest.fixture
def source(adapters, tiny_config) -> MemoryFactorSource:
    made = MemoryFactorSource.of(*adapters.values())
    made.known["broken"] = overflowing(random_factors(tiny_config, "x", rank=2), "broken")
    return made


def test_an_adapter_that_overflows_disturbs_nobody(
    tiny_path: Path, compiled: bool, source, reference, adapters
) -> None:
    """Its rows share the stacked product, its pages are used again by the others."""
    engine = small_engine(tiny_path, source, num_pages=40, compiled_kernels=compiled)
    prompts = {digest: random_prompt(n, 5 + n) for n, digest in enumerate(adapters)}
    for number in range(3):
        engine.add(request(f"broken-{number}", random_prompt(number, 9), greedy(6), "broken"))
        engine.add(request(f"base-{number}", random_prompt(90 + number, 6 + number)))
        for digest, prompt in prompts.items():
            engine.add(request(f"{digest}-{number}", prompt, None, digest))
        results = run_all(engine)
        broken = results.pop(f"broken-{number}")
        assert broken.finish_reason is FinishReason.ERROR
        assert "finite" in (broken.error or "")
        for name, result in results.items():
            digest = name.rpartition("-")[0]
            prompt = prompts.get(digest, random_prompt(90 + number, 6 + number))
            expected = reference_greedy(reference, prompt, 8, adapters.get(digest))
            assert_same_greedy(result.token_ids, expected)
    assert source.num_open_leases == 0


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0, seed=1, max_tokens=5),
        SamplingParams(temperature=1.0, seed=1, max_tokens=5, top_p=0.5),
        SamplingParams(temperature=0, max_tokens=5, logprobs=3),
        SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1),
    ],
    ids=["plain", "top_p", "logprobs", "prompt_logprobs"],
)
def test_logits_that_are_not_finite_are_an_error_of_their_request(
    sampling: SamplingParams, compiled: bool, tiny_path: Path, source
) -> None:
    engine = small_engine(tiny_path, source, compiled_kernels=compiled)
    result = run_all(engine, [request("a", random_prompt(1, 6), sampling, "broken")])["a"]
    assert result.finish_reason is FinishReason.ERROR
    assert result.token_ids == ()
    assert result.prompt_logprobs is None


def test_an_adapter_without_pairs_is_the_base(
    tiny_path: Path, compiled: bool, source, reference
) -> None:
    source.known["empty"] = AdapterFactors("empty", {}, 0)
    prompt = random_prompt(3, 7)
    expected = reference_greedy(reference, prompt, 8)
    for others in ([], [request("b", random_prompt(4, 5), None, "all-4")]):
        engine = small_engine(tiny_path, source, compiled_kernels=compiled)
        result = run_all(engine, [request("a", prompt, None, "empty"), *others])["a"]
        assert_same_greedy(result.token_ids, expected)
