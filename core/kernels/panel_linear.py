"""A frozen fp32 matrix in panels for the compiled kernels; ARCHITECTURE.md has it beside oneDNN.

Shape legend: I input features, O output features.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core.huge_pages import Arena
from core.kernels.compiled_linear import CompiledLinear
from core.kernels.structs import Matrix


class PanelLinear(CompiledLinear):
    """A `CompiledLinear` in fp32, packed into `arena`.

    With `in_halves` no panel has outputs of both halves.
    """

    def __init__(
        self, library: ctypes.CDLL, arena: Arena, weight_OI: Tensor, *, in_halves: bool = False
    ) -> None:
        num_out, num_in = weight_OI.shape
        half = num_out // 2 if in_halves else num_out
        library.packed_floats.argtypes, library.packed_floats.restype = [c_int64] * 3, c_int64
        library.pack_panels.argtypes = [c_void_p] * 2 + [c_int64] * 3 + [c_int]
        packed = arena.empty((library.packed_floats(num_in, half, num_out),))
        weight_OI = weight_OI.contiguous()
        sizes = num_in, half, num_out, torch.get_num_threads()
        library.pack_panels(weight_OI.data_ptr(), packed.data_ptr(), *sizes)
        super().__init__(
            library, Matrix(packed.data_ptr(), None, num_in, num_out, half, 0), (packed,)
        )
