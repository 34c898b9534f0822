"""The sampler against slow twins, and by counting."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core import sampler
from core.errors import InvalidRequestError
from core.requests import GenerationRequest, SamplingParams
from core.sampler import logprobs_of, sample, uniform
from core.sequence import Sequence

VOCAB = 50
PROMPT = (7, 8, 9)


def sequence(output: tuple[int, ...] = (), **params: Any) -> Sequence:
    params.setdefault("max_tokens", 100)
    seq = Sequence.start(GenerationRequest("x", PROMPT, SamplingParams(**params)), 0.0)
    seq.token_ids += output
    return seq


def random_logits(seed: int, rows: int = 1, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def twin_probs(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """transformers' warpers one after the other: temperature, min_p, top_k, top_p."""
    scores = TemperatureLogitsWarper(params.temperature)(None, logits_V[None].double())
    warpers: list[Callable[..., Tensor]] = []
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(-1)[0]


def intervals(logits_V: Tensor, params: dict[str, Any], monkeypatch: Any) -> dict[int, float]:
    """The share of [0, 1) that leads to each token, measured through `sample` itself."""
    steps = 4000
    numbers = iter((number + 0.5) / steps for number in range(steps))
    monkeypatch.setattr(sampler, "uniform", lambda seed, place: next(numbers))
    seqs = [sequence(**params)] * steps
    tokens = sample(logits_V.expand(steps, -1), seqs, frozenset())
    return {token: count / steps for token, count in Counter(tokens).items()}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 10**9},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_p": 0.7, "top_k": 6},
        {"top_p": 0.8, "min_p": 0.05},
        {"top_p": 0.8, "top_k": 9, "min_p": 0.02, "temperature": 1.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_each_token_gets_its_share_of_the_unit_interval(
    params: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sweeping the uniform number over a fine grid gives each token its exact probability."""
    logits = random_logits(seed)[0]
    shares = intervals(logits, params, monkeypatch)
    expected = twin_probs(logits, SamplingParams(**params))
    for token, probability in enumerate(expected.tolist()):
        assert shares.get(token, 0.0) == pytest.approx(probability, abs=2 / 4000)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.05, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, VOCAB + 3),
    min_p=st.floats(0, 1),
)
def test_the_kept_set_is_exactly_that_of_the_slow_twin(
    seed: int, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    logits = random_logits(seed)
    expected = twin_probs(logits[0], params)
    probs = (logits.double() / temperature).softmax(-1)
    sorted_RV, ids = probs.sort(dim=-1, descending=True, stable=True)

    def column(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[:, None]

    kept = sampler._filtered(sorted_RV, [params], column)[0] > 0
    own = set(ids[0][kept].tolist())
    twin = set(torch.nonzero(expected)[:, 0].tolist())
    # Rounding may move a token that lies on the very border of the nucleus, one at most.
    border = {t for t in own ^ twin if _on_border(probs[0], params, t)}
    assert own ^ twin == border


def _on_border(probs: Tensor, params: SamplingParams, token: int) -> bool:
    warped = probs * (probs >= probs.max() * params.min_p)
    if params.top_k:
        warped = warped * (warped >= warped.topk(min(params.top_k, VOCAB)).values[-1])
    before = warped[warped > probs[token]].sum() / warped.sum()
    near_nucleus = abs(float(before) - params.top_p) < 1e-9
    near_min_p = abs(float(probs[token] / probs.max()) - params.min_p) < 1e-9
    return near_nucleus or near_min_p or float(probs[token]) < 1e-12


@pytest.mark.parametrize("params", [{}, {"top_k": 8}, {"top_p": 0.9, "temperature": 1.3}], ids=str)
def test_frequencies_over_many_seeds(params: dict[str, Any]) -> None:
    """Chi-square of 8,000 seeds; the bound is far out, the seeds are fixed."""
    logits, num_draws = random_logits(4, spread=1.5), 8000
    seqs = [sequence(seed=seed, **params) for seed in range(num_draws)]
    counts = Counter(sample(logits.expand(num_draws, -1), seqs, frozenset()))
    expected = twin_probs(logits[0], SamplingParams(**params)) * num_draws
    assert set(counts) <= set(torch.nonzero(expected)[:, 0].tolist())
    big = [token for token in range(VOCAB) if expected[token] >= 5]
    chi_square = sum((counts[t] - float(expected[t])) ** 2 / float(expected[t]) for t in big)
    degrees = len(big) - 1
    assert chi_square < degrees + 6 * math.sqrt(2 * degrees)


def test_frequencies_along_one_sequence() -> None:
    """One seed at many places is as random as many seeds at one place."""
    logits, num_draws = random_logits(4, spread=1.5), 10_000
    seqs = [sequence(output=(0,) * place, seed=5) for place in range(200)]
    places = [uniform(5, place) for place in range(num_draws)]
    assert abs(sum(places) / num_draws - 0.5) < 0.02
    deciles = Counter(int(10 * place) for place in places)
    assert all(abs(deciles[n] - num_draws / 10) < 200 for n in range(10))
    assert len(set(sample(logits.expand(200, -1), seqs, frozenset()))) > 10


@given(st.integers(-(2**70), 2**70), st.integers(0, 10**7))
def test_uniform_lies_in_the_half_open_interval(seed: int, place: int) -> None:
    number = uniform(seed, place)
    assert 0 <= number < 1
    assert uniform(seed, place) == number


def test_a_row_is_sampled_as_if_it_were_alone() -> None:
    """Same seed, same token, whatever the other rows of the batch ask for."""
    others = [
        {"temperature": 0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"presence_penalty": 1.0},
        {"logit_bias": {3: 5.0}},
        {"min_tokens": 4},
    ]
    for seed in range(40):
        logits = random_logits(seed, rows=2)
        for own in ({}, {"temperature": 0.7}, {"top_p": 0.8}, {"temperature": 0}):
            alone = sample(logits[:1], [sequence(seed=seed, **own)], frozenset({2}))
            for other in others:
                seqs = [sequence(seed=seed, **own), sequence(output=(1,), seed=9, **other)]
                assert sample(logits, seqs, frozenset({2}))[0] == alone[0], (own, other)
                together = sample(logits.flip(0), seqs[::-1], frozenset({2}))
                assert together[1] == alone[0], (own, other)


def test_an_edge_number_never_picks_a_dropped_token(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = ((1 << 52) - 1) / (1 << 52)
    for place in (0.0, largest):
        monkeypatch.setattr(sampler, "uniform", lambda seed, at, place=place: place)
        for seed in range(20):
            logits = random_logits(seed)
            logits[0, :3] = logits[0, -3:] = float("-inf")
            for params in ({}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.3}):
                token = sample(logits, [sequence(**params)], frozenset())[0]
                assert twin_probs(logits[0], SamplingParams(**params))[token] > 0


def test_greedy_takes_the_best_and_ignores_the_seed() -> None:
    logits = random_logits(1, rows=5)
    seqs = [sequence(temperature=0, seed=n, top_p=0.1) for n in range(5)]
    assert sample(logits, seqs, frozenset()) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_temperature_is_greedy(temperature: float, dtype: torch.dtype) -> None:
    logits = (random_logits(3, rows=8) * 100).to(dtype)
    seqs = [sequence(temperature=temperature, seed=n) for n in range(8)]
    assert sample(logits, seqs, frozenset()) == logits.argmax(-1).tolist()


def test_a_huge_temperature_is_nearly_uniform() -> None:
    num_draws = 5000
    seqs = [sequence(temperature=100, seed=n) for n in range(num_draws)]
    counts = Counter(sample(random_logits(3).expand(num_draws, -1), seqs, frozenset()))
    assert len(counts) == VOCAB
    assert max(counts.values()) < 2 * num_draws / VOCAB


def test_logits_of_any_size_leave_no_nan() -> None:
    logits = torch.full((1, VOCAB), -3e38)
    logits[0, 4] = 3e38
    for params in ({}, {"temperature": 1e-9}, {"top_p": 0.5}, {"temperature": 100.0}):
        assert sample(logits, [sequence(seed=1, **params)], frozenset()) == [4]


def test_penalties_count_generated_tokens_only() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 5], logits[0, 6] = 2.0, 1.9, 1.7
    greedy = {"temperature": 0}
    in_prompt = sequence(presence_penalty=2.0, frequency_penalty=2.0, **greedy)
    assert sample(logits, [in_prompt], frozenset()) == [7]  # 7 is a token of the prompt
    once = sequence(output=(7,), presence_penalty=0.15, **greedy)
    assert sample(logits, [once], frozenset()) == [5]
    twice = sequence(output=(7, 7, 5), frequency_penalty=0.11, **greedy)
    assert sample(logits, [twice], frozenset()) == [5]  # 1.78 against 1.79
    thrice = sequence(output=(7, 7, 7, 5, 5), frequency_penalty=0.11, **greedy)
    assert sample(logits, [thrice], frozenset()) == [6]  # 1.67, 1.68, 1.7
    rewarded = sequence(output=(6,), presence_penalty=-0.5, **greedy)
    assert sample(logits, [rewarded], frozenset()) == [6]
    assert logits[0, 7] == 2.0, "the model's logits are not changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_penalties_and_biases_count_in_every_dtype(dtype: torch.dtype) -> None:
    """At logits near 30, bf16 has steps of 0.25: adjustments are not lost in them."""
    logits = torch.zeros(1, VOCAB, dtype=dtype)
    logits[0, 7] = logits[0, 5] = 30.0
    assert sample(logits, [sequence(temperature=0, logit_bias={7: 0.05})], frozenset()) == [7]
    assert sample(logits, [sequence(temperature=0, logit_bias={5: -0.05})], frozenset()) == [7]
    seq = sequence(output=(5,), temperature=0, presence_penalty=0.05)
    assert sample(logits, [seq], frozenset()) == [7]


def test_logit_bias_bans_and_forces() -> None:
    logits = random_logits(2)
    best = int(logits.argmax())
    forced = sequence(temperature=0, logit_bias={11: 100.0})
    banned = sequence(temperature=1.0, seed=3, logit_bias={best: -100.0})
    assert sample(logits, [forced], frozenset()) == [11]
    draws = [sequence(seed=n, logit_bias={best: -100.0}) for n in range(500)]
    assert best not in sample(logits.expand(500, -1), draws, frozenset())
    assert sample(logits, [banned], frozenset()) != [best]


def test_min_tokens_forbids_every_stop() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2], logits[0, 4], logits[0, 9] = 9.0, 8.0, 7.0
    params: dict[str, Any] = {"stop_token_ids": frozenset({4}), "min_tokens": 2}
    for temperature in (0.0, 0.01):
        early = sequence(output=(1,), temperature=temperature, **params)
        late = sequence(output=(1, 1), temperature=temperature, **params)
        assert sample(logits, [early], frozenset({2})) == [9]
        assert sample(logits, [late], frozenset({2})) == [2]


def test_logprobs_are_those_of_the_plain_distribution() -> None:
    logits = random_logits(6, rows=3)
    expected = logits.log_softmax(-1)
    ranks = logits.argsort(dim=-1, descending=True).argsort(dim=-1) + 1
    for entry, row, token in zip(logprobs_of(logits, [4, 9, 30], 5), range(3), [4, 9, 30],
                                 strict=True):  # fmt: skip
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(expected[row, token]), abs=1e-6)
        assert entry.rank == int(ranks[row, token])
        best = expected[row].topk(5)
        assert list(entry.top) == best.indices.tolist()
        assert list(entry.top.values()) == pytest.approx(best.values.tolist(), abs=1e-6)
    assert logprobs_of(logits[:1], [4], 0)[0].top == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("min_p", 1.5), ("max_tokens", -1),
        ("min_tokens", 17), ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("logprobs", 21), ("prompt_logprobs", -1), ("logit_bias", {3: 101.0}),
        ("logit_bias", {3: math.nan}), ("top_k", 10**400), ("max_tokens", 10**400),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param is not None
    assert caught.value.param.startswith(field)
