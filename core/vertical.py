"""What a vertical base's config.json says: chunks of layers that share one base layer's matrices.

Vertical LoRA (arXiv 2406.09315): the first layer of a chunk is stored whole; each later layer l
adds low-rank increments to it,

    recursive        W_l = W_(l-1) + s B_l A_l   (the paper), so all increments up to l count
    base-relative    W_l = W_first + s B_l A_l   (the authors' code), so its own alone counts

with s = alpha / rank. Norms are each layer's own. Knows nothing of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from core.errors import UnsupportedModelError
from core.factors import PROJECTIONS

VERTICAL_MODEL_TYPE = "vertical_llama"
"""`model_type` in config.json; all else of it is a Llama's, with an object `vertical`."""

Increments = Literal["recursive", "base-relative"]


@dataclass(frozen=True)
class VerticalConfig:
    """The object `vertical` of config.json.

    chunk_sizes      layers of each chunk, in order
    rank             of every increment
    alpha            increments are scaled by alpha / rank
    increments       what they are added to, see the module
    target_modules   the projections that have increments; the others are stored whole in each layer
    """

    chunk_sizes: tuple[int, ...]
    rank: int
    alpha: float
    increments: Increments
    target_modules: tuple[str, ...] = PROJECTIONS

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def chunk_of(self, layer: int) -> range:
        """The layers of the chunk that has `layer`."""
        start = 0
        for size in self.chunk_sizes:
            if layer < start + size:
                return range(start, start + size)
            start += size
        raise IndexError(f"layer {layer}, the chunks have {start}")

    def ranks_of(self, layer: int) -> slice:
        """The layer's part of its chunk's increments, stacked along the rank in layers' order."""
        depth = layer - self.chunk_of(layer).start
        begin = 0 if self.increments == "recursive" else max(depth - 1, 0)
        return slice(begin * self.rank, depth * self.rank)


def even_chunks(num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Sizes of chunks as even as can be, larger ones first.

    Raises UnsupportedModelError when there are more chunks than layers.
    """
    if not 1 <= num_chunks <= num_layers:
        raise UnsupportedModelError(f"{num_chunks} chunks, must be 1 to {num_layers}, the layers")
    size, left = divmod(num_layers, num_chunks)
    return tuple(size + (number < left) for number in range(num_chunks))


def read_vertical_config(file: Path, content: Any, num_layers: int) -> VerticalConfig:
    """Check `content`, the object `vertical` of `file`.

    Raises UnsupportedModelError that names the key, its value and what would be right.
    """
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{file}: vertical is {content!r}, must be an object")
    keys = [field.name for field in fields(VerticalConfig)]
    unknown, missing = set(content) - set(keys), set(keys[:-1]) - set(content)
    if unknown or missing:
        problem = f"has unknown keys {sorted(unknown)}" if unknown else f"lacks {sorted(missing)}"
        raise UnsupportedModelError(f"{file}: vertical {problem}; its keys are {', '.join(keys)}")
    return VerticalConfig(
        chunk_sizes=_chunk_sizes(file, content["chunk_sizes"], num_layers),
        rank=_rank(file, content["rank"]),
        alpha=_alpha(file, content["alpha"]),
        increments=_one_of(file, "increments", content["increments"], get_args(Increments)),
        target_modules=_target_modules(file, content.get("target_modules", list(PROJECTIONS))),
    )


def _chunk_sizes(file: Path, value: Any, num_layers: int) -> tuple[int, ...]:
    are_sizes = isinstance(value, list) and all(type(size) is int and size >= 1 for size in value)
    if not are_sizes or sum(value) != num_layers:
        raise _wrong(file, "chunk_sizes", value, f"a list of sizes whose sum is {num_layers}")
    return tuple(value)


def _rank(file: Path, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _wrong(file, "rank", value, "an integer of at least 1")
    return value


def _alpha(file: Path, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise _wrong(file, "alpha", value, "a number above 0")
    return float(value)


def _target_modules(file: Path, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or len(set(map(str, value))) < len(value):
        raise _wrong(file, "target_modules", value, f"some of {', '.join(PROJECTIONS)}, each once")
    return tuple(_one_of(file, "target_modules", name, PROJECTIONS) for name in value)


def _one_of(file: Path, key: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise _wrong(file, key, value, f"one of {', '.join(allowed)}")
    return value


def _wrong(file: Path, key: str, value: Any, right: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{file}: vertical.{key} is {value!r}, must be {right}")
