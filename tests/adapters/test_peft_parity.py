"""Factors of adapters that PEFT wrote equal what PEFT computes with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import (
    ALL,
    TinyLlama,
    adapted_keys,
    edit_config,
    load_in_peft,
    peft_increment,
    peft_module,
    read_tensors,
    save_lora,
    save_vblora,
    write_tensors,
)

from adapters import CompactLoRA, CompactVBLoRA, read_peft_adapter, rebuild_factors
from core.factors import AdapterFactors
from core.model_config import BaseInfo

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}

VBLORA_CASES: dict[str, dict[str, Any]] = {
    "topk": {},
    "logits": {"save_only_topk_weights": False},
    "k1_topk": {"topk": 1},
    "k1_logits": {"topk": 1, "save_only_topk_weights": False},
    "k3_topk": {"topk": 3, "r": 3},
    "k3_logits": {"topk": 3, "r": 3, "save_only_topk_weights": False},
    "k_all": {"topk": 8, "num_vectors": 8, "save_only_topk_weights": False},
    "b8": {"vector_length": 8},
    "b32": {"vector_length": 32, "r": 1},
    "h256_int16": {"num_vectors": 256},
    "h40000_int32": {"num_vectors": 40_000, "vector_length": 32, "target_modules": ["k_proj"]},
    "qv": {"target_modules": ["q_proj", "v_proj"]},
    "mlp_regex": {"target_modules": r".*\.mlp\.(gate|down)_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "exclude": {"exclude_modules": ["k_proj", "model.layers.1.mlp.up_proj"]},
    "exclude_regex": {"exclude_modules": r".*layers\.0\..*"},
    "full_names": {"target_modules": ["model.layers.1.self_attn.o_proj", "0.mlp.down_proj"]},
    "one_layer": {"layers_to_transform": 1},
    "layer_list": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "bf16_logits": {"dtype": torch.bfloat16, "save_only_topk_weights": False},
    "fp16_logits": {"dtype": torch.float16, "save_only_topk_weights": False},
}

LORA_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8, "lora_alpha": 3},
    "fp16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "qv_layer1": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "patterns": {
        "rank_pattern": {
            "q_proj": 2,
            r"layers\.1\.mlp\..*_proj": 6,
            "^model.layers.0.mlp.up_proj": 5,
        },
        "alpha_pattern": {"k_proj": 32, r".*\.1\.self_attn\.o_proj": 1},
    },
    "patterns_rslora": {"rank_pattern": {"down_proj": 9}, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
}


def assert_equals_peft(factors: AdapterFactors, llama: TinyLlama, path: Path) -> None:
    model = load_in_peft(llama, path)
    assert set(factors.pairs) == adapted_keys(model)
    for key, pair in factors.pairs.items():
        a_RI, b_OR = peft_module(model, key)._get_lora_matrices("default")
        torch.testing.assert_close(pair.a_RI, a_RI.detach(), **TOLERANCE)
        torch.testing.assert_close(pair.b_RO, b_OR.T.detach(), **TOLERANCE)
        assert pair.scale == 1.0


@pytest.mark.parametrize("name", VBLORA_CASES)
def test_vblora_factors_equal_peft(
    name: str, llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    save_vblora(llama, tmp_path, **VBLORA_CASES[name])
    compact = read_peft_adapter(tmp_path, base)
    assert isinstance(compact, CompactVBLoRA)
    assert_equals_peft(rebuild_factors(compact), llama, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_topk_files_that_peft_cannot_read_back(
    dtype: torch.dtype, llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    """PEFT reads the same numbers once they are float32: the reference for such files."""
    save_vblora(llama, tmp_path / "half", dtype=dtype, topk=3)
    factors = rebuild_factors(read_peft_adapter(tmp_path / "half", base))
    shutil.copytree(tmp_path / "half", tmp_path / "single")
    tensors = read_tensors(tmp_path / "half")
    as_single = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    write_tensors(tmp_path / "single", _without_rounding_excess(as_single))
    assert_equals_peft(factors, llama, tmp_path / "single")


def _without_rounding_excess(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where rounding has lifted a sum over 1, PEFT would take the logarithm of a negative number.

    Serving clamps the last weight at 0; the nearest that PEFT can read has the same first weights
    and a sum of exactly 1, so no row may need more than that.
    """
    for name, tensor in tensors.items():
        if name.endswith("_topk_weights"):
            assert float(tensor.sum(-1).max()) <= 1, "choose another seed"
    return tensors


@pytest.mark.parametrize(
    "index_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str
)
def test_every_index_dtype(
    index_dtype: torch.dtype, vblora_dirs: list[Path], base: BaseInfo, tmp_path: Path
) -> None:
    shutil.copytree(vblora_dirs[0], tmp_path, dirs_exist_ok=True)
    tensors = read_tensors(tmp_path)
    write_tensors(
        tmp_path, {n: t.to(index_dtype) if "indices" in n else t for n, t in tensors.items()}
    )
    assert (
        read_peft_adapter(tmp_path, base).digest == read_peft_adapter(vblora_dirs[0], base).digest
    )


