"""The kernels and torch, called alike: small operations, and products with what adapters add."""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from core.adapter_slots import AdapterSlots
from core.attention import attention
from core.batch import AdapterRows, Batch
from core.factors import PROJECTIONS
from core.huge_pages import Arena
from core.kernels.adapter_tables import AdapterTables
from core.kernels.panel_linear import PanelLinear
from core.kernels.structs import Increments, LowRank, Matrix
from core.kv_storage import KVStorage
from core.linear import FrozenLinear
from core.model_config import ModelConfig
from core.torch_ops import rms_norm, rotate_and_store, silu_mul
from core.weights import FUSED_PROJECTIONS

Product = Callable[[int, int, Tensor, Tensor], Tensor]
"""(layer, place in FUSED_PROJECTIONS, weight_OI, x_TI) → the product with all increments, which is
activated where `Adding.activates` says so."""
GATE_UP = 2


def multiply_gated(
    library: ctypes.CDLL,
    weight_OI: Tensor,
    x_TI: Tensor,
    adds: LowRank | None = None,
    increments: Increments | None = None,
) -> Tensor:
    """silu(gate) * up of the halves of the product."""
    library.multiply_gated.argtypes = _SIGNATURES["multiply_gated"]
    linear = PanelLinear(library, Arena(), weight_OI, in_halves=True)
    num_rows, num_out = len(x_TI), len(weight_OI)
    # NaN shows where something is read that was not written.
    both_TO, y_TI = (x_TI.new_full((num_rows, n), torch.nan) for n in (num_out, num_out // 2))
    failed = library.multiply_gated(
        byref(linear.matrix),
        x_TI.data_ptr(),
        both_TO.data_ptr(),
        y_TI.data_ptr(),
        num_rows,
        None if increments is None else byref(increments),
        None if adds is None else byref(adds),
        None,
        torch.get_num_threads(),
    )
    assert not failed
    return y_TI


class TorchOperations:
    """What the kernels are compared with."""

    def __init__(self, config: ModelConfig) -> None:
        self._eps = config.rms_norm_eps

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, delta_TH: Tensor | None) -> Tensor:
        return rms_norm(x_TH, weight_H, self._eps, delta_TH)

    def silu_mul(self, gate_up_T2I: Tensor) -> Tensor:
        return silu_mul(gate_up_T2I)

    def rotate_and_store(
        self, qkv_TO: Tensor, cos_sin: Any, kv: KVStorage, layer: int, slot_T: Tensor
    ) -> Tensor:
        return rotate_and_store(qkv_TO, cos_sin, kv, layer, slot_T)

    def attention(self, query_TND: Tensor, kv: KVStorage, layer: int, batch: Batch) -> Tensor:
        return attention(query_TND, kv, layer, batch)


_SIGNATURES: dict[str, list[Any]] = {
    "rms_norm": [c_void_p] * 4 + [c_int64] * 2 + [c_float, c_int],
    "silu_mul": [c_void_p] * 2 + [c_int64] * 2 + [c_int],
    "rotate_and_store": [c_void_p] * 6 + [c_int64] * 4 + [c_int],
    "decode_attention": [c_void_p, c_int64] + [c_void_p] * 5 + [c_int64] * 6 + [c_int],
    "prompt_attention": [c_void_p, c_int64] + [c_void_p] * 5 + [c_int64] * 6 + [c_int],
    "add_low_rank": [POINTER(LowRank)] + [c_void_p] * 2 + [c_int64] * 3 + [c_int],
    "multiply_gated": [POINTER(Matrix)]
    + [c_void_p] * 3
    + [c_int64, POINTER(Increments), POINTER(LowRank), c_void_p, c_int],
}


class KernelOperations:
    """The kernels that `run_layers` calls, one at a time."""

    def __init__(self, config: ModelConfig, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
        self._config, self._library = config, library

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, delta_TH: Tensor | None) -> Tensor:
        out_TH = torch.empty_like(x_TH)
        self._library.rms_norm(
            x_TH.data_ptr(),
            None if delta_TH is None else delta_TH.data_ptr(),
            weight_H.data_ptr(),
            out_TH.data_ptr(),
            *x_TH.shape,
            self._config.rms_norm_eps,
            torch.get_num_threads(),
        )
        return out_TH

    def silu_mul(self, gate_up_T2I: Tensor) -> Tensor:
        num_rows, width = len(gate_up_T2I), gate_up_T2I.shape[1] // 2
        out_TI = gate_up_T2I.new_empty(num_rows, width)
        self._library.silu_mul(
            gate_up_T2I.data_ptr(), out_TI.data_ptr(), num_rows, width, torch.get_num_threads()
        )
        return out_TI

    def rotate_and_store(
        self, qkv_TO: Tensor, cos_sin: Any, kv: KVStorage, layer: int, slot_T: Tensor
    ) -> Tensor:
        config = self._config
        self._library.rotate_and_store(
            qkv_TO.data_ptr(),
            cos_sin[0].data_ptr(),
            cos_sin[1].data_ptr(),
            slot_T.data_ptr(),
            kv.keys[layer].data_ptr(),
            kv.values[layer].data_ptr(),
            len(qkv_TO),
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            torch.get_num_threads(),
        )
        return qkv_TO.view(len(qkv_TO), -1, config.head_dim)[:, : config.num_heads]

    def attention(self, query_TND: Tensor, kv: KVStorage, layer: int, batch: Batch) -> Tensor:
        config = self._config
        out_TND = query_TND.new_empty(query_TND.shape)
        query = query_TND.data_ptr(), query_TND.stride(0)
        pages = kv.keys[layer].data_ptr(), kv.values[layer].data_ptr()
        heads = config.num_heads, config.num_kv_heads, config.head_dim, torch.get_num_threads()
        decode, prompts = batch.decode, batch.prompts
        if decode is not None:
            lengths = decode.length_S.data_ptr()
            rows = decode.page_SP.data_ptr(), lengths, out_TND.data_ptr(), *decode.page_SP.shape
            assert not self._library.decode_attention(*query, *pages, *rows, kv.page_size, *heads)
        if prompts is not None:
            spans = prompts.span_Q3.data_ptr()
            rows = prompts.page_QP.data_ptr(), spans, out_TND.data_ptr(), *prompts.page_QP.shape
            assert not self._library.prompt_attention(*query, *pages, *rows, kv.page_size, *heads)
        return out_TND


class Adding(Protocol):
    """A way to multiply with the base's matrices and add what adapters add."""

    num_bytes: int
    activates: bool

    def bind(self, rows: Sequence[AdapterRows]) -> Product | None: ...

    def check_integrity(self) -> None: ...


class StackedAdding(AdapterSlots):
    """Torch's way."""

    activates = False

    def bind(self, rows: Sequence[AdapterRows]) -> Product | None:  # type: ignore[override]
        binding = super().bind(rows)
        if binding is None:
            return None

        def product(layer: int, fused: int, weight_OI: Tensor, x_TI: Tensor) -> Tensor:
            y_TO = FrozenLinear(weight_OI)(x_TI)
            binding.add(layer, fused, x_TI, y_TO)
            return y_TO

        return product


class KernelAdding(AdapterTables):
    """The kernels' way: within the product of panels, as the engine has it, or after a product."""

    def __init__(self, config: ModelConfig, library: ctypes.CDLL, *, after: bool) -> None:
        super().__init__(config)
        self.activates = not after
        library.add_low_rank.argtypes = _SIGNATURES["add_low_rank"]
        self._library, self._after = library, after

    def bind(self, rows: Sequence[AdapterRows]) -> Product | None:
        segments = self.segments(rows)
        if segments is None:
            return None
        segment_T = np.full(rows[-1].end, -1)
        for number, record in enumerate(segments.records):
            segment_T[record["start"] : record["end"]] = number
        # NaN shows where something is read that was not written.
        inner_TR = torch.full((rows[-1].end, segments.inner_stride), torch.nan)

        def product(layer: int, fused: int, weight_OI: Tensor, x_TI: Tensor) -> Tensor:
            names = FUSED_PROJECTIONS[fused]
            outs = np.array([self._config.projection_shape(name)[0] for name in names])
            adds = LowRank(
                segments=segments.records.ctypes.data,
                segment_of=segment_T.ctypes.data,
                outs=outs.ctypes.data,
                num_segments=len(segments.records),
                num_projections=len(names),
                first=layer * len(PROJECTIONS) + PROJECTIONS.index(names[0]),
                inner_stride=segments.inner_stride,
                inner=inner_TR.data_ptr(),
            )
            if self.activates and fused == GATE_UP:
                return multiply_gated(self._library, weight_OI, x_TI, adds)
            linear = PanelLinear(self._library, Arena(), weight_OI)
            if not self._after:
                return linear(x_TI, adds)
            y_TO = linear(x_TI)
            sizes = len(x_TI), linear.in_features, linear.out_features
            self._library.add_low_rank(
                byref(adds), x_TI.data_ptr(), y_TO.data_ptr(), *sizes, torch.get_num_threads()
            )
            return y_TO

        return product
