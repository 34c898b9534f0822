"""`core.ops.Ops` on compiled kernels: fp32 on the CPU. `core.ops.TorchOps` is its slow twin.

Adapters need no stacks here: each row reads its own adapter's factors where the lease holds them.

Shape legend as in `core.ops`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict
from collections.abc import Sequence as Seq
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.batch import AdapterRows, Batch
from core.factors import PROJECTIONS, AdapterFactors
from core.kv_storage import KVStorage
from core.model_config import ModelConfig
from core.ops import AdapterBinding
from core.weights import FUSED_PROJECTIONS

_PAIR = np.dtype([("a", "i8"), ("b", "i8"), ("rank", "i8"), ("scale", "f8")])
_ROWS = np.dtype([("start", "i8"), ("end", "i8"), ("pairs", "i8")])
_MAX_TABLES = 1024

_SIGNATURES: dict[str, list[Any]] = {
    "rms_norm": [c_void_p] * 4 + [c_int64] * 2 + [c_float, c_int],
    "silu_mul": [c_void_p] * 2 + [c_int64] * 2 + [c_int],
    "rotate_and_store": [c_void_p] * 6 + [c_int64] * 4 + [c_int],
    "decode_attention": [c_void_p, c_int64] + [c_void_p] * 5 + [c_int64] * 6 + [c_int],
    "prompt_attention": [c_void_p, c_int64] + [c_void_p] * 5 + [c_int64] * 6 + [c_int],
    "add_low_rank": [c_void_p, c_int64, c_void_p, c_int64, c_void_p]
    + [c_int64] * 3
    + [c_void_p, c_int64, c_int],
}


class CpuOps:
    """The operations on `library`, see `build.load_library`. Tensors are contiguous fp32."""

    def __init__(self, config: ModelConfig, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
        self._config, self._library = config, library
        self._sites = tuple(_site(config, names) for names in FUSED_PROJECTIONS)
        self._tables: OrderedDict[str, _Table] = OrderedDict()

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, delta_TH: Tensor | None = None) -> Tensor:
        """See `Ops.rms_norm`."""
        out_TH = torch.empty_like(x_TH)
        delta = None if delta_TH is None else delta_TH.data_ptr()
        self._library.rms_norm(
            x_TH.data_ptr(),
            delta,
            weight_H.data_ptr(),
            out_TH.data_ptr(),
            *x_TH.shape,
            self._config.rms_norm_eps,
            torch.get_num_threads(),
        )
        return out_TH

    def silu_mul(self, gate_up_T2I: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        num_rows, width = gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2
        out_TI = gate_up_T2I.new_empty(num_rows, width)
        self._library.silu_mul(
            gate_up_T2I.data_ptr(), out_TI.data_ptr(), num_rows, width, torch.get_num_threads()
        )
        return out_TI

    def rotate_and_store(
        self,
        qkv_TO: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        kv: KVStorage,
        layer: int,
        slot_T: Tensor,
    ) -> Tensor:
        """See `Ops.rotate_and_store`; the queries are a view of `qkv_TO`, rotated in place."""
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
        """See `Ops.attention`; reads the pages where they are."""
        config = self._config
        out_TND = query_TND.new_empty(query_TND.shape)
        query = query_TND.data_ptr(), query_TND.stride(0)
        pages = kv.keys[layer].data_ptr(), kv.values[layer].data_ptr()
        heads = config.num_heads, config.num_kv_heads, config.head_dim, torch.get_num_threads()
        decode, prompts, failed = batch.decode, batch.prompts, 0
        if decode is not None:
            failed |= self._library.decode_attention(
                *query,
                *pages,
                decode.page_SP.data_ptr(),
                decode.length_S.data_ptr(),
                out_TND.data_ptr(),
                *decode.page_SP.shape,
                kv.page_size,
                *heads,
            )
        if prompts is not None:
            failed |= self._library.prompt_attention(
                *query,
                *pages,
                prompts.page_QP.data_ptr(),
                prompts.span_Q3.data_ptr(),
                out_TND.data_ptr(),
                *prompts.page_QP.shape,
                kv.page_size,
                *heads,
            )
        if failed:
            raise MemoryError("no memory for attention scores")
        return out_TND

    def bind(self, adapter_rows: Seq[AdapterRows]) -> AdapterBinding | None:
        """See `Ops.bind`."""
        leased = [
            (rows, self._table_of(rows.lease.factors))
            for rows in adapter_rows
            if rows.lease is not None
        ]
        if not leased:
            return None
        segments = np.array(
            [(rows.start, rows.end, table.pairs.ctypes.data) for rows, table in leased], dtype=_ROWS
        )
        return PointerBinding(self._library, self._sites, segments, [table for _, table in leased])

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the tables of addresses."""
        return sum(table.pairs.nbytes for table in self._tables.values())

    def check_integrity(self) -> None:
        """Assert that the tables are bounded."""
        assert len(self._tables) <= _MAX_TABLES

    def _table_of(self, factors: AdapterFactors) -> _Table:
        table = self._tables.get(factors.digest)
        if table is None or table.factors() is not factors:
            table = _Table(weakref.ref(factors), _pairs(factors, self._config))
            self._tables[factors.digest] = table
        self._tables.move_to_end(factors.digest)
        while len(self._tables) > _MAX_TABLES:
            self._tables.popitem(last=False)
        return table


