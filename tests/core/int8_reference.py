"""Slow int8: rounding block by block, and transformers over the matrices that int8 stands for."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn, where
from transformers_oracle import load_reference

from core.factors import AdapterFactors, LowRankPair
from core.int8 import BLOCK, dequantise, quantise


def slow_rounded(x_TI: Tensor) -> Tensor:
    """8 bits a block, block by block."""
    out_TI = x_TI.clone()
    for block_TB in out_TI.split(BLOCK, dim=-1):
        step_T1 = block_TB.abs().amax(-1, keepdim=True) / 127
        block_TB.copy_(where(step_T1 > 0, (block_TB / step_T1).round() * step_T1, 0))
    return out_TI


def held(weight_OI: Tensor) -> Tensor:
    """The matrix that int8 stands for."""
    return dequantise(*quantise(weight_OI))[:, : weight_OI.shape[1]]


def int8_weights_reference(path: Path) -> Any:
    """transformers over the int8 matrices."""
    model = load_reference(path)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = held(module.weight.data)
    return model


def int8_reference(path: Path, factors: AdapterFactors | None) -> Any:
    """The same with inputs rounded too, but the head's; adapters see them as they are."""
    model = int8_weights_reference(path)
    for number, layer in enumerate(model.model.layers):
        for block in (layer.self_attn, layer.mlp):
            for name, module in block.named_children():
                if isinstance(module, nn.Linear):
                    pair = None if factors is None else factors.pairs.get((number, name))
                    _replace_forward(module, pair)
    return model


def _replace_forward(module: Any, pair: LowRankPair | None) -> None:
    def forward(x: Tensor) -> Tensor:
        y = slow_rounded(x) @ module.weight.T
        return y if pair is None else y + pair.scale * (x @ pair.a_RI.T) @ pair.b_RO

    module.forward = forward
