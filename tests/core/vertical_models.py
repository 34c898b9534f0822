"""Small vertical bases on disk, and the plain Llamas that they stand for.

The plain one is made here as the papers' formulas say, layer by layer in fp64; it shares no code
with core.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_llama
from torch import Tensor

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_vertical_llama(
    path: Path,
    *,
    chunk_sizes: Sequence[int] = (3, 2),
    rank: int = 3,
    alpha: float = 2.0,
    increments: str = "recursive",
    target_modules: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    std: float = 0.1,
    **options: Any,
) -> Path:
    """A tiny random Llama of which all but the first layers of chunks have random increments."""
    write_tiny_llama(path, num_hidden_layers=sum(chunk_sizes), **options)
    tensors = load_file(path / "model.safetensors")
    rng = torch.Generator().manual_seed(1)
    for layer in later_layers(chunk_sizes):
        for module in target_modules or MODULES:
            name = _path(layer, module)
            num_out, num_in = tensors.pop(f"{name}.weight").shape
            tensors[f"{name}.vertical_A"] = torch.randn(rank, num_in, generator=rng) * std
            tensors[f"{name}.vertical_B"] = torch.randn(num_out, rank, generator=rng) * std
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["model_type"], config["architectures"] = "vertical_llama", ["VerticalLlamaForCausalLM"]
    config["vertical"] = {
        "chunk_sizes": list(chunk_sizes),
        "rank": rank,
        "alpha": alpha,
        "increments": increments,
    }
    if target_modules is not None:
        config["vertical"]["target_modules"] = list(target_modules)
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_expanded(path: Path, vertical: Path) -> Path:
    """The plain Llama that a vertical base stands for, in fp32, as transformers loads it."""
    path.mkdir()
    config = json.loads((vertical / "config.json").read_text())
    about = config.pop("vertical")
    config["model_type"], config["architectures"] = "llama", ["LlamaForCausalLM"]
    config["dtype"] = "float32"
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(vertical / "model.safetensors")
    plain = {name: t.float() for name, t in tensors.items() if "vertical_" not in name}
    for module in MODULES:
        plain |= _expanded(tensors, about, module)
    save_file(plain, path / "model.safetensors", {"format": "pt"})
    for file in vertical.glob("*token*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def _expanded(
    tensors: Mapping[str, Tensor], about: dict[str, Any], module: str
) -> dict[str, Tensor]:
    scale = about["alpha"] / about["rank"]
    expanded = {}
    for layer in range(sum(about["chunk_sizes"])):
        name = _path(layer, module)
        if f"{name}.vertical_A" not in tensors:
            first = previous = tensors[f"{name}.weight"].double()
            continue
        a, b = (tensors[f"{name}.vertical_{part}"].double() for part in "AB")
        before = previous if about["increments"] == "recursive" else first
        previous = before + scale * (b @ a)
        expanded[f"{name}.weight"] = previous.float()
    return expanded


def later_layers(chunk_sizes: Sequence[int]) -> list[int]:
    """All layers but the first of each chunk."""
    later, start = [], 0
    for size in chunk_sizes:
        later += range(start + 1, start + size)
        start += size
    return later


def _path(layer: int, module: str) -> str:
    block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{module}"
