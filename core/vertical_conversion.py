"""A plain Llama as a vertical base, by truncated SVDs; and how far that is from the plain one.

Each later layer of a chunk gets the best increment of the given rank (Eckart and Young) on what the
layers before it give. Layers of pretrained models have little in common, so the result is far from
the model; arXiv 2406.09315 trains vertical models from scratch. Layers that do have such increments
are found exactly. Knows nothing of text.

Shape legend: I input features, O output features, R rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.checkpoint import Checkpoint
from core.errors import UnsupportedModelError
from core.factors import ModuleKey
from core.model_config import ModelConfig, read_model_config
from core.vertical import VERTICAL_MODEL_TYPE, VerticalConfig

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pth", "*.gguf", "config.json")


@dataclass(frozen=True)
class MatrixFit:
    """One matrix of a later layer and what stands for it; errors are Frobenius norms, by its own.

    error       of what the vertical base has in its place
    alone       of the best matrix of the same rank by itself, without the layers before it
    cosine      between it and the same matrix of the layer before
    """

    key: ModuleKey
    error: float
    alone: float
    cosine: float


def convert_to_vertical(
    source: Path,
    target: Path,
    vertical: VerticalConfig,
    *,
    progress: Callable[[MatrixFit], None] = lambda fit: None,
) -> list[MatrixFit]:
    """Write `source`, a plain Llama, to the new directory `target` as a vertical base.

    Tensors keep their dtypes, increments have those of the matrices that they stand for. Raises
    UnsupportedModelError for a source that is not plain, or whose layers are not those of
    `vertical`.
    """
    config = read_model_config(source)
    if config.vertical is not None:
        raise UnsupportedModelError(f"{source} is a vertical base already")
    if sum(vertical.chunk_sizes) != config.num_layers:
        raise UnsupportedModelError(
            f"chunks of {', '.join(map(str, vertical.chunk_sizes))} layers are "
            f"{sum(vertical.chunk_sizes)}, {source} has {config.num_layers}"
        )
    fits = []
    with Checkpoint(source, torch.device("cpu"), torch.float32) as checkpoint:
        tensors = {name: checkpoint.stored(name) for name in checkpoint.names}
        for name in vertical.target_modules:
            for fit in _factorise(tensors, config, vertical, name):
                fits.append(fit)
                progress(fit)
        _write(source, target, tensors, vertical)
    return fits


def _factorise(
    tensors: dict[str, Tensor], config: ModelConfig, vertical: VerticalConfig, name: str
) -> Iterator[MatrixFit]:
    """Replace `name`'s matrices of later layers by their increments."""
    previous = before = first = torch.empty(0)
    for layer in range(config.num_layers):
        key = ModuleKey(layer, name)
        stored = tensors[f"{key.path}.weight"]
        weight_OI = stored.double()
        if layer == vertical.chunk_of(layer).start:
            first = before = weight_OI
        else:
            start = before if vertical.increments == "recursive" else first
            b_OR, a_RI = best_of_rank(weight_OI - start, vertical.rank)
            a_RI, b_OR = (part.to(stored.dtype) for part in (a_RI / vertical.scale, b_OR))
            before = start + vertical.scale * (b_OR.double() @ a_RI.double())
            del tensors[f"{key.path}.weight"]
            tensors |= {f"{key.path}.vertical_A": a_RI, f"{key.path}.vertical_B": b_OR}
            yield MatrixFit(
                key,
                _relative(before - weight_OI, weight_OI),
                _error_alone(weight_OI, vertical.rank),
                float((weight_OI * previous).sum() / (weight_OI.norm() * previous.norm())),
            )
        previous = weight_OI


def best_of_rank(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """b_OR and a_RI whose product is nearest to `matrix_OI`; zeros where it has a smaller rank."""
    u_OK, s_K, v_KI = torch.linalg.svd(matrix_OI, full_matrices=False)
    root_K = s_K[:rank].sqrt()
    b_OR = matrix_OI.new_zeros(len(matrix_OI), rank)
    a_RI = matrix_OI.new_zeros(rank, matrix_OI.shape[1])
    b_OR[:, : len(root_K)] = u_OK[:, :rank] * root_K
    a_RI[: len(root_K)] = v_KI[:rank] * root_K[:, None]
    return b_OR, a_RI


def _error_alone(weight_OI: Tensor, rank: int) -> float:
    values_K = torch.linalg.svdvals(weight_OI)
    return float(values_K[rank:].norm() / values_K.norm())


def _relative(difference: Tensor, of: Tensor) -> float:
    return float(difference.norm() / of.norm())


def _write(
    source: Path, target: Path, tensors: dict[str, Tensor], vertical: VerticalConfig
) -> None:
    content: dict[str, Any] = json.loads((source / "config.json").read_text())
    content |= {
        "model_type": VERTICAL_MODEL_TYPE,
        "architectures": ["VerticalLlamaForCausalLM"],
        "vertical": asdict(vertical),
    }
    target.mkdir(parents=True)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(file, target / file.name)
