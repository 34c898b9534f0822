"""A frozen matrix in panels for the compiled kernels, multiplied in fp32.

ARCHITECTURE.md has it beside oneDNN.

Shape legend: I input features, O output features.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from core.huge_pages import Arena
from core.kernels.compiled_linear import CompiledLinear
from core.kernels.packed_weights import Form, PackedWeights, pack_exactly
from core.kernels.structs import Matrix


class PanelLinear(CompiledLinear):
    """A `CompiledLinear` in fp32, packed into `arena`.

    Its weights are kept in fewer bits where those mean the very same (`pack_exactly`); what it
    multiplies to is then the same bit for bit. With `in_halves` no panel has outputs of both
    halves. `packed` is the form to keep where it is known already.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        arena: Arena,
        weight_OI: Tensor,
        *,
        in_halves: bool = False,
        packed: PackedWeights | None = None,
    ) -> None:
        num_out, num_in = weight_OI.shape
        half = num_out // 2 if in_halves else num_out
        weight_OI = weight_OI.contiguous()
        exact = packed or pack_exactly(weight_OI)
        form = exact.form if exact else Form.FP32
        library.packed_words.argtypes, library.packed_words.restype = [c_int64] * 4, c_int64
        panels = arena.empty((library.packed_words(num_in, half, num_out, form),))
        sizes = num_in, half, num_out
        if exact:
            _pack_words(library, exact, panels, sizes)
        else:
            library.pack_panels.argtypes = [c_void_p] * 2 + [c_int64] * 3 + [c_int]
            addresses = weight_OI.data_ptr(), panels.data_ptr()
            library.pack_panels(*addresses, *sizes, torch.get_num_threads())
        matrix = Matrix(panels.data_ptr(), None, num_in, num_out, half, 0, form)
        super().__init__(library, matrix, (panels,))


def _pack_words(
    library: ctypes.CDLL, exact: PackedWeights, panels: Tensor, sizes: tuple[int, int, int]
) -> None:
    library.pack_words.argtypes = [c_void_p] * 4 + [c_int64] * 4 + [c_int]
    read = exact.number_OI, exact.step_OG, exact.base_OG
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in read]
    library.pack_words(*addresses, panels.data_ptr(), *sizes, exact.form, torch.get_num_threads())
