"""LoRA directories with more than A and B in them: DoRA (peft 0.21) and LoRA-XS (arXiv 2405.17604).

    DoRA      m / |W + s B A| times (W x + s B A x), row by row of W: a gain of what the base gives,
              and a pair whose B has that gain in it
    LoRA-XS   s B (R (A x)) with a small trained R, as its authors' code stores it, beside A and B
              that were cut from the base: a pair whose A is R A

Both round once. DoRA needs the base's weights, whose rows it measures. Knows nothing of the store
or of how pairs are used.

Shape legend: R rank, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.compact import CompactLoRA
from adapters.errors import UnsupportedAdapterError
from adapters.lora import SERVED_KEYS, check_layers
from adapters.lowered import OwnTensors, compact_lora
from adapters.peft_config import check_features
from adapters.peft_scaling import Scaling
from core.factors import LowRankPair, ModuleKey
from core.layer_matrices import matrices_in_fp32
from core.model_config import BaseInfo

_Config = Mapping[str, Any]
_Tensors = Mapping[str, Tensor]

_A, _B = "lora_A.weight", "lora_B.weight"
_MAGNITUDE = "lora_magnitude_vector"
_MAPPING = "default_lora_latent_mapping.weight"


def is_lora_xs(tensors: _Tensors) -> bool:
    """Whether any tensor is one of LoRA-XS' own."""
    return any(name.endswith(_MAPPING) for name in tensors)


def read_dora(config: _Config, tensors: _Tensors, base: BaseInfo) -> CompactLoRA:
    """Validate a DoRA adapter against the base and lower it. Raises as `read_lora` does."""
    check_features(config, SERVED_KEYS | {"use_dora"})
    check_layers(config)
    scaling = Scaling(config)
    own = OwnTensors(config, tensors, base, (_A, _B, _MAGNITUDE))
    pairs: dict[ModuleKey, LowRankPair] = {}
    gains: dict[ModuleKey, Tensor] = {}
    with matrices_in_fp32(base) as matrices:
        for key in sorted(own.keys):
            pair = _take_pair(own, key, scaling, base)
            magnitude_O = own.take(key, _MAGNITUDE, (pair.b_RO.shape[1],))
            weight_OI = matrices.weight(key.layer, (key.projection,))
            gains[key] = magnitude_O / _row_norms(weight_OI, pair)
            pairs[key] = pair._replace(b_RO=pair.b_RO * gains[key])
    return compact_lora(base, pairs, gains)


def read_lora_xs(config: _Config, tensors: _Tensors, base: BaseInfo) -> CompactLoRA:
    """Validate a LoRA-XS adapter against the base and lower it. Raises as `read_lora` does."""
    if config.get("use_dora"):
        raise UnsupportedAdapterError(
            f"use_dora=True: the file has {_MAPPING} too, and LoRA-XS knows no magnitudes",
            feature="use_dora",
        )
    check_features(config, SERVED_KEYS)
    check_layers(config)
    scaling = Scaling(config)
    own = OwnTensors(config, tensors, base, (_A, _B, _MAPPING))
    pairs = {}
    for key in own.keys:
        pair = _take_pair(own, key, scaling, base)
        rank = len(pair.a_RI)
        pairs[key] = pair._replace(a_RI=own.take(key, _MAPPING, (rank, rank)) @ pair.a_RI)
    return compact_lora(base, pairs)


def _take_pair(own: OwnTensors, key: ModuleKey, scaling: Scaling, base: BaseInfo) -> LowRankPair:
    num_out, num_in = base.config.projection_shape(key.projection)
    rank, scale = scaling.rank_and_scale(key)
    a_RI = own.take(key, _A, (rank, num_in))
    return LowRankPair(a_RI, own.take(key, _B, (num_out, rank)).T, scale)


def _row_norms(weight_OI: Tensor, pair: LowRankPair) -> Tensor:
    """|W + s B A| of each row, fp64; W + s B A itself in fp32, as PEFT has it."""
    adapted_OI = torch.addmm(weight_OI, pair.b_RO.T.float(), pair.a_RI.float(), alpha=pair.scale)
    norms_O: Tensor = torch.linalg.vector_norm(adapted_OI, dim=1, dtype=torch.float64)
    return norms_O
