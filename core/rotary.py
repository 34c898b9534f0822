"""Rotary position embeddings: cos and sin per token, by transformers' own rope variants.

The inverse frequencies come from transformers (default, linear, llama3, yarn, dynamic), so this
file knows no formula of theirs; it knows only when they depend on the sequence's length.

Shape legend: T tokens of a step, D head dimension, P kept positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from core.errors import UnsupportedModelError
from core.model_config import ModelConfig

_STATIC = ("default", "linear", "llama3", "yarn")
_MOST_KEPT = 8192  # positions whose cos and sin are kept; later ones are computed in every step
_LEAST_KEPT = 1024


class Rotary:
    """Rotates queries and keys.

    With "dynamic" scaling the frequencies grow with the sequence once it is longer than
    `max_position_embeddings`: a prompt's tokens use the prompt's length, a generated token its own
    position + 1, as transformers does in one generate() call. `depends_on_length` then tells that
    keys of a long prompt are its own and can't be reused by another.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        kind = config.hf.rope_parameters["rope_type"]
        if kind not in (*_STATIC, "dynamic"):
            raise UnsupportedModelError(
                f"rope_type {kind!r} is not served; served are {', '.join((*_STATIC, 'dynamic'))}"
            )
        embedding = LlamaRotaryEmbedding(config.hf)
        self.depends_on_length = kind == "dynamic"
        self._original_length = config.max_model_len
        self._config, self._device, self._dtype = config, device, dtype
        self._inv_freq: Tensor = embedding.inv_freq.to(device=device, dtype=torch.float32)
        self._scaling = float(embedding.attention_scaling)
        self._by_length: dict[int, Tensor] = {}
        self._kept = self._compute(torch.empty(0, dtype=torch.int64), self._inv_freq)

    def tables(self, position_T: Tensor, length_T: list[int] | None) -> tuple[Tensor, Tensor]:
        """(cos_TD, sin_TD) for int64 positions; `length_T` matters for dynamic scaling only."""
        if length_T is not None and any(n > self._original_length for n in length_T):
            return self._compute(position_T, torch.stack([self._inv_freq_for(n) for n in length_T]))
        # On cuda the largest position would have to be waited for.
        if self._device.type == "cpu" and (longest := int(position_T.max())) < _MOST_KEPT:
            if longest >= len(self._kept[0]):
                kept = min(max(_LEAST_KEPT, 1 << longest.bit_length()), _MOST_KEPT)
                self._kept = self._compute(torch.arange(kept), self._inv_freq)
            cos_PD, sin_PD = self._kept
            return cos_PD.index_select(0, position_T), sin_PD.index_select(0, position_T)
        return self._compute(position_T, self._inv_freq)

    def _compute(self, position_T: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        freqs = position_T[:, None].to(self._device).float() * inv_freq
        angles_TD = torch.cat((freqs, freqs), dim=-1)
        cos, sin = angles_TD.cos(), angles_TD.sin()
        if self._scaling != 1.0:
            cos, sin = cos * self._scaling, sin * self._scaling
        return cos.to(self._dtype), sin.to(self._dtype)

    def _inv_freq_for(self, length: int) -> Tensor:
        if length <= self._original_length:
            return self._inv_freq
        if length not in self._by_length:
            if len(self._by_length) > 4096:
                self._by_length.clear()
            freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](self._config.hf, self._device, seq_len=length)
            self._by_length[length] = freq.to(device=self._device, dtype=torch.float32)
        return self._by_length[length]
