"""A frozen fp32 matrix in panels for the compiled kernels; ARCHITECTURE.md has it beside oneDNN.

Shape legend: I input features, O output features.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core.kernels.compiled_linear import CompiledLinear
from core.kernels.structs import Matrix


class PanelLinear(CompiledLinear):
    """A `CompiledLinear` in fp32."""

    def __init__(self, library: ctypes.CDLL, weight_OI: Tensor) -> None:
        num_out, num_in = weight_OI.shape
        library.panel_width.restype = c_int64
        width = library.panel_width()
        panels = torch.empty(-(-num_out // width) * num_in * width)
        library.pack_panels.argtypes = [c_void_p] * 2 + [c_int64] * 2 + [c_int]
        weight_OI = weight_OI.contiguous()
        library.pack_panels(
            weight_OI.data_ptr(), panels.data_ptr(), num_in, num_out, torch.get_num_threads()
        )
        super().__init__(library, Matrix(panels.data_ptr(), None, num_in, num_out, 0), (panels,))
