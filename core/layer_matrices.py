"""Where a model's layers get their matrices: from a plain checkpoint, or from a vertical one.

A vertical base (`core.vertical`) is read in either of two ways. Factored, all layers of a chunk
multiply with the first one's matrix, packed once, and add the first so many ranks of one stack of
increments. Expanded, each layer has its own sum of them, and nothing below knows of chunks. They
differ in rounding alone. A fused matrix of which not every projection has increments is expanded.

Shape legend: I input features, O output features, R ranks of a chunk's increments, r of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from core.checkpoint import Checkpoint
from core.factors import LowRankPair, ModuleKey
from core.model_config import BaseInfo, ModelConfig
from core.vertical import VerticalConfig


class LayerMatrices(Protocol):
    """The fused matrix of `names`, some of `factors.PROJECTIONS`, in each layer."""

    def owner(self, layer: int, names: Sequence[str]) -> int:
        """The layer whose matrix this layer multiplies with: itself or one before it."""
        ...

    def weight(self, layer: int, names: Sequence[str]) -> Tensor:
        """weight_OI of a layer that owns it, concatenated along the output features."""
        ...

    def increments(self, layer: int, names: Sequence[str]) -> Mapping[str, LowRankPair]:
        """What the layer adds to its owner's product, for every row; empty for an owner."""
        ...


def layer_matrices(checkpoint: Checkpoint, config: ModelConfig, *, factored: bool) -> LayerMatrices:
    """The matrices of a base, plain or vertical; `factored` is how a vertical one is read."""
    if config.vertical is None:
        return PlainMatrices(checkpoint, config)
    return VerticalMatrices(checkpoint, config, config.vertical, factored=factored)


@contextmanager
def matrices_in_fp32(base: BaseInfo) -> Iterator[LayerMatrices]:
    """What each layer of a stored base multiplies with, on the CPU. Ask for layers in order.

    Raises UnsupportedModelError for a tensor that is missing or has another shape.
    """
    with Checkpoint(base.path, torch.device("cpu"), torch.float32) as checkpoint:
        yield layer_matrices(checkpoint, base.config, factored=False)


class PlainMatrices:
    """Each layer's own."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint, self._config = checkpoint, config

    def owner(self, layer: int, names: Sequence[str]) -> int:
        """See `LayerMatrices.owner`."""
        return layer

    def weight(self, layer: int, names: Sequence[str]) -> Tensor:
        """See `LayerMatrices.weight`."""
        return _joined([self._weight(layer, name) for name in names])

    def increments(self, layer: int, names: Sequence[str]) -> Mapping[str, LowRankPair]:
        """See `LayerMatrices.increments`."""
        return {}

    def _weight(self, layer: int, name: str) -> Tensor:
        shape = self._config.projection_shape(name)
        return self._checkpoint.read(f"{ModuleKey(layer, name).path}.weight", shape)


class VerticalMatrices:
    """A vertical base's, read chunk by chunk: layers are asked for in their order."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        vertical: VerticalConfig,
        *,
        factored: bool,
    ) -> None:
        self._checkpoint, self._config = checkpoint, config
        self._vertical, self._factored = vertical, factored
        self._chunk = range(0)
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}  # of `_chunk`
        self._firsts: dict[str, Tensor] = {}  # likewise, in fp32, where layers are expanded

    def owner(self, layer: int, names: Sequence[str]) -> int:
        """See `LayerMatrices.owner`."""
        shared = self._factored and all(name in self._vertical.target_modules for name in names)
        return self._vertical.chunk_of(layer).start if shared else layer

    def weight(self, layer: int, names: Sequence[str]) -> Tensor:
        """See `LayerMatrices.weight`."""
        self._enter(layer)
        return _joined([self._weight(layer, name) for name in names])

    def increments(self, layer: int, names: Sequence[str]) -> Mapping[str, LowRankPair]:
        """See `LayerMatrices.increments`. The pairs of a chunk's layers view one stack."""
        if self.owner(layer, names) == layer:
            return {}
        self._enter(layer)
        return {name: self._increment(layer, name) for name in names}

    def _enter(self, layer: int) -> None:
        if layer not in self._chunk:
            self._chunk = self._vertical.chunk_of(layer)
            self._stacks, self._firsts = {}, {}

    def _weight(self, layer: int, name: str) -> Tensor:
        first, is_target = self._chunk.start, name in self._vertical.target_modules
        if layer == first or not is_target:
            return self._read(layer, name)
        if name not in self._firsts:
            self._firsts[name] = self._read(first, name, torch.float32)
        a_rI, b_rO = (part[self._vertical.ranks_of(layer)].float() for part in self._stack(name))
        expanded_OI = self._firsts[name] + self._vertical.scale * (b_rO.T @ a_rI)
        return expanded_OI.to(self._checkpoint.dtype)

    def _increment(self, layer: int, name: str) -> LowRankPair:
        a_RI, b_RO = self._stack(name)
        ranks = self._vertical.ranks_of(layer)
        return LowRankPair(a_RI[ranks], b_RO[ranks], self._vertical.scale)

    def _stack(self, name: str) -> tuple[Tensor, Tensor]:
        """a_RI and b_RO of all increments of the chunk."""
        if name not in self._stacks:
            num_out, num_in = self._config.projection_shape(name)
            rank = self._vertical.rank
            dtype = self._checkpoint.dtype if self._factored else torch.float32
            paths = [ModuleKey(layer, name).path for layer in self._chunk[1:]]
            read = self._checkpoint.read
            a_RI = torch.cat([read(f"{p}.vertical_A", (rank, num_in), dtype) for p in paths])
            b_RO = torch.cat([read(f"{p}.vertical_B", (num_out, rank), dtype).T for p in paths])
            self._stacks[name] = a_RI, b_RO
        return self._stacks[name]

    def _read(self, layer: int, name: str, dtype: torch.dtype | None = None) -> Tensor:
        shape = self._config.projection_shape(name)
        return self._checkpoint.read(f"{ModuleKey(layer, name).path}.weight", shape, dtype)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
