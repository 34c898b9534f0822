"""The forward of a Llama: one step's rows → hidden states of those whose next token is asked for.

Knows nothing of requests or scheduling; `layers` says how the layers are computed.

Shape legend: T rows of the step, R rows that want logits, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core.batch import Batch
from core.kv_storage import KVStorage
from core.layers import Layers
from core.model_config import ModelConfig
from core.rotary import Rotary
from core.weights import ModelWeights


class LlamaModel:
    """Frozen weights and the code that runs them; `head` makes logits of what `forward` returns."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, layers: Layers) -> None:
        self.config, self.weights, self.layers = config, weights, layers
        self.device, self.dtype = weights.embedding_VH.device, weights.embedding_VH.dtype
        self.head = weights.head
        self.rotary = Rotary(config, self.device, self.dtype)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVStorage) -> Tensor:
        """Write the step's keys and values into `kv`; return what the head multiplies [R, H]."""
        cos_sin = self.rotary.tables(batch.position_T, batch.length_T)
        x_TH = F.embedding(batch.token_T, self.weights.embedding_VH)
        return self.layers.forward(x_TH, cos_sin, batch, kv)
