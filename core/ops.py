"""What a forward does besides the big matrix products, behind one seam with two implementations.

`TorchOps` runs anywhere that torch does and is the slow twin of `kernels.cpu_ops.CpuOps`. Neither
knows the order of a forward.

Shape legend: T rows of the step, S single-token rows, H hidden size, I intermediate size, N query
heads, K key and value heads, D head dimension, L positions attended to, O output features.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from core.adapter_slots import AdapterSlots
from core.attention import KVStorage
from core.batch import AdapterRows, DecodeRows
from core.model_config import ModelConfig


class AdapterBinding(Protocol):
    """What one step's adapters add to the base's outputs."""

    def add(self, layer: int, fused: int, x_TI: Tensor, y_TO: Tensor) -> None:
        """Add the increments of `FUSED_PROJECTIONS[fused]` of `layer` to `y_TO` in place."""
        ...


class Ops(Protocol):
    """The operations; every tensor is on the model's device in the model's dtype."""

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, delta_TH: Tensor | None = None) -> Tensor:
        """Add `delta_TH` to `x_TH` in place where given; return x / rms(x) * weight."""
        ...

    def silu_mul(self, gate_up_T2I: Tensor) -> Tensor:
        """silu(gate) * up, [T, I]."""
        ...

    def rotate_and_store(
        self,
        qkv_TO: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        kv: KVStorage,
        layer: int,
        slot_T: Tensor,
    ) -> Tensor:
        """Rotate queries and keys, store keys and values; return the queries [T, N, D]."""
        ...

    def decode_attention(
        self, query_SND: Tensor, kv: KVStorage, layer: int, rows: DecodeRows
    ) -> Tensor:
        """Attention of one row per sequence over the sequence's pages, [S, N, D]."""
        ...

    def bind(self, adapter_rows: Seq[AdapterRows]) -> AdapterBinding | None:
        """Make the factors of a step's adapters ready; None when all rows are the base's."""
        ...

    @property
    def adapter_bytes(self) -> int:
        """Bytes held for adapters besides the leased factors themselves."""
        ...

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        ...


class TorchOps:
    """The operations in torch's own words; adapters through stacks (see `adapter_slots`)."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._config = config
        self._slots = AdapterSlots(config, device, dtype)

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, delta_TH: Tensor | None = None) -> Tensor:
        """See `Ops.rms_norm`."""
        if delta_TH is not None:
            x_TH += delta_TH
        return F.rms_norm(x_TH, weight_H.shape, weight_H, self._config.rms_norm_eps)

    def silu_mul(self, gate_up_T2I: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        gate, up = gate_up_T2I.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def rotate_and_store(
        self,
        qkv_TO: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        kv: KVStorage,
        layer: int,
        slot_T: Tensor,
    ) -> Tensor:
        """See `Ops.rotate_and_store`."""
        num_heads = self._config.num_heads
        heads = qkv_TO.view(len(qkv_TO), -1, self._config.head_dim)
        num_rotated = num_heads + self._config.num_kv_heads
        rotated = _rotate(heads[:, :num_rotated], *cos_sin)
        kv.keys[layer].index_copy_(0, slot_T, rotated[:, num_heads:])
        kv.values[layer].index_copy_(0, slot_T, heads[:, num_rotated:])
        return rotated[:, :num_heads]

    def decode_attention(
        self, query_SND: Tensor, kv: KVStorage, layer: int, rows: DecodeRows
    ) -> Tensor:
        """See `Ops.decode_attention`. Copies the pages of all rows, padded to the longest."""
        key_SLKD, value_SLKD = kv.gather(layer, rows.page_SP)
        # The query heads of one key head stand as rows of one query, so no key is repeated.
        query_SKGD = query_SND.reshape(len(query_SND), key_SLKD.shape[2], -1, query_SND.shape[-1])
        out_SKGD = F.scaled_dot_product_attention(
            query_SKGD,
            key_SLKD.transpose(1, 2),
            value_SLKD.transpose(1, 2),
            attn_mask=rows.visible_SL[:, None, None],
        )
        return out_SKGD.flatten(1, 2)

    def bind(self, adapter_rows: Seq[AdapterRows]) -> AdapterBinding | None:
        """See `Ops.bind`."""
        return self._slots.bind(adapter_rows)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the stacks."""
        return self._slots.num_bytes

    def check_integrity(self) -> None:
        """See `AdapterSlots.check_integrity`."""
        self._slots.check_integrity()


def _rotate(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate every head of every token; the second half of D pairs with the first (Llama's way)."""
    half = x_TND.shape[-1] // 2
    swapped = torch.cat((-x_TND[..., half:], x_TND[..., :half]), dim=-1)
    return torch.addcmul(x_TND * cos_TD[:, None], swapped, sin_TD[:, None])
