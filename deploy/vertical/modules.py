"""Vertical LoRA (arXiv 2406.09315) as torch modules that train, and as a checkpoint to serve.

A transformers Llama is made vertical in place: in all but the first layers of its chunks each
projection becomes a `VerticalLinear`, which shares the first layer's matrix and adds low-rank
increments. `core/vertical.py` says what `recursive` and `base-relative` mean.

Shape legend: I input features, O output features, R ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from core.factors import ModuleKey
from core.vertical import VERTICAL_MODEL_TYPE, VerticalConfig


class Increment(nn.Module):
    """One layer's B A of one projection; B is zero at first, as LoRA's, so layers begin equal."""

    def __init__(self, num_in: int, num_out: int, rank: int) -> None:
        super().__init__()
        self.a_RI = nn.Parameter(torch.randn(rank, num_in) / num_in**0.5)
        self.b_OR = nn.Parameter(torch.zeros(num_out, rank))


class VerticalLinear(nn.Module):
    """x W.T + scale * sum_j (x A_j.T) B_j.T over the increments that count in this layer.

    W is `base`'s; a bias is the layer's own and begins like `base`'s.
    """

    def __init__(self, base: nn.Linear, increments: Sequence[Increment], scale: float) -> None:
        super().__init__()
        self.base, self.increments, self.scale = base, nn.ModuleList(increments), scale
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        a_RI = torch.cat([each.a_RI for each in self.increments])
        b_OR = torch.cat([each.b_OR for each in self.increments], dim=1)
        added: Tensor = functional.linear(functional.linear(x, a_RI), b_OR)
        return functional.linear(x, self.base.weight, self.bias) + self.scale * added


def make_vertical(model: LlamaForCausalLM, vertical: VerticalConfig) -> None:
    """Replace the projections of later layers; what they had is let go."""
    for keys in _columns(model, vertical):
        base = model.get_submodule(keys[0].path)
        increments: list[Increment] = []
        for key in keys[1:]:
            increments.append(Increment(base.in_features, base.out_features, vertical.rank))
            counting = increments if vertical.increments == "recursive" else increments[-1:]
            model.set_submodule(key.path, VerticalLinear(base, counting, vertical.scale))


def num_parameters(model: nn.Module) -> int:
    """What is trained and stored; shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_vertical(
    model: LlamaForCausalLM, vertical: VerticalConfig, path: Path, dtype: torch.dtype
) -> None:
    """Write config.json and model.safetensors of a vertical base into the directory `path`."""
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ".base." not in name and ".increments." not in name
    }
    for keys in _columns(model, vertical):
        for key in keys[1:]:
            own = model.get_submodule(key.path).increments[-1]
            tensors |= {f"{key.path}.vertical_A": own.a_RI, f"{key.path}.vertical_B": own.b_OR}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    path.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {
        "model_type": VERTICAL_MODEL_TYPE,
        "architectures": ["VerticalLlamaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
        "vertical": asdict(vertical),
    }
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _columns(model: LlamaForCausalLM, vertical: VerticalConfig) -> Iterator[list[ModuleKey]]:
    """For each chunk and projection with increments: its keys from the first layer on."""
    start = 0
    for size in vertical.chunk_sizes:
        for name in vertical.target_modules:
            yield [ModuleKey(layer, name) for layer in range(start, start + size)]
        start += size
    assert start == model.config.num_hidden_layers
