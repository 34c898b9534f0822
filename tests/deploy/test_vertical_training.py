"""Vertical Llamas as they are trained: what is shared, what is stored, and that they learn."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from core import LLM, EngineConfig, SamplingParams
from core.model_config import read_model_config
from core.vertical import VerticalConfig
from deploy.vertical import train as training
from deploy.vertical.corpus import all_windows, batches, byte_tokenizer, save_tokenizer, token_ids
from deploy.vertical.counting import ViTGeometry, full_parameters, parameter_ratio
from deploy.vertical.modules import make_vertical, num_parameters, save_vertical

SMALL = training.Recipe(
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    chunk_sizes=(3, 2),
    window=32,
    batch_size=4,
    num_steps=30,
    warmup_steps=5,
    eval_every=15,
)


def disturbed(vertical: VerticalConfig) -> LlamaForCausalLM:
    """A vertical model whose increments are not zero any more."""
    model = training.new_model(SMALL, None)
    make_vertical(model, vertical)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("b_OR"):
                parameter.normal_(0, 0.05)
    return model


def test_the_papers_share_of_parameters() -> None:
    """26.65 % at rank 2, and what the same formula says at ranks 4 and 8."""
    ratios = [100 * parameter_ratio(ViTGeometry(), 3, rank) for rank in (2, 4, 8)]
    assert [round(ratio, 3) for ratio in ratios] == [26.647, 26.902, 27.414]
    assert round(ratios[0], 2) == 26.65


def test_the_formula_counts_a_real_vision_transformer() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 48, "num_layers": 3, "image_size": 32, "patch_size": 8}
    for qkv_bias in (False, True):
        geometry = ViTGeometry(**sizes, num_classes=7, qkv_bias=qkv_bias)
        config = ViTConfig(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=192,
            image_size=32,
            patch_size=8,
            qkv_bias=qkv_bias,
            num_labels=7,
        )
        assert full_parameters(geometry) == num_parameters(ViTForImageClassification(config))


@pytest.mark.parametrize("kind", ["recursive", "base-relative"])
def test_what_is_served_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    """The engine's greedy tokens are the module's, both ways, and the file holds no more."""
    vertical = VerticalConfig((3, 2), 2, 3.0, kind, ("q_proj", "k_proj", "v_proj", "down_proj"))
    model = disturbed(vertical).eval()
    save_vertical(model, vertical, tmp_path / "m", torch.float32)
    save_tokenizer(tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == num_parameters(model)
    prompt = [0, *b"Hello, chunk"]
    ids = torch.tensor([prompt])
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=-1,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    for way in ("factored", "expanded"):
        llm = LLM(tmp_path / "m", EngineConfig(device="cpu", dtype="float32", vertical=way))
        done = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
        assert list(done[0].token_ids) == expected


def test_layers_of_a_chunk_share_their_matrices_and_increments() -> None:
    model = training.new_model(SMALL, 2)
    attention = [layer.self_attn.q_proj for layer in model.model.layers]
    assert attention[1].base is attention[0] and attention[2].base is attention[0]
    assert isinstance(attention[3], nn.Linear) and attention[4].base is attention[3]
    assert attention[2].increments[0] is attention[1].increments[0]
    full = num_parameters(training.new_model(SMALL, None))
    assert num_parameters(model) < 0.6 * full


def test_alpha_scales_the_increments_and_is_what_is_stored(tmp_path: Path) -> None:
    recipe = replace(SMALL, alpha=1.0)
    model = training.new_model(recipe, 4)
    assert model.model.layers[1].mlp.up_proj.scale == 0.25
    save_vertical(model, training.vertical_config(recipe, 4), tmp_path, torch.float32)
    assert read_model_config(tmp_path).vertical.scale == 0.25
    assert training.new_model(SMALL, 4).model.layers[1].mlp.up_proj.scale == 1.0


def test_all_increments_and_bases_learn() -> None:
    """The gradient reaches each from every layer in which it counts."""
    vertical = training.vertical_config(SMALL, 2)
    model = disturbed(vertical)
    training._loss(model, next(batches(token_ids(True), 2, 32, 0))).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("rank", [None, 2])
def test_the_loss_falls(rank: int | None) -> None:
    model = training.new_model(SMALL, rank)
    held_out = all_windows(token_ids(held_out=True), 32)[:40]
    before = training.evaluate(model, held_out)
    curve = training.train(model, SMALL, "small")
    assert [point["step"] for point in curve] == [15, 30]
    assert curve[-1]["held_out"] < curve[0]["held_out"] < before - 0.5


def test_no_held_out_topic_is_trained_on() -> None:
    from pydoc_data.topics import topics

    seen, held = (bytes((ids[ids > 1] - 2).tolist()) for ids in map(token_ids, (False, True)))
    whole = sum(len(text.encode()) for text in topics.values())
    assert len(seen) + len(held) == whole and 0.02 * whole < len(held) < 0.2 * whole
    pieces = [held[start : start + 200] for start in range(0, len(held) - 200, 1000)]
    assert sum(piece in seen for piece in pieces) <= 0.02 * len(pieces)


def test_the_same_seed_gives_the_same_batches() -> None:
    ids = token_ids(held_out=True)
    first, second = (list(islice(batches(ids, 3, 16, seed=4), 3)) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    windows = all_windows(ids, 16)
    assert windows.shape[1] == 17 and torch.equal(windows[0, -1:], windows[1, :1])


def test_the_byte_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("plain", " spaces  and\n\ttabs ", "Käse — 東京 🙂", "\x00\x7f"):
            ids = tokenizer(text).input_ids
            assert ids == [byte + 2 for byte in text.encode()]
            assert tokenizer.decode(ids) == text


def test_the_command_writes_results_curves_and_a_checkpoint(tmp_path: Path) -> None:
    training.main(["--ranks", "2", "--no-full", "--save", "2", "--out", str(tmp_path)], SMALL)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["models"]) == ["vertical, rank 2"]
    assert (tmp_path / "curves.png").stat().st_size > 5000
    llm = LLM(tmp_path / "model", EngineConfig(device="cpu", dtype="float32"))
    done = llm.generate(["The "], SamplingParams(temperature=0, max_tokens=5))
    assert len(done[0].token_ids) > 0


def test_a_scaled_run_stands_beside_others(tmp_path: Path) -> None:
    small = ["--no-full", "--steps", "2"]
    training.main([*small, "--ranks", "2", "--out", str(tmp_path / "plain")], SMALL)
    plain = json.loads((tmp_path / "plain" / "results.json").read_text())["models"]
    add = ["--add", str(tmp_path / "plain" / "results.json")]
    training.main([*small, "--ranks", "2", "--alpha", "0.5", *add, "--out", str(tmp_path)], SMALL)
    both = json.loads((tmp_path / "results.json").read_text())["models"]
    assert list(both) == ["vertical, rank 2", "vertical, rank 2, alpha 0.5"]
    assert both["vertical, rank 2"] == plain["vertical, rank 2"]
    last = [model["curve"][-1]["held_out"] for model in both.values()]
    assert last[0] != last[1]
    again = ["--no-full", "--ranks", "--add", str(tmp_path / "results.json")]  # trains nothing
    training.main([*again, "--out", str(tmp_path / "again")], SMALL)
    assert json.loads((tmp_path / "again" / "results.json").read_text())["models"] == both


def test_less_text_and_another_seed(tmp_path: Path) -> None:
    """34 bytes are one window, which is learnt by heart; seeds are told apart."""
    training.main(["--ranks", "--bytes", "34", "--seed", "3", "--out", str(tmp_path)], SMALL)
    (named,) = json.loads((tmp_path / "results.json").read_text())["models"].items()
    assert named[0] == "full, seed 3"
    end = named[1]["curve"][-1]
    assert end["train"] < end["held_out"] - 0.5
    scaled = replace(SMALL, alpha=1.0, seed=3)
    assert training.name_of(2, scaled) == "vertical, rank 2, alpha 1, seed 3"
