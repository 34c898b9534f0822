"""Opt-in: the mission's own size. Two layers of Llama-2-7B's width, adapters as in the paper.

Needs about 6 GB of memory. Run: make test ARGS="-m mission"
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft_oracle import LlamaOnDisk, save_vblora
from test_peft_tokens import references, run_mixed, write_word_tokenizer
from tiny_models import random_prompt
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import AdapterStore, read_peft_adapter, rebuild_factors
from core import EngineConfig, read_base_info
from core.factors import PROJECTIONS

PAPER = {
    "r": 4,
    "num_vectors": 2048,
    "vector_length": 256,
    "topk": 2,
}  # arXiv 2405.15179, Llama2-7B
NUM_LAYERS = 2

pytestmark = pytest.mark.mission


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama-2-7b-width")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    write_word_tokenizer(path, config.vocab_size)
    return path


@pytest.fixture(scope="module")
def adapter_dirs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed in (1, 2):
        save_vblora(LlamaOnDisk(base), root / f"seed-{seed}", seed=seed, **PAPER)
    return {path.name: path for path in sorted(root.iterdir())}


def test_tokens_are_pefts(base: Path, adapter_dirs: dict[str, Path], tmp_path: Path) -> None:
    cases = references(
        base, adapter_dirs, [random_prompt(1, 8, 32000), random_prompt(2, 40, 32000)]
    )
    run_mixed(base, adapter_dirs, cases, tmp_path / "store", EngineConfig(max_num_seqs=16))


def test_bytes_per_adapter(base: Path, adapter_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Sub-vectors cost k indices and k - 1 weights; scaled to 32 layers, DESIGN's megabytes."""
    info = read_base_info(base)
    store = AdapterStore.open(tmp_path / "store", info)
    record = store.add("paper", adapter_dirs["seed-1"]).record
    rank, length, num_vectors = PAPER["r"], PAPER["vector_length"], PAPER["num_vectors"]
    features = sum(sum(info.config.projection_shape(name)) for name in PROJECTIONS)
    num_sub_vectors = NUM_LAYERS * rank * features // length
    assert num_sub_vectors * 16 == 39_040  # the paper's N for 32 layers
    bank_bytes, sub_vector_bytes = num_vectors * length * 4, 2 * 2 + 4  # fp32, int16 indices
    assert record.compact_bytes == bank_bytes + num_sub_vectors * sub_vector_bytes
    assert record.factor_bytes == num_sub_vectors * length * 4
    compact = read_peft_adapter(adapter_dirs["seed-1"], info)
    factors = rebuild_factors(compact, device="cpu", dtype=torch.bfloat16)
    assert factors.num_bytes == num_sub_vectors * length * 2
    print(json.dumps({"compact_32_layers_bf16": num_vectors * length * 2 + 39_040 * 6}))
