"""AdaLoRA, VeRA and LoHa that PEFT wrote: lowered to pairs, they add what PEFT adds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, VeraConfig, get_peft_model
from peft_oracle import (
    ALL,
    TinyLlama,
    adapted_keys,
    edit_config,
    load_in_peft,
    peft_increment,
    read_tensors,
    without_peft_warnings,
    write_tensors,
)
from torch import Tensor

from adapters import CompactLoRA, read_peft_adapter, rebuild_factors
from adapters.errors import MalformedAdapterError, UnsupportedAdapterError
from core.model_config import BaseInfo

QV = ["q_proj", "v_proj"]


@without_peft_warnings
def save_lowered(
    llama: TinyLlama,
    path: Path,
    kind: str,
    *,
    kept: dict[str, list[bool]] | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> None:
    """Let PEFT save a random adapter of `kind`. `kept`: AdaLoRA's singular values, by module."""
    make = {"adalora": AdaLoraConfig, "vera": VeraConfig, "loha": LoHaConfig}[kind]
    if kind == "adalora":
        settings = {"total_step": 10} | settings
    model = get_peft_model(
        llama.model(), make(task_type="CAUSAL_LM", **{"target_modules": ALL, **settings})
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "vera_lambda", "hada_")):
            parameter.data.normal_(0, 0.3, generator=generator)
    if kept is not None:
        model.peft_config["default"].rank_pattern = {
            f"{path}.lora_E.default": flags for path, flags in kept.items()
        }
    model.to(dtype).save_pretrained(path)


