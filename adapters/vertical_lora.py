"""Vertical adapters, an extension of our own: LoRA increments that add up along depth in a chunk.

As layers of a vertical base do (`core.vertical`): in a chunk's layer l a module gets the sum of the
increments of its like in the chunk's layers up to l. The directory is PEFT's of LoRA, but for

    peft_type     "VERTICAL_LORA"
    chunk_sizes   layers of each chunk, in order

and each sum is one low-rank pair, the increments' factors one under another, so lowering is exact.

Shape legend: R rank of one increment, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.compact import CompactLoRA
from adapters.errors import MalformedAdapterError
from adapters.lowered import OwnTensors, compact_lora
from adapters.peft_config import as_finite, check_features, positive_int
from core.factors import PROJECTIONS, LowRankPair, ModuleKey
from core.model_config import BaseInfo

PEFT_TYPE = "VERTICAL_LORA"
_KEYS = frozenset({"r", "lora_alpha", "chunk_sizes"})


def read_vertical_lora(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseInfo
) -> CompactLoRA:
    """Validate a vertical adapter against the base and lower it. Raises as `read_lora` does."""
    check_features(config, _KEYS)
    rank = positive_int(config, "r")
    scale = as_finite(config.get("lora_alpha", rank), "lora_alpha") / rank
    firsts = _first_layers(config.get("chunk_sizes"), base.config.num_layers)
    own = OwnTensors(config, tensors, base, ("lora_A.weight", "lora_B.weight"))
    pairs: dict[ModuleKey, LowRankPair] = {}
    for name in PROJECTIONS:
        num_out, num_in = base.config.projection_shape(name)
        for key in (key for key in own.keys if key.projection == name):
            a_RI = own.take(key, "lora_A.weight", (rank, num_in))
            b_RO = own.take(key, "lora_B.weight", (num_out, rank)).T
            before = pairs.get(ModuleKey(key.layer - 1, name))
            if key.layer not in firsts:
                if before is None:
                    raise MalformedAdapterError(
                        f"{key.path} adds to the layer before it, which the config does not claim"
                    )
                a_RI = torch.cat([before.a_RI, a_RI])
                b_RO = torch.cat([before.b_RO, b_RO])
            pairs[key] = LowRankPair(a_RI, b_RO, scale)
    return compact_lora(base, pairs)


def _first_layers(sizes: Any, num_layers: int) -> set[int]:
    are_sizes = isinstance(sizes, list) and all(type(n) is int and n >= 1 for n in sizes)
    if not are_sizes or sum(sizes) != num_layers:
        raise MalformedAdapterError(
            f"chunk_sizes is {str(sizes)[:80]}, must be a list of sizes whose sum is {num_layers}, "
            "the base's layers"
        )
    return {sum(sizes[:number]) for number in range(len(sizes))}