@pytest.mark.parametrize("name", LORA_CASES)
def test_lora_increments_equal_peft(
    name: str, llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    save_lora(llama, tmp_path, **LORA_CASES[name])
    compact = read_peft_adapter(tmp_path, base)
    assert isinstance(compact, CompactLoRA)
    factors = rebuild_factors(compact)
    model = load_in_peft(llama, tmp_path)
    assert set(factors.pairs) == adapted_keys(model)
    for key, (a_RI, b_RO, scale) in factors.pairs.items():
        x_TI = torch.randn(5, a_RI.shape[1])
        expected = peft_increment(model, key, x_TI)
        torch.testing.assert_close(scale * (x_TI @ a_RI.T) @ b_RO, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", [save_vblora, save_lora])
def test_fan_in_fan_out_changes_nothing_as_in_peft(
    save: Any, llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    """PEFT turns it off for torch.nn.Linear."""
    save(llama, tmp_path)
    plain = read_peft_adapter(tmp_path, base)
    edit_config(tmp_path, fan_in_fan_out=True)
    assert read_peft_adapter(tmp_path, base).digest == plain.digest
    flagged = load_in_peft(llama, tmp_path)
    for key, (a_RI, b_RO, scale) in rebuild_factors(plain).pairs.items():
        x_TI = torch.randn(5, a_RI.shape[1])
        expected = peft_increment(flagged, key, x_TI)
        torch.testing.assert_close(scale * (x_TI @ a_RI.T) @ b_RO, expected, rtol=1e-5, atol=1e-5)


def test_lora_scale_is_that_of_peft(llama: TinyLlama, base: BaseInfo, tmp_path: Path) -> None:
    save_lora(llama, tmp_path, **LORA_CASES["patterns"])
    factors = rebuild_factors(read_peft_adapter(tmp_path, base))
    model = load_in_peft(llama, tmp_path)
    for key, pair in factors.pairs.items():
        layer = peft_module(model, key)
        assert pair.scale == layer.scaling["default"]
        assert torch.equal(pair.a_RI, layer.lora_A["default"].weight)
        assert torch.equal(pair.b_RO, layer.lora_B["default"].weight.T)


def test_modes_may_be_mixed_by_tensor(llama: TinyLlama, base: BaseInfo, tmp_path: Path) -> None:
    """The tensors decide, whatever the flag says."""
    save_vblora(llama, tmp_path / "topk", seed=5)
    save_vblora(llama, tmp_path / "logits", seed=5, save_only_topk_weights=False)
    whole = read_peft_adapter(tmp_path / "logits", base)
    logits = read_tensors(tmp_path / "logits")
    mixed = {n: t for n, t in read_tensors(tmp_path / "topk").items() if "logits_A" not in n}
    mixed |= {n: t for n, t in logits.items() if "logits_A" in n}
    for flag in (False, True):
        write_tensors(tmp_path / "topk", mixed)
        edit_config(tmp_path / "topk", save_only_topk_weights=flag)
        assert read_peft_adapter(tmp_path / "topk", base).digest == whole.digest


def test_logits_of_a_reloaded_topk_adapter_hold_minus_infinity(
    llama: TinyLlama, base: BaseInfo, vblora_dirs: list[Path], tmp_path: Path
) -> None:
    """PEFT's own notation for 'not among the top k', when such a model is saved in full."""
    model = load_in_peft(llama, vblora_dirs[0])
    model.peft_config["default"].save_only_topk_weights = False
    model.save_pretrained(tmp_path)
    again = rebuild_factors(read_peft_adapter(tmp_path, base))
    first = rebuild_factors(read_peft_adapter(vblora_dirs[0], base))
    for key, pair in first.pairs.items():
        torch.testing.assert_close(again.pairs[key].a_RI, pair.a_RI, **TOLERANCE)
        torch.testing.assert_close(again.pairs[key].b_RO, pair.b_RO, **TOLERANCE)


def test_target_modules_default_to_those_of_peft(
    llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    save_vblora(llama, tmp_path, target_modules=None)
    edit_config(tmp_path, target_modules=None)
    factors = rebuild_factors(read_peft_adapter(tmp_path, base))
    assert {key.projection for key in factors.pairs} == {"q_proj", "v_proj"}
    assert_equals_peft(factors, llama, tmp_path)


def test_stored_parameters_are_counted_as_peft_does(
    llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    for number, overrides in enumerate([{}, {"num_vectors": 256, "topk": 3}, {"topk": 1}]):
        save_vblora(llama, tmp_path / str(number), target_modules=ALL, **overrides)
        model = load_in_peft(llama, tmp_path / str(number))
        compact = read_peft_adapter(tmp_path / str(number), base)
        assert compact.num_stored_parameters == model.get_nb_savable_parameters()[0]