@dataclass(frozen=True)
class _Table:
    """Where an adapter's factors are: `_PAIR` records by layer, then in `PROJECTIONS`' order.

    Valid while `factors` lives, which the lease sees to.
    """

    factors: weakref.ref[AdapterFactors]
    pairs: npt.NDArray[np.void]


@dataclass(frozen=True)
class _Site:
    """One fused matrix: its first projection's place in `PROJECTIONS`, its features."""

    first: int
    num_in: int
    outs: npt.NDArray[np.int64]

    @cached_property
    def outs_address(self) -> int:
        """Where C finds `outs`."""
        return self.outs.ctypes.data


class PointerBinding:
    """What a step's adapters add, read from the factors themselves."""

    def __init__(
        self,
        library: ctypes.CDLL,
        sites: tuple[_Site, ...],
        segments: npt.NDArray[np.void],
        tables: list[_Table],
    ) -> None:
        self._library, self._sites = library, sites
        self._kept = segments, tables  # C holds their addresses
        self._segments, self._num_segments = segments.ctypes.data, len(segments)

    def add(self, layer: int, fused: int, x_TI: Tensor, y_TO: Tensor) -> None:
        """See `AdapterBinding.add`."""
        site = self._sites[fused]
        x_TI = x_TI.contiguous()
        self._library.add_low_rank(
            x_TI.data_ptr(),
            x_TI.shape[1],
            y_TO.data_ptr(),
            y_TO.shape[1],
            self._segments,
            self._num_segments,
            layer * len(PROJECTIONS) + site.first,
            len(site.outs),
            site.outs_address,
            site.num_in,
            torch.get_num_threads(),
        )


def _site(config: ModelConfig, names: tuple[str, ...]) -> _Site:
    shapes = [config.projection_shape(name) for name in names]
    return _Site(PROJECTIONS.index(names[0]), shapes[0][1], np.array([out for out, _ in shapes]))


def _pairs(factors: AdapterFactors, config: ModelConfig) -> npt.NDArray[np.void]:
    table = np.zeros(config.num_layers * len(PROJECTIONS), dtype=_PAIR)
    for key, pair in factors.pairs.items():
        for tensor in (pair.a_RI, pair.b_RO):
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise TypeError(f"factors of {key} are not contiguous fp32, see AdapterFactors")
        place = key.layer * len(PROJECTIONS) + PROJECTIONS.index(key.projection)
        table[place] = (pair.a_RI.data_ptr(), pair.b_RO.data_ptr(), len(pair.a_RI), pair.scale)
    return table
