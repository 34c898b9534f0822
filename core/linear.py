"""One frozen weight matrix, in the layout that its device multiplies fastest.

Knows nothing of adapters: their low-rank increments are added to the output by the caller.

Shape legend: T tokens of a step, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """y_TO = x_TI @ weight_OI.T in some layout of the weight; `num_bytes` is what it holds."""

    num_bytes: int

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Multiply; returns a new tensor that the caller may change in place."""
        ...

    def shares_storage_with(self, tensor: Tensor) -> bool:
        """Whether no further bytes are held beside `tensor` (a tied head that is not packed)."""
        ...


MakeLinear = Callable[[Tensor], Linear]
"""Takes weight_OI, which may be let go afterwards."""


class FrozenLinear:
    """A `Linear` by torch.

    On the CPU in fp32 the weight is packed once for oneDNN (1.4 to 2.6 times faster than F.linear
    at 1 to 16 rows) and only the packed form is kept; elsewhere it stays a plain matrix.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self.num_bytes = weight_OI.nbytes
        self._packed = _can_pack(weight_OI)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())
            if self._packed
            else weight_OI.contiguous()
        )

    def shares_storage_with(self, tensor: Tensor) -> bool:
        """See `Linear.shares_storage_with`."""
        return not self._packed and self._weight.data_ptr() == tensor.data_ptr()

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See `Linear.__call__`."""
        if self._packed:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(
                x_TI, self._weight, None, "none", [], ""
            )
            return packed
        return F.linear(x_TI, self._weight)


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )
