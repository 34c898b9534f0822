"""Vertical adapters: each layer adds its chunk's increments up to it, in one pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import request, run_all
from memory_factors import MemoryFactorSource
from peft_oracle import ALL, edit_config, read_tensors, write_tensors
from tiny_models import random_prompt, small_engine, write_tiny_llama
from transformers_oracle import assert_same_greedy, load_reference, reference_greedy

from adapters import MalformedAdapterError, UnsupportedAdapterError, read_peft_adapter
from adapters.rebuild import rebuild_factors
from core.factors import AdapterFactors, LowRankPair, ModuleKey
from core.model_config import BaseInfo, read_base_info

RANK, ALPHA, CHUNKS = 3, 6, [2, 1, 3]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> BaseInfo:
    path = tmp_path_factory.mktemp("deep") / "base"
    return read_base_info(write_tiny_llama(path, num_hidden_layers=sum(CHUNKS)))


def save(path: Path, base: BaseInfo, **changes: Any) -> Path:
    rng = torch.Generator().manual_seed(2)
    config = {
        "peft_type": "VERTICAL_LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "chunk_sizes": CHUNKS,
        "target_modules": ALL,
    } | changes
    tensors = {}
    for layer in range(base.config.num_layers):
        for name in config["target_modules"]:
            num_out, num_in = base.config.projection_shape(name)
            prefix = f"base_model.model.{ModuleKey(layer, name).path}"
            for side, shape in (("A", (RANK, num_in)), ("B", (num_out, RANK))):
                weight = torch.randn(shape, generator=rng) * 0.1
                tensors[f"{prefix}.lora_{side}.weight"] = weight
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_tensors(path, tensors)
    return path


def expected_increment(path: Path, key: ModuleKey) -> torch.Tensor:
    """sum of alpha / r B A over the chunk's layers up to the key's, dense and in fp64."""
    tensors = read_tensors(path)
    first = max(sum(CHUNKS[:n]) for n in range(len(CHUNKS)) if sum(CHUNKS[:n]) <= key.layer)
    total = torch.zeros((), dtype=torch.float64)
    for layer in range(first, key.layer + 1):
        prefix = f"base_model.model.{ModuleKey(layer, key.projection).path}.lora_"
        a, b = (tensors[f"{prefix}{side}.weight"].double() for side in "AB")
        total = total + ALPHA / RANK * b @ a
    return total


def test_increments_add_up_along_a_chunk(deep: BaseInfo, tmp_path: Path) -> None:
    path = save(tmp_path / "a", deep)
    factors = rebuild_factors(read_peft_adapter(path, deep))
    assert len(factors.pairs) == 7 * 6
    for key, pair in factors.pairs.items():
        own = pair.scale * pair.b_RO.T.double() @ pair.a_RI.double()
        torch.testing.assert_close(own, expected_increment(path, key), rtol=1e-6, atol=1e-7)
    ranks = [len(factors.pairs[ModuleKey(layer, "q_proj")].a_RI) for layer in range(6)]
    assert ranks == [3, 6, 3, 3, 6, 9]


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "torch"])
def test_tokens_are_those_of_the_merged_model(
    compiled: bool, deep: BaseInfo, tmp_path: Path
) -> None:
    path = save(tmp_path / "a", deep, target_modules=["q_proj", "v_proj", "down_proj"])
    factors = rebuild_factors(read_peft_adapter(path, deep))
    dense = {
        key: LowRankPair(torch.eye(pair.a_RI.shape[1]), expected_increment(path, key).T.float(), 1)
        for key, pair in factors.pairs.items()
    }
    reference = load_reference(deep.path)
    engine = small_engine(
        deep.path, MemoryFactorSource.of(factors), num_pages=400, compiled_kernels=compiled
    )
    prompts = [random_prompt(seed, 4 + 9 * seed) for seed in range(3)]
    asked = [request(str(n), p, digest=factors.digest) for n, p in enumerate(prompts)]
    results = run_all(engine, asked)
    for number, prompt in enumerate(prompts):
        expected = reference_greedy(reference, prompt, 8, AdapterFactors("dense", dense, 0))
        assert_same_greedy(results[str(number)].token_ids, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_sizes": [3, 2]}, r"chunk_sizes is \[3, 2\].*whose sum is 6, the base's layers"),
        ({"chunk_sizes": None}, "chunk_sizes is None"),
        ({"chunk_sizes": [6, 0]}, "chunk_sizes"),
        ({"chunk_sizes": [True] * 6}, "chunk_sizes"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "one"}, "lora_alpha is 'one'"),
        ({"layers_to_transform": [1]}, "not claim"),
    ],
)
def test_malformed_ones_are_named(
    changes: dict[str, Any], message: str, deep: BaseInfo, tmp_path: Path
) -> None:
    path = save(tmp_path / "a", deep)
    if "layers_to_transform" in changes:
        own = {n: t for n, t in read_tensors(path).items() if ".layers.1." in n}
        write_tensors(path, own)
    edit_config(path, **changes)
    with pytest.raises(MalformedAdapterError, match=message):
        read_peft_adapter(path, deep)


def test_a_layer_whose_tensors_are_missing(deep: BaseInfo, tmp_path: Path) -> None:
    path = save(tmp_path / "a", deep)
    lost = "base_model.model.model.layers.4.mlp.up_proj.lora_B.weight"
    write_tensors(path, {n: t for n, t in read_tensors(path).items() if n != lost})
    with pytest.raises(MalformedAdapterError, match=f"{lost} is missing"):
        read_peft_adapter(path, deep)


def test_what_is_not_served_is_named(deep: BaseInfo, tmp_path: Path) -> None:
    path = save(tmp_path / "a", deep)
    edit_config(path, use_dora=True)
    with pytest.raises(UnsupportedAdapterError, match="use_dora"):
        read_peft_adapter(path, deep)
