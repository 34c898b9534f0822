"""Compact form → low-rank factors of all modules, in one gather into one buffer.

Semantics (VB-LoRA, arXiv 2405.15179 eq. 4-6; PEFT's `_get_lora_matrices`):
    sub_vector_n = sum over k of weight_nk * bank[index_nk]
and a module's a_RI, b_RO are runs of sub-vectors, read row by row. `b_RO @ a_RI` is never formed.
Knows nothing of files, caches or the engine.

Shape legend: N sub-vectors, K entries each, J = K - 1 stored weights, H bank vectors of length B,
R rank, I input features, O output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.compact import CompactAdapter, CompactLoRA, CompactVBLoRA
from adapters.layout import flat_layout
from core.factors import AdapterFactors, ModuleKey
from core.flat_factors import FlatPairs


@torch.no_grad()
def rebuild_factors(
    adapter: CompactAdapter,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> AdapterFactors:
    """All factors of `adapter` as views of one contiguous buffer of `dtype` on `device`.

    Computed in float32 and rounded to `dtype` once, at the end.
    """
    if isinstance(adapter, CompactLoRA):
        values = (
            adapter.values if adapter.gains is None else torch.cat(list(adapter.tensors.values()))
        )
        buffer = values.to(device=device, dtype=dtype, copy=True)
    else:
        buffer = gather_sub_vectors(adapter, device).view(-1).to(dtype)
    pairs = FlatPairs(buffer, flat_layout(adapter.modules))
    return AdapterFactors(adapter.digest, pairs, buffer.nbytes, _gains(adapter, buffer))


def gather_sub_vectors(adapter: CompactVBLoRA, device: torch.device | str = "cpu") -> Tensor:
    """(N, B) float32: every sub-vector, by one fused kernel without (N, K, B) in between."""
    bank_HB = adapter.bank.vectors_HB.to(device).float()
    indices_NK = adapter.indices_NK.to(device).to(torch.int32)
    weights_NK = all_weights(adapter.weights_NJ.to(device))
    return F.embedding_bag(indices_NK, bank_HB, mode="sum", per_sample_weights=weights_NK)


def all_weights(weights_NJ: Tensor) -> Tensor:
    """(N, K) float32: the stored weights and the last one, 1 - their sum, at least 0.

    The clamp is for rounding: PEFT takes the logarithm there and would get NaN.
    """
    weights_NJ = weights_NJ.float()
    last_N1 = (1.0 - weights_NJ.sum(-1, keepdim=True)).clamp_min_(0.0)
    return torch.cat([weights_NJ, last_N1], dim=-1)


def _gains(adapter: CompactAdapter, buffer: Tensor) -> dict[ModuleKey, Tensor]:
    """Of the end of the buffer, behind all factors."""
    if not isinstance(adapter, CompactLoRA) or adapter.gains is None:
        return {}
    pieces = buffer[len(adapter.values) :].split([spec.out_features for spec in adapter.modules])
    return {spec.key: piece for spec, piece in zip(adapter.modules, pieces, strict=True)}
