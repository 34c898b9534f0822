"""The most probable token without all logits: the very one that all logits give, or None."""

import ctypes
from functools import partial
from pathlib import Path

import pytest
import torch
from engine_runs import greedy, request, run_all
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_forms import load_form
from memory_factors import MemoryFactorSource
from test_packed_weights import on_grid
from tiny_models import random_prompt, small_engine, write_tiny_llama
from torch import Tensor

from core.head import LogitsHead
from core.huge_pages import Arena
from core.kernels.packed_weights import pack_nearly
from core.kernels.panel_linear import PanelLinear
from core.kernels.screened_head import ScreenedHead, make_head
from core.requests import SamplingParams

FORMS = ("native", "avx512", "avx_vnni", "avx2")
KINDS = ("q8_0", "bf16", "fp16", "fp32")


@pytest.fixture(scope="module", params=FORMS)
def formed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library as processors with whole numbers of several widths have it."""
    library = load_form(request.param, tmp_path_factory.mktemp("form"))
    if not library.can_argmax():
        pytest.skip("this processor has no instructions for it")
    return library


def head_of(library: ctypes.CDLL, weight_VH: Tensor) -> ScreenedHead:
    head = make_head(library, partial(PanelLinear, library, Arena()), weight_VH)
    assert isinstance(head, ScreenedHead)
    return head


def matrix(kind: str, num_out: int, num_in: int, seed: int = 0) -> Tensor:
    if kind != "fp32":
        return on_grid(kind, num_out, num_in, seed)
    return torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed)) / 9


def rows(num_rows: int, num_in: int, seed: int, outlier: float = 1.0) -> Tensor:
    """As a Llama's last hidden states: some features are much larger than others."""
    rng = torch.Generator().manual_seed(seed)
    x_RH = torch.randn(num_rows, num_in, generator=rng)
    x_RH[:, seed % num_in] *= outlier
    return x_RH


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 32), (47, 64), (48, 576), (1000, 576), (5003, 96)])
def test_tokens_are_those_of_all_logits(
    kind: str, shape: tuple[int, int], formed: ctypes.CDLL
) -> None:
    head = head_of(formed, matrix(kind, *shape))
    for num_rows in (1, 2, 3, 4, 5, 7, 8, 16, 33, 64):
        x_RH = rows(num_rows, shape[1], num_rows, 30.0)
        assert head.most_probable(x_RH) == LogitsHead.most_probable(head, x_RH)
    assert head.most_probable(torch.empty(0, shape[1])) == []


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(KINDS),
    num_rows=st.integers(1, 9),
    num_out=st.integers(1, 400),
    blocks=st.integers(1, 20),
    scale=st.sampled_from((-145, -120, -70, -20, 0, 12)).map(lambda power: 2.0**power),
    outlier=st.sampled_from((0.0, 1.0, 1e3, 1e6)),
    few=st.booleans(),
)
def test_tokens_of_any_rows(
    seed: int,
    kind: str,
    num_rows: int,
    num_out: int,
    blocks: int,
    scale: float,
    outlier: float,
    few: bool,
    formed: ctypes.CDLL,
) -> None:
    """Close ones too: many outputs of few kinds are exactly equal, the first of which counts."""
    weight_VH = matrix(kind, num_out, 32 * blocks, seed)
    if few:
        weight_VH = weight_VH[torch.arange(num_out) % 3 * (num_out > 2)]
    head = head_of(formed, weight_VH)
    x_RH = rows(num_rows, 32 * blocks, seed, outlier) * scale
    assert head.most_probable(x_RH) == LogitsHead.most_probable(head, x_RH)


