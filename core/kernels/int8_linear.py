"""A frozen int8 matrix in panels for the compiled kernel; `core.int8.TorchInt8Linear` is its twin.

Shape legend: I input features, G blocks of them, O output features, P panels of outputs, W outputs
of a panel, K quads of input features, Q the 4 features of a quad.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from core.huge_pages import Arena
from core.int8 import quantise
from core.kernels.compiled_linear import CompiledLinear
from core.kernels.structs import Matrix

_WIDTH, _QUAD, _ZERO = 48, 4, 128  # as in int8.c


class Int8Linear(CompiledLinear):
    """A `CompiledLinear` in int8, packed into `arena`.

    With `num_terms` 2 the inputs are rounded to 15 bits instead of 8, for twice the work.
    """

    def __init__(
        self, library: ctypes.CDLL, arena: Arena, weight_OI: Tensor, *, num_terms: int = 1
    ) -> None:
        num_out, num_in = weight_OI.shape
        q_OI, scale_OG = quantise(weight_OI)
        panels_PKWQ, scale_PGW = arena.copy(_panels(q_OI)), arena.copy(_scales(scale_OG))
        addresses = panels_PKWQ.data_ptr(), scale_PGW.data_ptr()
        matrix = Matrix(*addresses, num_in, num_out, num_out // 2, num_terms)
        super().__init__(library, matrix, (panels_PKWQ, scale_PGW))


def _panels(q_OI: Tensor) -> Tensor:
    """Unsigned, zeros beyond the last output."""
    q_OI = F.pad(q_OI, (0, 0, 0, -len(q_OI) % _WIDTH))
    q_PWKQ: Tensor = q_OI.unflatten(1, (-1, _QUAD)).unflatten(0, (-1, _WIDTH))
    return (q_PWKQ.transpose(1, 2).to(torch.int16) + _ZERO).to(torch.uint8).contiguous()


def _scales(scale_OG: Tensor) -> Tensor:
    scale_OG = F.pad(scale_OG, (0, 0, 0, -len(scale_OG) % _WIDTH))
    scale_PWG: Tensor = scale_OG.unflatten(0, (-1, _WIDTH))
    return scale_PWG.transpose(1, 2).contiguous()
