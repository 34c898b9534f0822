"""`core.layers.Layers` in torch's own words; adapters through stacks (see `adapter_slots`).

Shape legend: T rows of the step, H hidden size, I intermediate size, N query heads, D head
dimension, O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.adapter_slots import AdapterSlots, StackBinding
from core.attention import attention
from core.batch import Batch
from core.kv_storage import KVStorage
from core.linear import Linear
from core.model_config import ModelConfig
from core.torch_ops import add_increments, rms_norm, rotate_and_store, silu_mul
from core.weights import FUSED_PROJECTIONS, LayerWeights, ModelWeights

QKV, OUT, GATE_UP, DOWN = range(4)  # places in weights.FUSED_PROJECTIONS


class TorchLayers:
    """The layers of `weights`."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self._config, self._layers = config, weights.layers
        embedding = weights.embedding_VH
        self.slots = AdapterSlots(config, embedding.device, embedding.dtype)
        # The norm that follows each layer's MLP: the next layer's first, at last the final one.
        self._norms_after = [
            *(layer.input_norm_H for layer in weights.layers[1:]),
            weights.norm_H,
        ]

    @torch.inference_mode()
    def forward(
        self, x_TH: Tensor, cos_sin: tuple[Tensor, Tensor], batch: Batch, kv: KVStorage
    ) -> Tensor:
        """See `Layers.forward`."""
        kv.clear(batch.tail_page_P)
        adapters = self.slots.bind(batch.adapter_rows)
        eps = self._config.rms_norm_eps
        h_TH = rms_norm(x_TH, self._layers[0].input_norm_H, eps)
        for index, layer in enumerate(self._layers):
            mixed_TH = self._attention(index, layer, h_TH, batch, kv, adapters, cos_sin)
            h_TH = rms_norm(x_TH, layer.post_attention_norm_H, eps, mixed_TH)
            mlp_TH = _mlp(index, layer, h_TH, adapters)
            h_TH = rms_norm(x_TH, self._norms_after[index], eps, mlp_TH)
        return h_TH[batch.head_row_R]

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the stacks."""
        return self.slots.num_bytes

    def check_integrity(self) -> None:
        """See `AdapterSlots.check_integrity`."""
        self.slots.check_integrity()

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        h_TH: Tensor,
        batch: Batch,
        kv: KVStorage,
        adapters: StackBinding | None,
        cos_sin: tuple[Tensor, Tensor],
    ) -> Tensor:
        qkv_TO = _project(layer, layer.qkv, h_TH, adapters, index, QKV)
        query_TND = rotate_and_store(qkv_TO, cos_sin, kv, index, batch.kv_slot_T)
        mixed_TH = attention(query_TND, kv, index, batch).contiguous().flatten(1)
        return _project(layer, layer.o, mixed_TH, adapters, index, OUT)


def _mlp(index: int, layer: LayerWeights, h_TH: Tensor, adapters: StackBinding | None) -> Tensor:
    gate_up_T2I = _project(layer, layer.gate_up, h_TH, adapters, index, GATE_UP)
    return _project(layer, layer.down, silu_mul(gate_up_T2I), adapters, index, DOWN)


def _project(
    weights: LayerWeights,
    matrix: Linear,
    x_TI: Tensor,
    adapters: StackBinding | None,
    layer: int,
    fused: int,
) -> Tensor:
    y_TO = matrix(x_TI)
    if weights.increments:
        add_increments(weights.increments, FUSED_PROJECTIONS[fused], x_TI, y_TO)
    if adapters is not None:
        adapters.add(layer, fused, x_TI, y_TO)
    return y_TO
