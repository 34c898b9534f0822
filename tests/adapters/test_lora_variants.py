"""DoRA and LoRA-XS: gains and pairs do to a module's output what PEFT and the authors' code do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import (
    TinyLlama,
    adapted_keys,
    edit_config,
    load_in_peft,
    peft_increment,
    peft_module,
    read_tensors,
    save_lora,
    save_lora_xs,
    write_tensors,
)
from torch import Tensor
from torch.nn import Linear, Sequential

from adapters import AdapterStore, CompactLoRA, read_peft_adapter, rebuild_factors
from adapters.compact import blob_from_bytes
from adapters.errors import MalformedAdapterError, UnsupportedAdapterError
from core.factors import AdapterFactors, ModuleKey
from core.model_config import BaseInfo

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
MAGNITUDE = f"{Q0}.lora_magnitude_vector"
MAPPING = "default_lora_latent_mapping.weight"

DORA_CASES: dict[str, dict[str, Any]] = {
    "dora": {},
    "dora_rslora": {"use_rslora": True, "r": 8, "lora_alpha": 3},
    "dora_fp16": {"dtype": torch.float16},
    "dora_bf16": {"dtype": torch.bfloat16},
    "dora_qv_layer1": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "dora_patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*_proj": 6},
        "alpha_pattern": {"k_proj": 32},
    },
}
XS_CASES: dict[str, dict[str, Any]] = {
    "xs": {"r": 6},
    "xs_qv": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}},
    "xs_fp16": {"dtype": torch.float16, "lora_alpha": 1},
}


def own_output(factors: AdapterFactors, key: ModuleKey, x_TI: Tensor, base_TO: Tensor) -> Tensor:
    a_RI, b_RO, scale = factors.pairs[key]
    gain_O = factors.gains.get(key, torch.ones(1))
    return gain_O * base_TO + scale * (x_TI @ a_RI.T) @ b_RO


@pytest.mark.parametrize("name", DORA_CASES)
def test_dora_does_what_peft_does(
    name: str, llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    save_lora(llama, tmp_path, use_dora=True, **DORA_CASES[name])
    compact = read_peft_adapter(tmp_path, base)
    assert isinstance(compact, CompactLoRA)
    factors = rebuild_factors(compact)
    model = load_in_peft(llama, tmp_path)
    assert set(factors.pairs) == set(factors.gains) == adapted_keys(model)
    for key, gain_O in factors.gains.items():
        assert (gain_O - 1).abs().max() > 0.1, "this one tests little"
        layer = peft_module(model, key)
        x_TI = torch.randn(5, layer.in_features)
        with torch.no_grad():
            expected, base_TO = layer(x_TI), layer.base_layer(x_TI)
        found = own_output(factors, key, x_TI, base_TO)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", XS_CASES)
def test_lora_xs_does_what_its_authors_code_does(
    name: str, llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    save_lora_xs(llama, tmp_path / "xs", **XS_CASES[name])
    factors = rebuild_factors(read_peft_adapter(tmp_path / "xs", base))
    assert not factors.gains
    tensors = read_tensors(tmp_path / "xs")
    save_lora(llama, tmp_path / "plain", **XS_CASES[name])
    model = load_in_peft(llama, tmp_path / "plain").float()
    for key in factors.pairs:
        layer = peft_module(model, key)
        mapping = tensors[f"base_model.model.{key.path}.{MAPPING}"].float()
        inner = Linear(*mapping.shape, bias=False)
        inner.weight.data = mapping
        layer.lora_A["default"] = Sequential(layer.lora_A["default"], inner)
        layer.lora_A["default"].weight = layer.lora_A["default"][0].weight  # PEFT asks its dtype
        x_TI = torch.randn(5, layer.in_features)
        expected = peft_increment(model, key, x_TI)
        assert expected.abs().max() > 1e-3
        found = own_output(factors, key, x_TI, torch.zeros(()))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert set(factors.pairs) == adapted_keys(model)


def test_the_compact_form_of_dora_survives_the_store(
    llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    save_lora(llama, tmp_path / "dora", use_dora=True)
    compact = read_peft_adapter(tmp_path / "dora", base)
    assert isinstance(compact, CompactLoRA) and compact.gains is not None
    again = blob_from_bytes(compact.to_bytes()).join(base.config, None)
    assert again.digest == compact.digest
    store = AdapterStore.open(tmp_path / "store", base)
    record = store.add("d", tmp_path / "dora").record
    loaded, made = rebuild_factors(store.load(record.digest)), rebuild_factors(compact)
    assert loaded.num_bytes == made.num_bytes == record.factor_bytes == compact.factor_bytes
    for key, gain_O in made.gains.items():
        assert torch.equal(loaded.gains[key], gain_O)
    num_gains = sum(spec.out_features for spec in compact.modules)
    assert record.num_stored_parameters == len(compact.values) + num_gains


def test_other_magnitudes_are_another_adapter(
    llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    save_lora(llama, tmp_path, use_dora=True)
    before = read_peft_adapter(tmp_path, base).digest
    tensors = read_tensors(tmp_path)
    tensors[MAGNITUDE][3] *= 2
    write_tensors(tmp_path, tensors)
    assert read_peft_adapter(tmp_path, base).digest != before


def _with(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: (tensors.pop(name), None)[1]


BROKEN: dict[str, tuple[Any, dict[str, Any], Callable[[dict[str, Tensor]], None], str]] = {
    "no_magnitude": (save_lora, {"use_dora": True}, _without(MAGNITUDE), "vector is missing"),
    "shape": (save_lora, {"use_dora": True}, _with(MAGNITUDE, torch.ones(9)), r"must be \(64,\)"),
    "nan": (
        save_lora,
        {"use_dora": True},
        _with(MAGNITUDE, torch.full((64,), torch.nan)),
        "finite",
    ),
    "no_mapping": (save_lora_xs, {}, _without(f"{Q0}.{MAPPING}"), "mapping.weight is missing"),
    "xs_shape": (save_lora_xs, {}, _with(f"{Q0}.{MAPPING}", torch.ones(2, 2)), r"\(4, 4\)"),
    "stray": (save_lora_xs, {}, _with(f"{Q0}.lora_C.weight", torch.ones(2)), "lora_C"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(
    name: str, llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    save, settings, damage, message = BROKEN[name]
    save(llama, tmp_path, **settings)
    tensors = read_tensors(tmp_path)
    damage(tensors)
    write_tensors(tmp_path, tensors)
    with pytest.raises((MalformedAdapterError, UnsupportedAdapterError), match=message):
        read_peft_adapter(tmp_path, base)


@pytest.mark.parametrize(
    ("save", "changes", "error", "message"),
    [
        (save_lora_xs, {"use_dora": True}, UnsupportedAdapterError, "LoRA-XS knows no magnitudes"),
        (save_lora, {"use_dora": False}, UnsupportedAdapterError, "not served without use_dora"),
        (save_lora, {"lora_bias": True}, UnsupportedAdapterError, "lora_bias=True"),
        (save_lora, {"init_lora_weights": "pissa"}, UnsupportedAdapterError, "convert pissa"),
        (
            save_lora,
            {"target_modules": ".*q_proj", "layers_to_transform": [1]},
            MalformedAdapterError,
            "cannot be used when target_modules is a pattern",
        ),
    ],
)
def test_what_is_not_served_is_named(
    save: Any,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    llama: TinyLlama,
    base: BaseInfo,
    tmp_path: Path,
) -> None:
    save(llama, tmp_path, **({"use_dora": True} if save is save_lora else {}))
    edit_config(tmp_path, **changes)
    with pytest.raises(error, match=message):
        read_peft_adapter(tmp_path, base)
