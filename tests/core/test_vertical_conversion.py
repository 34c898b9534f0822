"""A plain Llama made vertical: exact where its layers allow that, and honest where they don't."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_vertical import load, model_logits
from tiny_models import random_prompt, write_tiny_llama
from transformers_oracle import assert_close_logits, load_reference, reference_logits
from vertical_models import write_expanded, write_vertical_llama

from core.errors import UnsupportedModelError
from core.model_config import read_model_config
from core.perplexity import perplexity, spread_windows
from core.vertical import VerticalConfig, even_chunks
from core.vertical_conversion import best_of_rank, convert_to_vertical

TOKENS = random_prompt(3, 40)


@pytest.mark.parametrize("kind", ["recursive", "base-relative"])
def test_layers_that_have_increments_are_found(kind: str, tmp_path: Path) -> None:
    vertical = write_vertical_llama(tmp_path / "v", increments=kind, rank=3, alpha=2.0)
    plain = write_expanded(tmp_path / "plain", vertical)
    about = VerticalConfig((3, 2), 3, 5.0, kind)
    fits = convert_to_vertical(plain, tmp_path / "again", about)
    assert len(fits) == 3 * 7 and max(fit.error for fit in fits) < 1e-6
    assert read_model_config(tmp_path / "again").vertical == about
    expected = reference_logits(load_reference(plain), TOKENS)
    assert_close_logits(model_logits(load(tmp_path / "again"), TOKENS), expected, 1e-5)


def test_unrelated_layers_are_told_apart(tmp_path: Path) -> None:
    """As far as two random matrices are from each other, and further than the rank by itself."""
    source = write_tiny_llama(tmp_path / "m", num_hidden_layers=4)
    told = []
    about = VerticalConfig((4,), 2, 2.0, "recursive", ("q_proj", "up_proj"))
    fits = convert_to_vertical(source, tmp_path / "v", about, progress=told.append)
    assert told == fits and [fit.key.layer for fit in fits] == [1, 2, 3] * 2
    for fit in fits:
        assert abs(fit.cosine) < 0.1
        assert 0.8 < fit.alone < fit.error
    plain, made = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "v"))
    assert made["model.layers.3.mlp.up_proj.vertical_B"].shape == (96, 2)
    assert "model.layers.3.mlp.up_proj.weight" not in made
    kept = [name for name in made if "vertical" not in name]
    assert all(made[name].equal(plain[name]) for name in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "m", num_hidden_layers=2, dtype=dtype)
    convert_to_vertical(source, tmp_path / "v", VerticalConfig((2,), 4, 4.0, "recursive"))
    made = load_file(tmp_path / "v" / "model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {dtype}
    assert model_logits(load(tmp_path / "v"), TOKENS).isfinite().all()


def test_the_best_of_a_rank() -> None:
    torch.manual_seed(0)
    low = torch.randn(9, 2, dtype=torch.float64) @ torch.randn(2, 7, dtype=torch.float64)
    for rank in (2, 3, 20):
        b_OR, a_RI = best_of_rank(low, rank)
        assert b_OR.shape == (9, rank) and a_RI.shape == (rank, 7)
        assert torch.allclose(b_OR @ a_RI, low)
    b_OR, a_RI = best_of_rank(low, 1)
    values = torch.linalg.svdvals(low)
    assert (low - b_OR @ a_RI).norm() == pytest.approx(float(values[1:].norm()))


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "m")
    with pytest.raises(UnsupportedModelError, match=r"chunks of 2, 1 layers are 3, .* has 2"):
        convert_to_vertical(source, tmp_path / "v", VerticalConfig((2, 1), 4, 4.0, "recursive"))
    vertical = write_vertical_llama(tmp_path / "vertical")
    with pytest.raises(UnsupportedModelError, match="is a vertical base already"):
        about = VerticalConfig((3, 2), 4, 4.0, "recursive")
        convert_to_vertical(vertical, tmp_path / "v", about)
    assert not (tmp_path / "v").exists()


def test_even_chunks() -> None:
    assert even_chunks(30, 3) == (10, 10, 10) and even_chunks(5, 3) == (2, 2, 1)
    assert even_chunks(4, 4) == (1, 1, 1, 1)
    for wrong in (0, 5):
        with pytest.raises(UnsupportedModelError, match=f"{wrong} chunks, must be 1 to 4"):
            even_chunks(4, wrong)


def test_windows_and_perplexity() -> None:
    assert spread_windows(range(10), 2, 4) == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert perplexity([-1.0, -3.0]) == pytest.approx(7.389, abs=1e-3)
