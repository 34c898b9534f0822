"""A frozen int8 matrix in panels for the compiled kernel; `core.int8.TorchInt8Linear` is its twin.

Knows nothing of adapters or of what the matrix is for.

Shape legend: T tokens of a step, I input features, G blocks of them, O output features, P panels of
outputs, W outputs of a panel, K quads of input features, Q the 4 features of a quad.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from core.int8 import quantise

_WIDTH, _QUAD, _ZERO = 48, 4, 128  # as in int8.c


class Int8Linear:
    """y_TO = x_TI @ weight_OI.T in int8; see `core.linear.Linear`.

    With `num_terms` 2 the inputs are rounded to 15 bits instead of 8, for twice the work.
    """

    def __init__(self, library: ctypes.CDLL, weight_OI: Tensor, *, num_terms: int = 1) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self._num_terms = num_terms
        self._multiply = library.multiply_int8
        self._multiply.argtypes = [c_void_p] * 4 + [c_int64] * 3 + [c_int] * 2
        q_OI, scale_OG = quantise(weight_OI)
        self._panels_PKWQ, self._scale_PGW = _panels(q_OI), _scales(scale_OG)
        self.num_bytes = self._panels_PKWQ.nbytes + self._scale_PGW.nbytes

    def shares_storage_with(self, tensor: Tensor) -> bool:
        """Never: the panels are a copy."""
        return False

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See `core.linear.Linear.__call__`."""
        x_TI = x_TI.contiguous()
        y_TO = x_TI.new_empty(len(x_TI), self.out_features)
        failed = self._multiply(
            x_TI.data_ptr(),
            self._panels_PKWQ.data_ptr(),
            self._scale_PGW.data_ptr(),
            y_TO.data_ptr(),
            len(x_TI),
            self.in_features,
            self.out_features,
            self._num_terms,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for quantised rows")
        return y_TO


def _panels(q_OI: Tensor) -> Tensor:
    """Unsigned, zeros beyond the last output."""
    q_OI = F.pad(q_OI, (0, 0, 0, -len(q_OI) % _WIDTH))
    q_PWKQ: Tensor = q_OI.unflatten(1, (-1, _QUAD)).unflatten(0, (-1, _WIDTH))
    return (q_PWKQ.transpose(1, 2).to(torch.int16) + _ZERO).to(torch.uint8).contiguous()


def _scales(scale_OG: Tensor) -> Tensor:
    scale_OG = F.pad(scale_OG, (0, 0, 0, -len(scale_OG) % _WIDTH))
    scale_PWG: Tensor = scale_OG.unflatten(0, (-1, _WIDTH))
    return scale_PWG.transpose(1, 2).contiguous()
