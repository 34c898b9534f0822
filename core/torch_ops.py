"""The small operations of a Llama's forward in torch's own words.

Shape legend: T rows of the step, H hidden size, I intermediate size, N query heads, K key and value
heads, D head dimension, O = (N + 2 K) D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core.factors import LowRankPair
from core.kv_storage import KVStorage


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, delta_TH: Tensor | None = None) -> Tensor:
    """Add `delta_TH` to `x_TH` in place where given; return x / rms(x) * weight."""
    if delta_TH is not None:
        x_TH += delta_TH
    return F.rms_norm(x_TH, weight_H.shape, weight_H, eps)


def silu_mul(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) * up, [T, I]."""
    gate, up = gate_up_T2I.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rotate_and_store(
    qkv_TO: Tensor, cos_sin: tuple[Tensor, Tensor], kv: KVStorage, layer: int, slot_T: Tensor
) -> Tensor:
    """Rotate queries and keys, store keys and values; return the queries [T, N, D]."""
    num_kv_heads, head_dim = kv.keys[layer].shape[1:]
    heads = qkv_TO.view(len(qkv_TO), -1, head_dim)
    num_rotated = heads.shape[1] - num_kv_heads
    num_heads = num_rotated - num_kv_heads
    rotated = _rotate(heads[:, :num_rotated], *cos_sin)
    kv.keys[layer].index_copy_(0, slot_T, rotated[:, num_heads:])
    kv.values[layer].index_copy_(0, slot_T, heads[:, num_rotated:])
    return rotated[:, :num_heads]


def add_increments(
    increments: Mapping[str, LowRankPair], names: Sequence[str], x_TI: Tensor, y_TO: Tensor
) -> None:
    """Add the increments of `names` to their outputs, which stand behind each other in `y_TO`."""
    if names[0] not in increments:  # all of a fused matrix's projections have one, or none
        return
    start = 0
    for name in names:
        pair = increments[name]
        end = start + pair.b_RO.shape[1]
        y_TO[:, start:end].addmm_(x_TI @ pair.a_RI.T, pair.b_RO, alpha=pair.scale)
        start = end


def _rotate(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate every head of every token; the second half of D pairs with the first (Llama's way)."""
    half = x_TND.shape[-1] // 2
    swapped = torch.cat((-x_TND[..., half:], x_TND[..., :half]), dim=-1)
    return torch.addcmul(x_TND * cos_TD[:, None], swapped, sin_TD[:, None])
