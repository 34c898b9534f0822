"""What the engine cannot run exactly is refused by name, before it answers anything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import small_engine, write_tiny_llama

from core.errors import InvalidRequestError, UnsupportedModelError
from core.model_config import read_base_info, read_model_config


def edit_config(path: Path, **changes: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "model")


@pytest.mark.parametrize("model_type", ["gpt2", "mistral", "qwen2", "gemma", None])
def test_other_architectures(model_type: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 9}))
    with pytest.raises(UnsupportedModelError, match=f"{model_type!r}"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ],
)
def test_options_that_the_forward_does_not_compute(
    changes: dict[str, Any], named: str, model: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read_base_info(edit_config(model, **changes))


def test_rope_variant_without_support(model: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32,
    }
    with pytest.raises(UnsupportedModelError, match="longrope"):
        small_engine(edit_config(model, rope_parameters=rope))


def test_heads_rotated_in_part(model: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor"):
        small_engine(edit_config(model, rope_parameters=rope))


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"'])
def test_config_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        read_model_config(tmp_path)


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        read_base_info(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_missing_tensor(name: str, model: Path) -> None:
    """An untied head that is absent is not replaced by the embedding."""
    edit_weights(model, lambda tensors: tensors.pop(name))
    with pytest.raises(UnsupportedModelError, match=name):
        small_engine(model)


def test_misshapen_and_integer_tensors(model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].T.contiguous()

    def to_int(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].T.contiguous().to(torch.int8)

    with pytest.raises(UnsupportedModelError, match=r"up_proj.*\(64, 96\)"):
        small_engine(edit_weights(model, transpose))
    with pytest.raises(UnsupportedModelError, match=r"up_proj.*int8"):
        small_engine(edit_weights(model, to_int))


def test_missing_shard(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m", max_shard_size="100KB")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UnsupportedModelError, match=shard.name):
        read_base_info(path)
    with pytest.raises(UnsupportedModelError, match=shard.name):
        small_engine(path)


def test_weights_that_are_not_safetensors(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="safetensors"):
        read_base_info(model)


def test_kv_budget_below_one_page(model: Path) -> None:
    with pytest.raises(InvalidRequestError, match="kv_cache_bytes"):
        small_engine(model, kv_cache_bytes=100)


def test_fingerprint_tells_other_weights_and_geometry(tmp_path: Path) -> None:
    first = write_tiny_llama(tmp_path / "a")
    assert (
        read_base_info(first).fingerprint
        == read_base_info(write_tiny_llama(tmp_path / "same")).fingerprint
    )
    others = [
        write_tiny_llama(tmp_path / "seed", seed=1),
        write_tiny_llama(tmp_path / "eps", rms_norm_eps=0.01),
        write_tiny_llama(tmp_path / "dtype", dtype=torch.bfloat16),
        write_tiny_llama(
            tmp_path / "theta", rope_parameters={"rope_type": "default", "rope_theta": 5e5}
        ),
    ]
    fingerprints = {read_base_info(path).fingerprint for path in (first, *others)}
    assert len(fingerprints) == 5


def test_eos_ids_of_both_files(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m", eos_token_id=[2, 9])
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 17]}))
    assert read_model_config(path).eos_token_ids == {2, 9, 17}
