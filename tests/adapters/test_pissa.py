"""PiSSA undone: over the plain base the LoRA that is written does what PiSSA does over its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import TinyLlama, adapted_keys, edit_config, load_in_peft, peft_module, save_lora

from adapters import read_peft_adapter, rebuild_factors
from adapters.errors import MalformedAdapterError, UnsupportedAdapterError
from adapters.pissa import convert_pissa
from core.model_config import BaseInfo

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 6, "lora_alpha": 3},
    "patterns": {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"k_proj": 32},
        "target_modules": ["q_proj", "k_proj", "down_proj"],
    },
}


@pytest.mark.parametrize("name", CASES)
def test_converted_it_does_what_peft_does(
    name: str, llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    save_lora(llama, tmp_path / "pissa", init_lora_weights="pissa", **CASES[name])
    told: list[tuple[int, int]] = []
    convert_pissa(
        tmp_path / "pissa", tmp_path / "lora", base, progress=lambda *done: told.append(done)
    )
    pissa, lora = (load_in_peft(llama, tmp_path / kind) for kind in ("pissa", "lora"))
    keys = adapted_keys(pissa)
    assert keys == adapted_keys(lora) and told[-1] == (len(keys), len(keys))
    factors = rebuild_factors(read_peft_adapter(tmp_path / "lora", base))
    assert set(factors.pairs) == keys
    for key in keys:
        was, now = peft_module(pissa, key), peft_module(lora, key)
        assert len(factors.pairs[key].a_RI) == 2 * was.r["default"]
        assert (was.base_layer.weight - now.base_layer.weight).abs().max() > 1e-3
        x_TI = torch.randn(5, was.in_features)
        with torch.no_grad():
            torch.testing.assert_close(now(x_TI), was(x_TI), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", True])
def test_others_are_refused(init: Any, llama: TinyLlama, base: BaseInfo, tmp_path: Path) -> None:
    save_lora(llama, tmp_path / "made")
    edit_config(tmp_path / "made", init_lora_weights=init)
    with pytest.raises(UnsupportedAdapterError, match="only 'pissa' of 'LORA'"):
        convert_pissa(tmp_path / "made", tmp_path / "lora", base)
    assert not (tmp_path / "lora").exists()


def test_a_broken_file_leaves_nothing(llama: TinyLlama, base: BaseInfo, tmp_path: Path) -> None:
    save_lora(llama, tmp_path / "made", init_lora_weights="pissa")
    edit_config(tmp_path / "made", r=5)
    with pytest.raises(MalformedAdapterError, match=r"must be \(5, 64\)"):
        convert_pissa(tmp_path / "made", tmp_path / "lora", base)
    assert not (tmp_path / "lora").exists()


def test_the_config_says_only_what_differs(
    llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    save_lora(llama, tmp_path / "pissa", init_lora_weights="pissa", **CASES["patterns"])
    convert_pissa(tmp_path / "pissa", tmp_path / "lora", base)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    narrow = {f"model.layers.{layer}.self_attn.q_proj": 4 for layer in (0, 1)}
    assert config["rank_pattern"] == config["alpha_pattern"] == narrow
