"""The forward of a Llama: one step's rows → logits of the rows that want them.

Knows nothing of requests or scheduling; adapters are a binding that adds to projections.

Shape legend: T rows of the step, R rows that want logits, H hidden size, V vocabulary, N query
heads, D head dimension, O output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core.batch import Batch
from core.kv_storage import KVStorage
from core.model_config import ModelConfig
from core.ops import AdapterBinding, Ops
from core.rotary import Rotary
from core.weights import LayerWeights, ModelWeights

QKV, OUT, GATE_UP, DOWN = range(4)  # places in weights.FUSED_PROJECTIONS


class LlamaModel:
    """Frozen weights and the code that runs them."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops) -> None:
        self.config, self.weights, self.ops = config, weights, ops
        self.device, self.dtype = weights.embedding_VH.device, weights.embedding_VH.dtype
        self.rotary = Rotary(config, self.device, self.dtype)
        layers = weights.layers
        # The norm that follows each layer's MLP: the next layer's first, at last the final one.
        self._norms_after = [*(layer.input_norm_H for layer in layers[1:]), weights.norm_H]

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVStorage, adapters: AdapterBinding | None) -> Tensor:
        """Write the step's keys and values into `kv`; return logits [R, V] in the model's dtype."""
        weights, ops = self.weights, self.ops
        cos_sin = self.rotary.tables(batch.position_T, batch.length_T)
        kv.clear(batch.tail_page_P)
        x_TH = F.embedding(batch.token_T, weights.embedding_VH)
        h_TH = ops.rms_norm(x_TH, weights.layers[0].input_norm_H)
        for index, layer in enumerate(weights.layers):
            mixed_TH = self._attention(index, layer, h_TH, batch, kv, adapters, cos_sin)
            h_TH = ops.rms_norm(x_TH, layer.post_attention_norm_H, mixed_TH)
            mlp_TH = self._mlp(index, layer, h_TH, adapters)
            h_TH = ops.rms_norm(x_TH, self._norms_after[index], mlp_TH)
        return weights.head(h_TH[batch.head_row_R])

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        h_TH: Tensor,
        batch: Batch,
        kv: KVStorage,
        adapters: AdapterBinding | None,
        cos_sin: tuple[Tensor, Tensor],
    ) -> Tensor:
        qkv_TO = layer.qkv(h_TH)
        if adapters is not None:
            adapters.add(index, QKV, h_TH, qkv_TO)
        query_TND = self.ops.rotate_and_store(qkv_TO, cos_sin, kv, index, batch.kv_slot_T)
        mixed_TH = self.ops.attention(query_TND, kv, index, batch).flatten(1)
        out_TH = layer.o(mixed_TH)
        if adapters is not None:
            adapters.add(index, OUT, mixed_TH, out_TH)
        return out_TH

    def _mlp(
        self, index: int, layer: LayerWeights, h_TH: Tensor, adapters: AdapterBinding | None
    ) -> Tensor:
        gate_up = layer.gate_up(h_TH)
        if adapters is not None:
            adapters.add(index, GATE_UP, h_TH, gate_up)
        activated = self.ops.silu_mul(gate_up)
        out_TH = layer.down(activated)
        if adapters is not None:
            adapters.add(index, DOWN, activated, out_TH)
        return out_TH
