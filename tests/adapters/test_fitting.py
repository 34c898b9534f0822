"""LoRA as VB-LoRA: how near mixtures come, and that PEFT reads what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_oracle import TinyLlama, save_lora
from test_peft_parity import assert_equals_peft

from adapters import CompactVBLoRA, read_peft_adapter, rebuild_factors
from adapters.training.fitting import Fit, balanced, fit_bank, relative_errors, sub_vectors
from adapters.training.vblora_files import write_vblora
from core.factors import AdapterFactors, LowRankPair, ModuleKey
from core.model_config import BaseInfo


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(count: int, num_vectors: int, length: int, topk: int) -> torch.Tensor:
    """Mixtures of `topk` of so many random vectors."""
    bank = noise(num_vectors, length, seed=1)
    rng = torch.Generator().manual_seed(2)
    weights = torch.rand(count, topk, generator=rng)
    indices = torch.stack([torch.randperm(num_vectors, generator=rng)[:topk] for _ in range(count)])
    return ((weights / weights.sum(1, keepdim=True))[..., None] * bank[indices]).sum(1)


def error_of(fit: Fit, targets: torch.Tensor) -> float:
    return float((fit.mixtures - targets).norm() / targets.norm())


@pytest.mark.parametrize("topk", [1, 2, 3, 5])
def test_mixtures_are_of_different_vectors_with_weights_that_sum_to_one(topk: int) -> None:
    fit = fit_bank(noise(300, 8), num_vectors=20, topk=topk, rounds=3)
    assert fit.bank_HB.shape == (20, 8) and fit.indices_NK.shape == (300, topk)
    assert (fit.weights_NK >= 0).all()
    assert torch.allclose(fit.weights_NK.sum(1), torch.ones(300), atol=1e-6)
    assert (fit.weights_NK.diff(dim=1) <= 0).all(), "they are not in descending order"
    assert all(len(set(row.tolist())) == topk for row in fit.indices_NK)


def test_more_vectors_and_longer_mixtures_come_nearer() -> None:
    targets = noise(400, 8)
    by_bank = [error_of(fit_bank(targets, num_vectors=n, topk=2), targets) for n in (8, 32, 128)]
    by_topk = [error_of(fit_bank(targets, num_vectors=32, topk=k), targets) for k in (1, 2, 4)]
    assert by_bank[0] > by_bank[1] > by_bank[2] and by_topk[0] > by_topk[1] > by_topk[2]


def test_what_a_bank_has_made_is_found_far_better_than_noise() -> None:
    made, unmade = planted(600, 12, 16, 2), noise(600, 16)
    errors = [error_of(fit_bank(t, num_vectors=16, topk=2, rounds=40), t) for t in (made, unmade)]
    assert errors[0] < 0.4 < 0.7 < errors[1]


def test_errors_are_told_round_by_round_and_the_best_is_kept() -> None:
    targets, told = noise(200, 8), []
    fit = fit_bank(targets, num_vectors=16, topk=2, rounds=12, progress=told.append)
    assert len(told) == 12 and told[-1] < told[0]
    assert error_of(fit, targets) == pytest.approx(min(told), rel=1e-5)


def test_a_bank_larger_than_its_targets() -> None:
    targets = noise(6, 8)
    fit = fit_bank(targets, num_vectors=20, topk=1, rounds=5)
    assert error_of(fit, targets) < 1e-3


@pytest.mark.parametrize("rank", [2, 3, 7])
def test_balanced_pairs_mean_the_same(rank: int) -> None:
    pair = LowRankPair(noise(3, 24), 9 * noise(3, 10, seed=1), 0.5)
    own = balanced(pair, rank)
    assert own.scale == 1 and len(own.a_RI) == rank == len(own.b_RO)
    wanted, got = (p.scale * p.b_RO.T @ p.a_RI for p in (pair, own))
    if rank >= 3:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert not own.a_RI[3:].any()
    else:
        least = torch.linalg.svdvals(wanted)[rank:].norm()
        assert (got - wanted).norm() == pytest.approx(float(least), rel=1e-4)
    assert own.a_RI.norm() == pytest.approx(float(own.b_RO.norm()), rel=1e-4)


def test_relative_errors() -> None:
    key = ModuleKey(0, "q_proj")
    pair = LowRankPair(noise(2, 6), noise(2, 5, seed=1), 2.0)
    for factor, expected in ((1.0, 0.0), (0.0, 1.0), (0.75, 0.25)):
        own = {key: LowRankPair(pair.a_RI, factor * pair.b_RO, 2.0)}
        ((found, error),) = relative_errors({key: pair}, AdapterFactors("x", own, 0))
        assert found == key and error == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("topk", "num_vectors", "settings"),
    [(2, 32, {}), (1, 300, {}), (3, 64, {"r": 2, "target_modules": ["v_proj", "down_proj"]})],
)
def test_peft_reads_what_is_written(
    topk: int,
    num_vectors: int,
    settings: dict[str, object],
    llama: TinyLlama,
    base: BaseInfo,
    tmp_path: Path,
) -> None:
    save_lora(llama, tmp_path / "lora", **settings)
    wanted = rebuild_factors(read_peft_adapter(tmp_path / "lora", base)).pairs
    rank = max(len(pair.a_RI) for pair in wanted.values())
    pairs = {key: balanced(pair, rank) for key, pair in wanted.items()}
    targets = sub_vectors(pairs, 16)
    fit = fit_bank(targets, num_vectors=num_vectors, topk=topk, rounds=3)
    write_vblora(tmp_path / "made", fit, pairs, "tiny")
    adapter = read_peft_adapter(tmp_path / "made", base)
    assert isinstance(adapter, CompactVBLoRA)
    factors = rebuild_factors(adapter)
    assert_equals_peft(factors, llama, tmp_path / "made")
    again = sub_vectors({key: factors.pairs[key] for key in pairs}, 16)
    torch.testing.assert_close(again, fit.mixtures, rtol=1e-5, atol=1e-6)
