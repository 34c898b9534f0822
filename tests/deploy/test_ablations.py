"""Ablations: what is varied, that every kind of run trains and is judged, and the page of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_base import write_small_base
from transformers import AutoTokenizer

from deploy.ablations import __main__ as command
from deploy.ablations import runs
from deploy.ablations.variants import (
    ABLATIONS,
    LENDER,
    USUAL,
    LoRA,
    MovedLoRA,
    VBLoRA,
    all_variants,
    name_of,
)
from deploy.demo.tasks import TASKS, task_named

HERE = Path(command.__file__).parent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, default_base: Path) -> Path:
    """Its sizes are multiples of the demo banks' 96 and of 192."""
    tokenizer = AutoTokenizer.from_pretrained(default_base)
    path = tmp_path_factory.mktemp("ablations") / "base"
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 1}
    return write_small_base(path, tokenizer, **sizes, num_key_value_heads=1)


@pytest.fixture(autouse=True)
def few_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "HELDOUT_COUNT", 4)
    monkeypatch.setattr(runs, "MAX_TOKENS", 8)


def test_one_thing_is_varied_at_a_time() -> None:
    for key, ablation in ABLATIONS.items():
        assert VBLoRA() in ablation.variants.values(), f"{key} lacks what it stands beside"
        for variant in ablation.variants.values():
            if isinstance(variant, VBLoRA):
                own, usual = variant.recipe, USUAL
                differing = [f for f in vars(own) if getattr(own, f) != getattr(usual, f)]
                others = (bool(variant.noise), variant.lends, bool(variant.reseeded))
                assert len(differing) + sum(others) <= 1


def test_names_tell_variants_apart() -> None:
    variants = [v for ablation in ABLATIONS.values() for v in ablation.variants.values()]
    assert len({name_of(v) for v in variants}) == len(set(variants)) == len(dict(all_variants()))
    assert set(LENDER) == set(TASKS) and all(task != lender for task, lender in LENDER.items())


KINDS = {
    "usual": VBLoRA(),
    "noisy": VBLoRA(noise=0.1),
    "shared": VBLoRA(lends=True),
    "lora": LoRA(1, 2e-3, ("q_proj", "v_proj")),
    "moved": MovedLoRA(LoRA(1, 2e-3, ("q_proj", "v_proj")), 3),
    "merely fitted": MovedLoRA(LoRA(1, 2e-3, ("q_proj", "v_proj")), 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_is_judged(kind: str, base: Path) -> None:
    result = runs.run(task_named("classify"), KINDS[kind], base, num_steps=3, seed=0)
    assert 0 <= result["accuracy"] <= 1 and 0 < result["held_out_loss"] < 20
    assert [point[0] for point in result["curve"]] == ([] if kind == "merely fitted" else [1, 2, 3])
    shared = kind == "shared"
    assert (result["own_bytes"] < result["bytes"]) == shared
    assert result == runs.run(task_named("classify"), KINDS[kind], base, 3, 0) | {
        "seconds": result["seconds"]
    }


def test_a_frozen_bank_is_the_lenders(base: Path) -> None:
    loop = runs._loop(task_named("formal"), VBLoRA(lends=True), base, 1, 0)
    lent = runs._bank_of(LENDER["formal"])
    loop.step()
    (bank,) = (w for name, w in loop.model.named_parameters() if "vector_bank" in name)
    assert torch.equal(bank.detach(), lent) and not bank.requires_grad


def test_noise_is_of_training_alone(base: Path) -> None:
    task = task_named("formal")
    plain, noisy = (runs._loop(task, VBLoRA(noise=std), base, 1, 0) for std in (0.0, 0.5))
    examples = list(noisy._batch_of(0))
    assert noisy.loss_over(examples) == plain.loss_over(examples)
    assert noisy.step() != plain.step()


def small_run(task: Any, variant: Any, base: Path, num_steps: int, seed: int) -> dict[str, Any]:
    return {
        "accuracy": 0.5, "held_out_loss": 0.1, "curve": [[1, 0.1]], "bytes": 2000,
        "own_bytes": 1000 if getattr(variant, "lends", False) else 2000,
        "stored_parameters": 500, "num_steps": num_steps, "seed": seed, "seconds": 1,
    }  # fmt: skip


def test_the_command_makes_what_is_missing_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    made: list[str] = []

    def counted(task: Any, variant: Any, *rest: Any) -> dict[str, Any]:
        made.append(name_of(variant))
        return small_run(task, variant, *rest)

    monkeypatch.setattr(command, "run", counted)
    options = ["--out", str(tmp_path), "--base", str(base), "--steps", "3"]
    command.main([*options, "--tasks", "formal", "--variants", "vblora-k2-h256-b96"])
    assert made == ["vblora-k2-h256-b96"]
    command.main([*options, "--tasks", "classify", "--variants", "lora-r4-all-0.002"])
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| LoRA, rank 4, rate 2e-3 | 50.0% | - | - | - |" in page, "a mean of some tasks alone"
    command.main([*options, "--tasks", "formal", "classify"])
    num = len(dict(all_variants()))
    assert len(made) == 2 * num
    command.main([*options, "--tasks", "formal", "classify"])
    assert len(made) == 2 * num, "what was there has been made again"
    page = (tmp_path / "RESULTS.md").read_text()
    assert f"{2 * num} runs of 3 steps, seeds 0" in page
    assert "| another task's, frozen | 50.0% | 50.0% | 50.0% | 0.1000 | 2,000 (1,000) |" in page
    for key in ABLATIONS:
        assert f"({key}.png)" in page and (tmp_path / f"{key}.png").stat().st_size > 3000


def test_the_committed_page_is_of_the_committed_runs(tmp_path: Path) -> None:
    content = json.loads((HERE / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(content))
    command.main(["--out", str(tmp_path), "--show"])
    assert (tmp_path / "RESULTS.md").read_text() == (HERE / "RESULTS.md").read_text()
    known = dict(all_variants())
    for task, by_name in content["runs"].items():
        assert task in TASKS and set(by_name) <= set(known)


def test_a_run_may_be_longer_than_the_others(base: Path) -> None:
    result = runs.run(task_named("classify"), VBLoRA(lends=True, times=3), base, 2, seed=0)
    assert result["num_steps"] == 6 and [point[0] for point in result["curve"]][-1] == 6


def test_a_run_may_have_another_seed(base: Path) -> None:
    plain, other = (
        runs.run(task_named("classify"), VBLoRA(reseeded=more), base, 1, seed=1) for more in (0, 2)
    )
    assert (plain["seed"], other["seed"]) == (1, 3) and plain["curve"] != other["curve"]


def test_seeds_and_steps_are_the_recipes(base: Path) -> None:
    loop = runs._loop(task_named("formal"), VBLoRA(replace(USUAL, topk=3)), base, 7, 5)
    assert (loop.recipe.num_steps, loop.recipe.seed, loop.recipe.topk) == (7, 5, 3)  # type: ignore[attr-defined]