@pytest.mark.parametrize("kind", KINDS)
def test_screening_decides(kind: str, formed: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows like a model's are never given back to be computed whole."""
    head = head_of(formed, matrix(kind, 6000, 576))
    x_RH = rows(64, 576, 7, 20.0)
    expected = LogitsHead.most_probable(head, x_RH)

    def refuse(self: LogitsHead, x_RH: Tensor) -> list[int | None]:
        raise AssertionError(f"{len(x_RH)} rows are undecided")

    monkeypatch.setattr(LogitsHead, "most_probable", refuse)
    assert head.most_probable(x_RH) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_of_equals_gives_the_first(kind: str, formed: ctypes.CDLL) -> None:
    head = head_of(formed, matrix(kind, 1, 64).repeat(3000, 1))
    assert head.most_probable(rows(5, 64, 1)) == [0] * 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_told_and_disturb_nobody(
    value: float, formed: ctypes.CDLL
) -> None:
    head = head_of(formed, matrix("q8_0", 500, 96))
    x_RH = rows(9, 96, 3)
    expected = head.most_probable(x_RH)
    x_RH[4, 17] = value
    found = head.most_probable(x_RH)
    assert found[4] is None
    assert found[:4] + found[5:] == expected[:4] + expected[5:]


@pytest.mark.parametrize("largest", [3e38, 1e36, 1e25])
def test_logits_that_overflow_are_told(largest: float, formed: ctypes.CDLL) -> None:
    head = head_of(formed, matrix("fp32", 100, 64) * 1e4)
    x_RH = rows(3, 64, 3)
    x_RH[1] *= largest / x_RH[1].abs().max()
    expected = LogitsHead.most_probable(head, x_RH)
    assert head.most_probable(x_RH) == expected
    assert (expected[1] is None) == (largest > 1e35)


@pytest.mark.parametrize("kind", ["q4_1", "q4_0"])
def test_what_is_not_screened(kind: str, formed: ctypes.CDLL) -> None:
    """4 bits, which a sketch would be larger than, and rows of part of a block."""
    panels = partial(PanelLinear, formed, Arena())
    for weight_VH in (on_grid(kind, 100, 64), torch.randn(10, 48), torch.full((3, 32), 1e30)):
        head = make_head(formed, panels, weight_VH)
        assert type(head) is LogitsHead
        x_RH = rows(2, weight_VH.shape[1], 1)
        assert head.most_probable(x_RH) == head.logits(x_RH).argmax(1).tolist()


def test_a_processor_without_them_computes_all_logits(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    library = load_form("plain", tmp_path_factory.mktemp("form"))
    head = make_head(library, partial(PanelLinear, library, Arena()), matrix("fp32", 90, 64))
    assert type(head) is LogitsHead


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-3, 1.0, 1e4])
def test_a_sketch_is_half_a_step_away_at_most(scale: float) -> None:
    weight_VH = torch.randn(50, 96, generator=torch.Generator().manual_seed(1)) * scale
    weight_VH[3, 32:64] = 0.0
    nearly = pack_nearly(weight_VH)
    assert nearly is not None and nearly.step_OG is not None
    assert nearly.number_OI.min() >= 1 and nearly.number_OI.max() <= 255
    step_VH = nearly.step_OG.float().repeat_interleave(32, dim=1)
    away_VH = (nearly.weights() - weight_VH).abs()
    # steps are fp16's: with 2^-11 of 127 numbers less than the largest weight, below 2^-24 nothing
    assert (away_VH <= step_VH * (0.5 + 127 / 2048) + 127 * 2.0**-25).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_engine_answers_as_by_all_logits(dtype: torch.dtype, tmp_path: Path, adapters) -> None:
    """Greedy requests beside sampled ones and ones with logprobs, of base and adapters."""
    path = write_tiny_llama(tmp_path / "m", dtype=dtype, vocab_size=1000)
    engine = small_engine(path, MemoryFactorSource.of(*adapters.values()))
    if not isinstance(engine.model.head, ScreenedHead):
        pytest.skip("no compiled kernels here")
    digests = [None, *adapters, None]
    alike = [
        request(f"{n}", random_prompt(n, 9 + 5 * n), greedy(12), digest)
        for n, digest in enumerate(digests)
    ]
    others = [
        request("random", random_prompt(50, 9), SamplingParams(temperature=1.0, seed=1)),
        request("biased", random_prompt(51, 9), greedy(12, logit_bias={7: 100.0})),
        request("told", random_prompt(0, 9), greedy(12, logprobs=1)),
        request("prompt", random_prompt(52, 9), greedy(12, prompt_logprobs=1)),
    ]
    calls: list[int] = []
    most_probable = engine.model.head.most_probable
    engine.model.head.most_probable = lambda x_RH: calls.append(len(x_RH)) or most_probable(x_RH)
    screened = run_all(engine, [*alike, *others])
    assert max(calls) > len(alike) // 2, "greedy requests were not screened"
    assert screened["biased"].token_ids == (7,) * 12
    assert screened["told"].token_ids == screened["0"].token_ids
    engine.model.head = LogitsHead(engine.model.head.linear)
    plain = run_all(engine, [*alike, *others])
    for name, result in screened.items():
        assert result.token_ids == plain[name].token_ids
        assert result.logprobs == plain[name].logprobs
