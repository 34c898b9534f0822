"""The vision transformer, full and vertical: counted as the paper counts, shared as it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deploy.vertical import vision
from deploy.vertical.counting import parameter_ratio, vertical_parameters
from deploy.vertical.modules import num_parameters

SMALL = vision.Recipe(
    hidden_size=16, num_heads=2, num_chunks=2, chunk_size=2, num_epochs=12, batch_size=32
)


def stripes() -> tuple[vision.Split, vision.Split]:
    """Images of two kinds, upright and lying stripes, with noise."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (160,), generator=rng)
    upright = torch.tensor([1.0, -1.0] * 4).expand(8, 8)
    images = torch.where(labels[:, None, None] == 0, upright, upright.T)[:, None]
    images = images + 0.5 * torch.randn(images.shape, generator=rng)
    return vision.Split(images[:128], labels[:128]), vision.Split(images[128:], labels[128:])


@pytest.mark.parametrize("recipe", [SMALL, vision.Recipe()], ids=["small", "trained"])
@pytest.mark.parametrize("rank", [2, 8])
def test_parameters_are_those_of_the_formula(recipe: vision.Recipe, rank: int) -> None:
    full, vertical = (num_parameters(vision.new_model(recipe, r)) for r in (None, rank))
    assert vertical == vertical_parameters(recipe.geometry, recipe.num_chunks, rank)
    ratio = parameter_ratio(recipe.geometry, recipe.num_chunks, rank)
    assert vertical / full == pytest.approx(ratio)


def test_matrices_are_shared_in_a_chunk_biases_and_norms_are_not() -> None:
    blocks = vision.new_model(SMALL, 2).blocks
    for name in vision.FACTORISED:
        first, second, third, fourth = (getattr(block, name) for block in blocks)
        assert second.base is first and fourth.base is third and third is not first
        assert first.bias is None or second.bias is not first.bias
    assert blocks[0].norm1 is not blocks[1].norm1


def test_before_training_layers_of_a_chunk_are_equal() -> None:
    """Increments begin at zero, so a vertical model begins as one whose layers repeat."""
    model = vision.new_model(SMALL, 4)
    x_BPD = torch.randn(2, 17, 16)
    assert torch.allclose(model.blocks[0](x_BPD), model.blocks[1](x_BPD), atol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_it_learns(rank: int | None) -> None:
    seen, held_out = stripes()
    model = vision.new_model(SMALL, rank)
    before, _ = vision.evaluate(model, held_out)
    curve = vision.train(model, SMALL, seen, held_out, "small")
    assert len(curve) == SMALL.num_epochs
    assert curve[-1]["held_out"] < before / 4 and curve[-1]["accuracy"] > 0.9


def test_the_command_writes_results_and_curves(tmp_path: Path) -> None:
    recipe = replace(SMALL, num_epochs=2)
    vision.main(["--ranks", "2", "--out", str(tmp_path)], recipe, stripes())
    models = json.loads((tmp_path / "vision.json").read_text())["models"]
    assert list(models) == ["full", "vertical, rank 2"]
    shares = [model["parameters"] / models["full"]["parameters"] for model in models.values()]
    assert shares == pytest.approx([model["share"] for model in models.values()])
    assert (tmp_path / "vision.png").stat().st_size > 5000
