"""Tiny random Llamas on disk, engines over them, and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core.engine import Engine
from core.engine_config import EngineConfig
from core.factors import FactorSource
from core.loading import load_engine

PAGE_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4
"""Keys and values of one token in the default tiny model: 2, layers, kv heads, head_dim, fp32."""

QUERY_VALUE = ("q_proj", "v_proj")


def write_tiny_llama(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a random Llama (two layers, hidden 64, vocabulary 128) the way its users do."""
    options: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,  # far from flat logits, so that the best token is clear
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**options | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones hide a norm that is left out or swapped
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def small_engine(
    path: Path, factors: FactorSource | None = None, *, num_pages: int = 64, **options: Any
) -> Engine:
    """An fp32 CPU engine over a default tiny model with `num_pages` pages of 4 tokens."""
    settings: dict[str, Any] = {
        "device": "cpu",
        "page_size": 4,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
    }
    settings |= options
    settings.setdefault("kv_cache_bytes", num_pages * settings["page_size"] * PAGE_BYTES_PER_TOKEN)
    return load_engine(path, EngineConfig(**settings), factors)


def random_prompt(seed: int, length: int, vocab_size: int = 128) -> tuple[int, ...]:
    """Token ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())
