"""A model directory's safetensors → the tensors that the forward reads, fused per layer.

Knows the checkpoint's names and nothing of how a forward runs.

Shape legend: V vocabulary, H hidden size, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from core.errors import UnsupportedModelError
from core.factors import PROJECTIONS
from core.linear import FrozenLinear, Linear, MakeLinear
from core.model_config import ModelConfig, weight_files

FUSED_PROJECTIONS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
"""Projections that share one matrix, since they share one input."""


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; the four matrices stand in the order of `FUSED_PROJECTIONS`."""

    input_norm_H: Tensor
    qkv: Linear
    o: Linear
    post_attention_norm_H: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class ModelWeights:
    """All weights of one model on one device in one dtype. `num_bytes` counts what is resident."""

    embedding_VH: Tensor
    layers: tuple[LayerWeights, ...]
    norm_H: Tensor
    head: Linear
    num_bytes: int


@dataclass(frozen=True)
class LinearMakers:
    """What packs which matrices."""

    layers: MakeLinear = FrozenLinear
    gate_up: MakeLinear = FrozenLinear
    head: MakeLinear = FrozenLinear


class _Checkpoint:
    """The tensors of a sharded or single-file checkpoint by name, read on demand."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._path, self._device, self._dtype = path, device, dtype
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        for file in weight_files(self._path):
            opened = self._stack.enter_context(safe_open(file, framework="pt"))
            self._files.update(dict.fromkeys(opened.keys(), opened))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor `name`, cast and moved; UnsupportedModelError if absent or misshapen."""
        if name not in self._files:
            raise UnsupportedModelError(f"{self._path}: the weights lack {name}")
        tensor: Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UnsupportedModelError(
                f"{self._path}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}"
            )
        if not tensor.is_floating_point():
            raise UnsupportedModelError(
                f"{self._path}: {name} has dtype {tensor.dtype}, not a float"
            )
        return tensor.to(device=self._device, dtype=self._dtype)

    def fused(self, names: Sequence[str], shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Matrices with one input, concatenated along the output features."""
        parts = [self.read(name, shape) for name, shape in zip(names, shapes, strict=True)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def load_weights(
    path: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    makers: LinearMakers = LinearMakers(),
) -> ModelWeights:
    """Read a model directory; fp32, fp16 and bf16 files are cast to `dtype`.

    Raises UnsupportedModelError for a tensor that is missing or has another shape.
    """
    with _Checkpoint(path, device, dtype) as checkpoint:
        layers = tuple(
            _layer(checkpoint, config, index, makers) for index in range(config.num_layers)
        )
        vocabulary = (config.vocab_size, config.hidden_size)
        embedding = checkpoint.read("model.embed_tokens.weight", vocabulary)
        norm = checkpoint.read("model.norm.weight", (config.hidden_size,))
        tied = config.tie_word_embeddings
        head_VH = embedding if tied else checkpoint.read("lm_head.weight", vocabulary)
        head = makers.head(head_VH)
    return ModelWeights(embedding, layers, norm, head, _num_bytes(embedding, layers, norm, head))


def _layer(
    checkpoint: _Checkpoint, config: ModelConfig, index: int, makers: LinearMakers
) -> LayerWeights:
    prefix = f"model.layers.{index}."
    blocks = {
        name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        for name in PROJECTIONS
    }

    def norm(name: str) -> Tensor:
        return checkpoint.read(f"{prefix}{name}.weight", (config.hidden_size,))

    make = (makers.layers, makers.layers, makers.gate_up, makers.layers)
    qkv, o, gate_up, down = (
        make_linear(
            checkpoint.fused(
                [f"{prefix}{blocks[name]}.{name}.weight" for name in names],
                [config.projection_shape(name) for name in names],
            )
        )
        for make_linear, names in zip(make, FUSED_PROJECTIONS, strict=True)
    )
    return LayerWeights(
        norm("input_layernorm"), qkv, o, norm("post_attention_layernorm"), gate_up, down
    )


def _num_bytes(
    embedding: Tensor, layers: tuple[LayerWeights, ...], norm: Tensor, head: Linear
) -> int:
    per_layer = sum(
        layer.input_norm_H.nbytes
        + layer.post_attention_norm_H.nbytes
        + sum(matrix.num_bytes for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down))
        for layer in layers
    )
    head_bytes = 0 if head.shares_storage_with(embedding) else head.num_bytes
    return embedding.nbytes + per_layer + norm.nbytes + head_bytes
