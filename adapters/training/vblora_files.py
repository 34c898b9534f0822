"""A fitted VB-LoRA adapter as the directory that PEFT writes with `save_only_topk_weights`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.compact import index_dtype
from adapters.peft_files import CONFIG_NAME, WEIGHTS_NAME
from adapters.peft_tensors import tensor_name
from adapters.training.fitting import Fit
from core.factors import LowRankPair, ModuleKey


def write_vblora(
    directory: Path, fit: Fit, pairs: Mapping[ModuleKey, LowRankPair], base_name: str
) -> None:
    """Write `fit`, whose sub-vectors are those of `pairs`, all of one rank, to a new directory."""
    num_vectors, length = fit.bank_HB.shape
    topk = fit.indices_NK.shape[1]
    (rank,) = {len(pair.a_RI) for pair in pairs.values()}
    tensors = {"base_model.vblora_vector_bank": fit.bank_HB.contiguous()}
    start = 0
    for key, pair in pairs.items():
        for side, width in (("A", pair.a_RI.shape[1]), ("B", pair.b_RO.shape[1])):
            end = start + rank * width // length
            for suffix, values in (
                ("indices", fit.indices_NK[start:end].to(index_dtype(num_vectors))),
                ("weights", fit.weights_NK[start:end, :-1]),
            ):
                name = tensor_name(key.path, f"vblora_logits_{side}_topk_{suffix}")
                tensors[name] = _laid_out(values, rank, side)
            start = end
    directory.mkdir(parents=True)
    save_file(tensors, directory / WEIGHTS_NAME, {"format": "pt"})
    config = {
        "peft_type": "VBLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "num_vectors": num_vectors,
        "vector_length": length,
        "topk": topk,
        "target_modules": sorted(key.path for key in pairs),
        "save_only_topk_weights": True,
        "bias": "none",
        "inference_mode": True,
        "vblora_dropout": 0.0,
    }
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def _laid_out(values: Tensor, rank: int, side: str) -> Tensor:
    """A's are [rank, in / b, …], B's [out / b, rank, …]; both come rank by rank."""
    by_rank = values.unflatten(0, (rank, -1))
    return (by_rank if side == "A" else torch.transpose(by_rank, 0, 1)).contiguous()
