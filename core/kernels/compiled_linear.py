"""A frozen matrix that the compiled kernels multiply with; its two kinds differ in how they pack.

Knows nothing of adapters or of what the matrix is for.

Shape legend: T tokens of a step, I input features, O output features.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core.kernels.structs import Increments, LowRank, Matrix


class CompiledLinear:
    """y_TO = x_TI @ weight_OI.T; see `core.linear.Linear`. Only the packed form is kept.

    matrix   where the kernels find it
    """

    def __init__(self, library: ctypes.CDLL, matrix: Matrix, packed: tuple[Tensor, ...]) -> None:
        self.matrix = matrix
        self.in_features, self.out_features = matrix.num_in, matrix.num_out
        self.num_bytes = sum(tensor.nbytes for tensor in packed)
        self._packed = packed  # `matrix` holds their addresses
        self._multiply = library.multiply
        self._multiply.argtypes = [POINTER(Matrix), *[c_void_p] * 2, c_int64]
        self._multiply.argtypes += [POINTER(Increments), POINTER(LowRank), c_void_p, c_int]

    def shares_storage_with(self, tensor: Tensor) -> bool:
        """Never: the packed form is a copy."""
        return False

    def __call__(
        self, x_TI: Tensor, adds: LowRank | None = None, increments: Increments | None = None
    ) -> Tensor:
        """Multiply; returns a new tensor that the caller may change in place."""
        x_TI = x_TI.contiguous()
        y_TO = x_TI.new_empty(len(x_TI), self.out_features)
        failed = self._multiply(
            byref(self.matrix),
            x_TI.data_ptr(),
            y_TO.data_ptr(),
            len(x_TI),
            None if increments is None else byref(increments),
            None if adds is None else byref(adds),
            None,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for quantised rows")
        return y_TO
