"""A head that finds the most probable token without computing all logits.

All outputs are screened by a sketch in 8 bits, whose bounds leave some ten of them; the logits of
these are computed exactly (argmax.c). So the token is the very one that all logits would give.

Shape legend: R rows, H hidden size, V vocabulary, P the vocabulary padded to whole panels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_int, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from core.head import Head, LogitsHead
from core.kernels.packed_weights import BLOCK, Form, pack_nearly
from core.kernels.panel_linear import PanelLinear
from core.kernels.structs import ScreenedMatrix

_PANEL = 48  # outputs of the widest panel; narrower ones divide it


def make_head(
    library: ctypes.CDLL, make_panels: Callable[..., PanelLinear], weight_VH: Tensor
) -> Head:
    """A head of `make_panels(weight_VH)`, screened where this machine and the weights allow it.

    Screened are matrices in 8 bits and wider ones, for which a sketch is made (a byte a weight).
    """
    exact = make_panels(weight_VH)
    form = Form(exact.matrix.form)
    if not library.can_argmax() or form is Form.GRID_4 or weight_VH.shape[1] % BLOCK:
        return LogitsHead(exact)
    if form is Form.GRID_8:
        return ScreenedHead(library, exact, exact, _norms(weight_VH), torch.zeros(len(weight_VH)))
    nearly = pack_nearly(weight_VH)
    if nearly is None:
        return LogitsHead(exact)
    sketch = make_panels(weight_VH, packed=nearly)
    error_V = _norms(weight_VH - nearly.weights())
    return ScreenedHead(library, exact, sketch, _norms(weight_VH), error_V)


def _norms(weight_VH: Tensor) -> Tensor:
    norm_V: Tensor = torch.linalg.vector_norm(weight_VH, dim=1)
    return norm_V


class ScreenedHead(LogitsHead):
    """`exact` is what logits are computed with, `sketch` screens it.

    norm_V    of each output's weights
    error_V   of what the sketch changes in them
    """

    linear: PanelLinear

    def __init__(
        self,
        library: ctypes.CDLL,
        exact: PanelLinear,
        sketch: PanelLinear,
        norm_V: Tensor,
        error_V: Tensor,
    ) -> None:
        super().__init__(exact)
        norm_P, error_P = (F.pad(one_V, (0, -len(one_V) % _PANEL)) for one_V in (norm_V, error_V))
        self._kept = sketch, norm_P, error_P  # the kernel's addresses lead there
        self._matrix = ScreenedMatrix(
            exact.matrix, sketch.matrix, norm_P.data_ptr(), error_P.data_ptr()
        )
        self.num_bytes += norm_P.nbytes + error_P.nbytes
        self.num_bytes += 0 if sketch is exact else sketch.num_bytes
        self._argmax_rows = library.argmax_rows
        self._argmax_rows.argtypes = [POINTER(ScreenedMatrix), c_void_p, c_int64, c_void_p, c_int]

    def most_probable(self, x_RH: Tensor) -> list[int | None]:
        """See `Head.most_probable`. Raises MemoryError."""
        x_RH = x_RH.contiguous()
        token_R = torch.empty(len(x_RH), dtype=torch.int64)
        if self._argmax_rows(
            byref(self._matrix),
            x_RH.data_ptr(),
            len(x_RH),
            token_R.data_ptr(),
            torch.get_num_threads(),
        ):
            raise MemoryError("no memory for rounded rows")
        tokens: list[int | None] = [int(token) for token in token_R.tolist()]
        undecided = [row for row, token in enumerate(tokens) if token == -1]
        if undecided:
            found = super().most_probable(x_RH[undecided])
            for row, token in zip(undecided, found, strict=True):
                tokens[row] = token
        return tokens
