"""What a forward does besides the big matrix products, behind one seam with two implementations.

`TorchOps` runs anywhere that torch does and is the slow twin of `kernels.cpu_ops.CpuOps`. Neither
knows the order of a forward.

Shape legend: T rows of the step, H hidden size, I intermediate size, N query heads, D head
dimension, O output features.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from core.adapter_slots import AdapterSlots
from core.attention import attention
from core.batch import AdapterRows, Batch
from core.kv_storage import KVStorage
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

    def attention(self, query_TND: Tensor, kv: KVStorage, layer: int, batch: Batch) -> Tensor:
        """Attention of all rows over their own sequences' pages, [T, N, D] contiguous."""
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

    def attention(self, query_TND: Tensor, kv: KVStorage, layer: int, batch: Batch) -> Tensor:
        """See `Ops.attention`."""
        return attention(query_TND, kv, layer, batch).contiguous()

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