LAYER0 = "model.layers.0.self_attn"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("adalora", {"init_r": 6, "lora_alpha": 3}),
    "adalora_default_alpha": ("adalora", {"init_r": 4, "target_modules": QV}),
    "adalora_negative_alpha": ("adalora", {"init_r": 4, "lora_alpha": -2, "target_modules": QV}),
    "adalora_pruned": (
        "adalora",
        {
            "init_r": 4,
            "target_modules": QV,
            "kept": {
                f"{LAYER0}.q_proj": [True, False, True, False],
                f"{LAYER0}.v_proj": [False, False, False, True],
                "model.layers.1.self_attn.q_proj": [True] * 4,
                "model.layers.1.self_attn.v_proj": [False, True, True, True],
            },
        },
    ),
    "adalora_bf16": ("adalora", {"init_r": 3, "dtype": torch.bfloat16}),
    "vera": ("vera", {"r": 16}),
    "vera_qv": ("vera", {"r": 5, "target_modules": QV, "projection_prng_key": 7}),
    "vera_layer1": ("vera", {"r": 8, "layers_to_transform": [1]}),
    "loha": ("loha", {"r": 3, "alpha": 5}),
    "loha_patterns": (
        "loha",
        {"r": 2, "alpha": 4, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 1}},
    ),
    "loha_conv": ("loha", {"r": 2, "alpha": 2, "use_effective_conv2d": True, "rank_dropout": 0.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_increments_equal_peft(name: str, llama: TinyLlama, base: BaseInfo, tmp_path: Path) -> None:
    kind, settings = CASES[name]
    save_lowered(llama, tmp_path, kind, **settings)
    compact = read_peft_adapter(tmp_path, base)
    assert isinstance(compact, CompactLoRA)
    factors = rebuild_factors(compact)
    model = load_in_peft(llama, tmp_path)
    if settings.get("dtype") is not None:
        model = model.float()
    assert set(factors.pairs) == adapted_keys(model)
    for key, (a_RI, b_RO, scale) in factors.pairs.items():
        x_TI = torch.randn(5, a_RI.shape[1])
        expected = peft_increment(model, key, x_TI)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(scale * (x_TI @ a_RI.T) @ b_RO, expected, rtol=1e-5, atol=1e-5)


def test_a_module_that_was_pruned_to_nothing_is_the_bases(
    llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    kept = {f"{LAYER0}.q_proj": [False, False]}
    save_lowered(llama, tmp_path, "adalora", init_r=2, target_modules=QV, kept=kept)
    factors = rebuild_factors(read_peft_adapter(tmp_path, base))
    assert {key.path for key in factors.pairs} == {
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in QV
    } - set(kept)


def test_pruned_ranks_are_those_of_the_pattern(
    llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    save_lowered(llama, tmp_path, "adalora", **CASES["adalora_pruned"][1])
    factors = rebuild_factors(read_peft_adapter(tmp_path, base))
    assert sorted(len(pair.a_RI) for pair in factors.pairs.values()) == [1, 2, 3, 4]


def without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    left = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(left) < len(tensors)
    return left


def stray(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {**tensors, name: torch.zeros(3)}


Q0 = f"base_model.model.{LAYER0}.q_proj"
BROKEN: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no_lambda": ("vera", lambda t: without(t, f"{Q0}.vera_lambda_d"), "vera_lambda_d is missing"),
    "no_projection": ("vera", lambda t: without(t, "vera_B"), "base_model.vera_B is missing"),
    "no_values": ("adalora", lambda t: without(t, f"{Q0}.lora_E"), "lora_E is missing"),
    "half": ("loha", lambda t: without(t, f"{Q0}.hada_w2_b"), "hada_w2_b is missing"),
    "conv": ("loha", lambda t: stray(t, f"{Q0}.hada_t1"), "hada_t1.*not part of an adapter"),
    "shape": ("loha", lambda t: {**t, f"{Q0}.hada_w1_a": torch.zeros(64, 9)}, r"\(64, 9\), must"),
    "nan": (
        "vera",
        lambda t: {**t, f"{Q0}.vera_lambda_d": torch.full((4,), torch.nan)},
        "not finite",
    ),
    "overflow": (
        "loha",
        lambda t: {n: torch.full_like(v, 1e30) for n, v in t.items()},
        "lowered factors has values that are not finite",
    ),
    "whole_number": (
        "adalora",
        lambda t: {**t, f"{Q0}.lora_A": torch.zeros(4, 64, dtype=torch.int32)},
        "is torch.int32, must be one of",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(
    name: str, llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    kind, damage, message = BROKEN[name]
    rank = {"init_r": 4} if kind == "adalora" else {"r": 4}
    save_lowered(llama, tmp_path, kind, **rank)
    write_tensors(tmp_path, damage(read_tensors(tmp_path)))
    with pytest.raises(MalformedAdapterError, match=message):
        read_peft_adapter(tmp_path, base)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("vera", {"save_projection": False}, "save_projection=False.*not in the file"),
        ("vera", {"bias": "vera_only"}, "bias='vera_only'"),
        ("loha", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("adalora", {"use_dora": True}, "use_dora"),
        ("adalora", {"target_modules": ["q_proj", "lm_head"]}, "includes lm_head"),
    ],
)
def test_what_is_not_served_is_named(
    kind: str,
    changes: dict[str, Any],
    message: str,
    llama: TinyLlama,
    base: BaseInfo,
    tmp_path: Path,
) -> None:
    save_lowered(llama, tmp_path, kind)
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedAdapterError, match=message):
        read_peft_adapter(tmp_path, base)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("adalora", {"rank_pattern": {f"{LAYER0}.q_proj.lora_E": [True]}}, "a list of 12 booleans"),
        ("adalora", {"rank_pattern": {f"{LAYER0}.q_proj.lora_E": 3}}, "a list of 12 booleans"),
        ("adalora", {"rank_pattern": [3]}, "rank_pattern is"),
        ("adalora", {"init_r": 0}, "init_r is 0"),
        ("vera", {"r": "many"}, "r is 'many'"),
        ("loha", {"alpha": float("inf")}, "alpha is inf"),
        ("loha", {"rank_pattern": {"q_proj": 1.5}}, "rank_pattern.*1.5"),
    ],
)
def test_malformed_configs_are_named(
    kind: str,
    changes: dict[str, Any],
    message: str,
    llama: TinyLlama,
    base: BaseInfo,
    tmp_path: Path,
) -> None:
    save_lowered(llama, tmp_path, kind)
    edit_config(tmp_path, **changes)
    with pytest.raises(MalformedAdapterError, match=message):
        read_peft_adapter(tmp_path, base)
