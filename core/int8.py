"""Frozen matrices in int8: how they are rounded, and their product in torch's own words.

A weight is `q_OI * scale_OG`: one scale per output and `BLOCK` input features, as llama.cpp's Q8_0.
Inputs are rounded in the same blocks while they are multiplied. Knows nothing of adapters, whose
increments stay fp32.

Shape legend: T tokens of a step, I input features (padded to whole blocks), G blocks of them, O
output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
_LARGEST = 127
_SECOND_TERM = 2 * _LARGEST  # what one term leaves over is half its step at most


def quantise(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 [O, I] and its bf16 scales [O, G]; I is padded with zeros to whole blocks."""
    weight_OI = F.pad(weight_OI.float(), (0, -weight_OI.shape[1] % BLOCK))
    weight_OGB = weight_OI.unflatten(1, (-1, BLOCK))
    scale_OG = _bf16_not_below(weight_OGB.abs().amax(2) / _LARGEST)
    step_OG1 = scale_OG.float()[..., None].clamp(min=1e-30)
    return (weight_OGB / step_OG1).round().to(torch.int8).flatten(1), scale_OG


def dequantise(q_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """The fp32 matrix that `quantise` stands for."""
    q_OGB: Tensor = q_OI.unflatten(1, (-1, BLOCK))
    return (q_OGB * scale_OG.float()[..., None]).flatten(1)


def rounded(x_TI: Tensor, num_terms: int) -> Tensor:
    """`x_TI` as the products see it: each block in 8 bits, or with two terms in 15."""
    rest_TGB = x_TI.unflatten(1, (-1, BLOCK))
    scale_TG1 = rest_TGB.abs().amax(2, keepdim=True) / _LARGEST
    total_TGB = torch.zeros_like(rest_TGB)
    for _ in range(num_terms):
        term_TGB = (rest_TGB / scale_TG1.clamp(min=1e-30)).round() * scale_TG1
        total_TGB, rest_TGB = total_TGB + term_TGB, rest_TGB - term_TGB
        scale_TG1 = scale_TG1 / _SECOND_TERM
    return total_TGB.flatten(1)


class TorchInt8Linear:
    """A `core.linear.Linear` in int8 where there are no compiled kernels: correct and slow.

    The weight is widened to fp32 for each product.
    """

    def __init__(self, weight_OI: Tensor, *, num_terms: int = 1) -> None:
        self.in_features, self._num_terms = weight_OI.shape[1], num_terms
        self._q_OI, self._scale_OG = quantise(weight_OI)
        self.num_bytes = self._q_OI.nbytes + self._scale_OG.nbytes

    def shares_storage_with(self, tensor: Tensor) -> bool:
        """Never: int8 is a copy."""
        return False

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See `core.linear.Linear.__call__`."""
        x_TI = F.pad(x_TI, (0, self._q_OI.shape[1] - self.in_features))
        return F.linear(rounded(x_TI, self._num_terms), dequantise(self._q_OI, self._scale_OG))


def _bf16_not_below(scale: Tensor) -> Tensor:
    """Rounded up, so that no weight is clipped."""
    near = scale.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.float() < scale, above, near)
