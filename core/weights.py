"""A model directory's safetensors → the tensors that the forward reads, fused per layer.

Knows the checkpoint's names and nothing of how a forward runs.

Shape legend: V vocabulary, H hidden size, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from core.checkpoint import Checkpoint
from core.factors import LowRankPair
from core.head import Head, LogitsHead, MakeHead
from core.layer_matrices import LayerMatrices, layer_matrices
from core.linear import FrozenLinear, Linear, MakeLinear
from core.model_config import ModelConfig

FUSED_PROJECTIONS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
"""Projections that share one matrix, since they share one input."""


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; the four matrices stand in the order of `FUSED_PROJECTIONS`.

    `increments` by projection are added for every row: those of a factored vertical base, whose
    layers share matrices.
    """

    input_norm_H: Tensor
    qkv: Linear
    o: Linear
    post_attention_norm_H: Tensor
    gate_up: Linear
    down: Linear
    increments: Mapping[str, LowRankPair] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelWeights:
    """All weights of one model on one device in one dtype. `num_bytes` counts what is resident."""

    embedding_VH: Tensor
    layers: tuple[LayerWeights, ...]
    norm_H: Tensor
    head: Head
    num_bytes: int


@dataclass(frozen=True)
class LinearMakers:
    """What packs which matrices."""

    layers: MakeLinear = FrozenLinear
    gate_up: MakeLinear = FrozenLinear
    head: MakeHead = lambda weight_VH: LogitsHead(FrozenLinear(weight_VH))


def load_weights(
    path: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    makers: LinearMakers = LinearMakers(),
    *,
    factored: bool = True,
) -> ModelWeights:
    """Read a model directory; fp32, fp16 and bf16 files are cast to `dtype`.

    `factored` is how a vertical base is read, see `layer_matrices`.

    Raises UnsupportedModelError for a tensor that is missing or has another shape.
    """
    with Checkpoint(path, device, dtype) as checkpoint:
        matrices = layer_matrices(checkpoint, config, factored=factored)
        layers = tuple(_layers(checkpoint, matrices, config, makers))
        vocabulary = (config.vocab_size, config.hidden_size)
        embedding = checkpoint.read("model.embed_tokens.weight", vocabulary)
        norm = checkpoint.read("model.norm.weight", (config.hidden_size,))
        tied = config.tie_word_embeddings
        head_VH = embedding if tied else checkpoint.read("lm_head.weight", vocabulary)
        head = makers.head(head_VH)
    return ModelWeights(embedding, layers, norm, head, _num_bytes(embedding, layers, norm, head))


def _layers(
    checkpoint: Checkpoint, matrices: LayerMatrices, config: ModelConfig, makers: LinearMakers
) -> Iterator[LayerWeights]:
    make = (makers.layers, makers.layers, makers.gate_up, makers.layers)
    made: dict[tuple[str, ...], tuple[int, Linear]] = {}  # the last one of each, and its owner
    for layer in range(config.num_layers):
        increments: dict[str, LowRankPair] = {}
        for make_linear, names in zip(make, FUSED_PROJECTIONS, strict=True):
            owner = matrices.owner(layer, names)
            if names not in made or made[names][0] != owner:
                made[names] = owner, make_linear(matrices.weight(owner, names))
            increments |= matrices.increments(layer, names)
        input_norm, post_attention_norm = (
            checkpoint.read(f"model.layers.{layer}.{name}.weight", (config.hidden_size,))
            for name in ("input_layernorm", "post_attention_layernorm")
        )
        qkv, o, gate_up, down = (made[names][1] for names in FUSED_PROJECTIONS)
        yield LayerWeights(input_norm, qkv, o, post_attention_norm, gate_up, down, increments)


def _num_bytes(
    embedding: Tensor, layers: tuple[LayerWeights, ...], norm: Tensor, head: Head
) -> int:
    matrices = {
        id(matrix): matrix.num_bytes
        for layer in layers
        for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)
    }
    norms = sum(layer.input_norm_H.nbytes + layer.post_attention_norm_H.nbytes for layer in layers)
    stacks = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for layer in layers
        for pair in layer.increments.values()
        for part in (pair.a_RI, pair.b_RO)
    }
    head_bytes = 0 if head.shares_storage_with(embedding) else head.num_bytes
    return (
        embedding.nbytes
        + sum(matrices.values())
        + norms
        + sum(stacks.values())
        + norm.nbytes
        + head_bytes
    )
