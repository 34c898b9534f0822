"""A frozen fp32 matrix in panels for the compiled kernels; ARCHITECTURE.md has it beside oneDNN.

Knows nothing of adapters or of what the matrix is for.

Shape legend: T tokens of a step, I input features, O output features.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor


class PanelLinear:
    """y_TO = x_TI @ weight_OI.T; see `core.linear.Linear`. Only the packed form is kept."""

    def __init__(self, library: ctypes.CDLL, weight_OI: Tensor) -> None:
        self.out_features, self.in_features = weight_OI.shape
        library.pack_panels.argtypes = [c_void_p] * 2 + [c_int64] * 2 + [c_int]
        self._multiply = library.multiply_panels
        self._multiply.argtypes = [c_void_p] * 3 + [c_int64] * 3 + [c_int]
        width = panel_width(library)
        num_panels = -(-self.out_features // width)
        self._panels = torch.empty(num_panels * self.in_features * width)
        self.num_bytes = self._panels.nbytes
        weight_OI = weight_OI.contiguous()
        library.pack_panels(
            weight_OI.data_ptr(),
            self._panels.data_ptr(),
            self.in_features,
            self.out_features,
            torch.get_num_threads(),
        )

    def shares_storage_with(self, tensor: Tensor) -> bool:
        """Never: the panels are a copy."""
        return False

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Multiply; returns a new tensor that the caller may change in place."""
        x_TI = x_TI.contiguous()
        y_TO = x_TI.new_empty(len(x_TI), self.out_features)
        self._multiply(
            x_TI.data_ptr(),
            self._panels.data_ptr(),
            y_TO.data_ptr(),
            len(x_TI),
            self.in_features,
            self.out_features,
            torch.get_num_threads(),
        )
        return y_TO


def panel_width(library: ctypes.CDLL) -> int:
    """Outputs of a panel; 0 where the kernels are not built for panels."""
    library.panel_width.restype = c_int64
    return int(library.panel_width())
