"""Where the kernels find the factors of a step's adapters: addresses, no copies.

Each row reads its own adapter's factors where the lease holds them, so adapters need no stacks.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.batch import AdapterRows
from core.factors import PROJECTIONS, AdapterFactors, LowRankPair
from core.flat_factors import FlatPairs
from core.kernels.structs import PAIR, SEGMENT
from core.model_config import ModelConfig
from core.weights import FUSED_PROJECTIONS

_MAX_TABLES = 1024


@dataclass(frozen=True)
class _Table:
    """An adapter's `PAIR` records by layer, then in `PROJECTIONS`' order.

    Valid while `factors` lives, which the lease sees to. `inner_width` is the most columns that
    the projections of one fused matrix have together.
    """

    factors: weakref.ref[AdapterFactors]
    pairs: npt.NDArray[np.void]
    inner_width: int


@dataclass(frozen=True)
class Segments:
    """A step's rows by adapter, `SEGMENT` records; `tables` keeps alive what they point to."""

    records: npt.NDArray[np.void]
    inner_stride: int
    tables: tuple[_Table, ...]


class AdapterTables:
    """The tables of the adapters that were used last. The engine's thread alone calls it."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: OrderedDict[str, _Table] = OrderedDict()

    def segments(self, adapter_rows: Sequence[AdapterRows]) -> Segments | None:
        """Lay the rows of adapters out; None when all rows are the base's."""
        leased = [
            (rows, self._table_of(rows.lease.factors))
            for rows in adapter_rows
            if rows.lease is not None
        ]
        if not leased:
            return None
        records = np.array(
            [(rows.start, rows.end, table.pairs.ctypes.data) for rows, table in leased],
            dtype=SEGMENT,
        )
        tables = tuple(table for _, table in leased)
        return Segments(records, max(table.inner_width for table in tables), tables)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.pairs.nbytes for table in self._tables.values())

    def check_integrity(self) -> None:
        """Assert that the tables are bounded."""
        assert len(self._tables) <= _MAX_TABLES

    def _table_of(self, factors: AdapterFactors) -> _Table:
        table = self._tables.get(factors.digest)
        if table is None or table.factors() is not factors:
            pairs = _pairs(factors, self._config)
            table = _Table(weakref.ref(factors), pairs, inner_width(pairs))
            self._tables[factors.digest] = table
        self._tables.move_to_end(factors.digest)
        while len(self._tables) > _MAX_TABLES:
            self._tables.popitem(last=False)
        return table


def _pairs(factors: AdapterFactors, config: ModelConfig) -> npt.NDArray[np.void]:
    if isinstance(factors.pairs, FlatPairs) and not factors.gains:
        return _flat_records(factors.pairs, config)
    by_layer: list[dict[str, LowRankPair]] = [{} for _ in range(config.num_layers)]
    for key, pair in factors.pairs.items():
        by_layer[key.layer][key.projection] = pair
    gains: list[dict[str, Tensor]] = [{} for _ in range(config.num_layers)]
    for key, gain_O in factors.gains.items():
        gains[key.layer][key.projection] = gain_O
    return np.concatenate([pair_records(*layer) for layer in zip(by_layer, gains, strict=True)])


def _flat_records(pairs: FlatPairs, config: ModelConfig) -> npt.NDArray[np.void]:
    """As `pair_records` gives them for each layer, without a tensor for each factor."""
    buffer_V, places = pairs.buffer_V, pairs.layout.places
    if buffer_V.dtype != torch.float32 or not buffer_V.is_contiguous():
        raise TypeError("factors are not contiguous fp32, see AdapterFactors")
    table = np.zeros(config.num_layers * len(PROJECTIONS), dtype=PAIR)
    rows = [key.layer * len(PROJECTIONS) + PROJECTIONS.index(key.projection) for key in pairs]
    for side in ("a", "b"):
        table[side][rows] = buffer_V.data_ptr() + places[side] * buffer_V.element_size()
    table["rank"][rows], table["scale"][rows] = places["rank"], places["scale"]
    return table


def pair_records(
    pairs: Mapping[str, LowRankPair], gains: Mapping[str, Tensor] = MappingProxyType({})
) -> npt.NDArray[np.void]:
    """One layer's `PAIR` records in `PROJECTIONS`' order, of rank 0 where there is no pair.

    They hold addresses: valid while the tensors live.
    """
    table = np.zeros(len(PROJECTIONS), dtype=PAIR)
    for name, pair in pairs.items():
        gain_O = gains.get(name)
        for tensor in (pair.a_RI, pair.b_RO, gain_O):
            if tensor is None:
                continue
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise TypeError(f"factors of {name} are not contiguous fp32, see AdapterFactors")
        addresses = pair.a_RI.data_ptr(), pair.b_RO.data_ptr()
        gain = 0 if gain_O is None else gain_O.data_ptr()
        table[PROJECTIONS.index(name)] = (*addresses, len(pair.a_RI), pair.scale, gain)
    return table


def inner_width(pairs: npt.NDArray[np.void]) -> int:
    """The most ranks that the projections of one fused matrix have together, over whole layers."""
    ranks = pairs["rank"].reshape(-1, len(PROJECTIONS))
    firsts = np.cumsum([0, *(len(names) for names in FUSED_PROJECTIONS[:-1])])
    return int(np.add.reduceat(ranks, firsts, axis=1).max(initial=0))
