"""The forward of a Llama: one step's rows → logits of the rows that want them.

Knows nothing of requests or scheduling; adapters are a binding that adds to projections.

Shape legend: T rows of the step, R rows that want logits, H hidden size, V vocabulary, N query
and key heads together, K key heads, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core.adapter_slots import AdapterBinding
from core.attention import KVStorage, decode_mask, paged_attention
from core.batch import Batch
from core.model_config import ModelConfig
from core.rotary import Rotary, rotate
from core.weights import LayerWeights, ModelWeights

QKV, O, GATE_UP, DOWN = range(4)  # noqa: E741  places in FUSED_PROJECTIONS


class LlamaModel:
    """Frozen weights and the code that runs them."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config, self.weights = config, weights
        self.device, self.dtype = weights.embedding_VH.device, weights.embedding_VH.dtype
        self.rotary = Rotary(config, self.device, self.dtype)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVStorage, adapters: AdapterBinding | None) -> Tensor:
        """Write the step's keys and values into `kv`; return logits [R, V] in the model's dtype."""
        x_TH = F.embedding(batch.token_T, self.weights.embedding_VH)
        cos_sin = self.rotary.tables(batch.position_T, batch.length_T)
        mask = decode_mask(batch, kv.page_size, self.dtype)
        for index, layer in enumerate(self.weights.layers):
            x_TH = x_TH + self._attention(index, layer, x_TH, batch, kv, adapters, cos_sin, mask)
            x_TH = x_TH + self._mlp(index, layer, x_TH, adapters)
        return self.weights.head(self._norm(x_TH[batch.head_row_R], self.weights.norm_H))

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x_TH: Tensor,
        batch: Batch,
        kv: KVStorage,
        adapters: AdapterBinding | None,
        cos_sin: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        config = self.config
        h_TH = self._norm(x_TH, layer.input_norm_H)
        qkv = layer.qkv(h_TH)
        if adapters is not None:
            adapters.add(index, QKV, h_TH, qkv)
        heads = qkv.view(len(qkv), -1, config.head_dim)
        num_rotated = config.num_heads + config.num_kv_heads
        rotated_TND = rotate(heads[:, :num_rotated], *cos_sin)
        kv.write(index, batch.kv_slot_T, rotated_TND[:, config.num_heads :], heads[:, num_rotated:])
        mixed_TH = paged_attention(kv, index, batch, rotated_TND[:, : config.num_heads], mask)
        out_TH = layer.o(mixed_TH)
        if adapters is not None:
            adapters.add(index, O, mixed_TH, out_TH)
        return out_TH

    def _mlp(
        self, index: int, layer: LayerWeights, x_TH: Tensor, adapters: AdapterBinding | None
    ) -> Tensor:
        h_TH = self._norm(x_TH, layer.post_attention_norm_H)
        gate_up = layer.gate_up(h_TH)
        if adapters is not None:
            adapters.add(index, GATE_UP, h_TH, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        act = F.silu(gate).mul_(up)
        out_TH = layer.down(act)
        if adapters is not None:
            adapters.add(index, DOWN, act, out_TH)
        return out_TH

    def _norm(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        return F.rms_norm(x_TH, weight_H.shape, weight_H, self.config.rms_norm_eps)
