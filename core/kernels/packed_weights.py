"""Forms of a frozen fp32 matrix that take fewer bits and mean the very same, found by trying.

A checkpoint that was saved in bf16, or widened from a GGUF file's blocks, says no more in 32 bits
than it did before. Knows nothing of how a matrix is multiplied.

Shape legend: I input features, O output features, G blocks of `BLOCK` input features, B features
of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

BLOCK = 32
_PROBED_ROWS = 2


class Form(IntEnum):
    """How a panel has its weights, numbered as in kernels.h. On a grid: number * step + base."""

    FP32 = 0
    FP16 = 1
    BF16 = 2
    GRID_8 = 3
    GRID_4 = 4


@dataclass(frozen=True)
class PackedWeights:
    """A matrix [O, I] in fewer bits than 32.

    number_OI  int16: the bits of fp16 or bf16, or a grid's numbers
    step_OG    fp16, a grid's alone; so is `base_OG`
    """

    form: Form
    number_OI: Tensor
    step_OG: Tensor | None = None
    base_OG: Tensor | None = None

    def weights(self) -> Tensor:
        """The fp32 matrix that a grid's numbers, steps and bases stand for."""
        assert self.step_OG is not None and self.base_OG is not None, "for grids alone"
        number_OGB = self.number_OI.float().unflatten(1, (-1, BLOCK))
        step_OG1, base_OG1 = self.step_OG.float()[..., None], self.base_OG.float()[..., None]
        weight_OI: Tensor = torch.addcmul(base_OG1, number_OGB, step_OG1).flatten(1)
        return weight_OI


def pack_exactly(weight_OI: Tensor) -> PackedWeights | None:
    """The form with the fewest bits that gives every weight of the fp32 matrix back, if any does.

    Tried are the blocks of GGUF's Q4_1, Q4_0 and Q8_0, bf16 and fp16. Takes milliseconds where
    none fits the first rows, else a few passes over the matrix.
    """
    if weight_OI.shape[1] % BLOCK or not len(weight_OI):
        return None
    for form in _FORMS:
        if form(weight_OI[:_PROBED_ROWS]) is not None and (packed := form(weight_OI)) is not None:
            return packed
    return None


def pack_nearly(weight_OI: Tensor) -> PackedWeights | None:
    """Any fp32 matrix as `Form.GRID_8` with bases of -128 steps: rounded, as Q8_0 rounds.

    None where steps do not fit fp16.
    """
    weight_OGB = weight_OI.unflatten(1, (-1, BLOCK))
    step_OG = (weight_OGB.abs().amax(2) / 127).half()
    base_OG = -128 * step_OG
    if not base_OG.isfinite().all():
        return None
    number_OGB = weight_OGB / step_OG.float().clamp(min=1e-30)[..., None]
    number_OGB.round_().clamp_(-127, 127).add_(128)
    return PackedWeights(Form.GRID_8, number_OGB.flatten(1).to(torch.int16), step_OG, base_OG)


def _q4_1(weight_OI: Tensor) -> PackedWeights | None:
    """The least number of each block is 0 and the greatest 15."""
    weight_OGB = weight_OI.unflatten(1, (-1, BLOCK))
    least_OG, greatest_OG = torch.aminmax(weight_OGB, dim=2)
    return _grid(weight_OGB, (greatest_OG - least_OG) / 15, least_OG, Form.GRID_4)


def _q4_0(weight_OI: Tensor) -> PackedWeights | None:
    """8 is zero; the weight that is furthest from it has the number 0."""
    weight_OGB = weight_OI.unflatten(1, (-1, BLOCK))
    furthest_OG1 = weight_OGB.abs().argmax(2, keepdim=True)
    furthest_OG = weight_OGB.gather(2, furthest_OG1).squeeze(2)
    return _grid(weight_OGB, furthest_OG / -8, furthest_OG, Form.GRID_4)


def _q8_0(weight_OI: Tensor) -> PackedWeights | None:
    """128 is zero; the weight that is furthest from it has 1 or 255."""
    weight_OGB = weight_OI.unflatten(1, (-1, BLOCK))
    step_OG = (weight_OGB.abs().amax(2) / 127).half().float()
    return _grid(weight_OGB, step_OG, -128 * step_OG, Form.GRID_8)


def _bf16(weight_OI: Tensor) -> PackedWeights | None:
    return _half(weight_OI, torch.bfloat16, Form.BF16)


def _fp16(weight_OI: Tensor) -> PackedWeights | None:
    return _half(weight_OI, torch.float16, Form.FP16)


def _half(weight_OI: Tensor, dtype: torch.dtype, form: Form) -> PackedWeights | None:
    rounded_OI = weight_OI.to(dtype)
    if not rounded_OI.float().equal(weight_OI) or not rounded_OI.isfinite().all():
        return None
    return PackedWeights(form, rounded_OI.view(torch.int16))


_FORMS = (_q4_1, _q4_0, _q8_0, _bf16, _fp16)


def _grid(weight_OGB: Tensor, step_OG: Tensor, base_OG: Tensor, form: Form) -> PackedWeights | None:
    """The numbers of a grid with these steps and bases, rounded to fp16, if they are exact."""
    step_OG, base_OG = step_OG.half(), base_OG.half()
    step_OG1, base_OG1 = step_OG.float()[..., None], base_OG.float()[..., None]
    number_OGB = weight_OGB - base_OG1
    number_OGB /= torch.where(step_OG1 == 0, 1.0, step_OG1)
    number_OGB.round_().clamp_(0, 15 if form is Form.GRID_4 else 255).nan_to_num_(0.0)
    # fp16 times 8 bits is exact in fp32, so the sum rounds once, as a fused multiply-add does.
    if not torch.addcmul(base_OG1, number_OGB, step_OG1).equal(weight_OGB):
        return None
    return PackedWeights(form, number_OGB.flatten(1).to(torch.int16), step_OG, base_OG)
