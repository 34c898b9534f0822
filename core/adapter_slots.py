"""Factors of the active adapters, stacked where the batch reads them.

Each adapter in a batch occupies a range of columns (its rank) in every stack, so that all rows
take two dense multiplications whatever their adapters: x @ A_all.T, times a mask that keeps each
row's own columns, @ B_all. Where that wastes too much (many columns or many rows), rows of one
adapter are multiplied with its own columns only. Stacks change only when an adapter comes in that
is not there yet. Gains are read where the leases hold them. Knows nothing of where factors come
from.

Shape legend: T rows of the step, C columns, I input features, O output features, J projections
that share one input.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from core.batch import AdapterRows
from core.factors import AdapterFactors, ModuleKey
from core.model_config import ModelConfig
from core.weights import FUSED_PROJECTIONS


@dataclass(frozen=True)
class _Stack:
    """All columns of one fused matrix of one layer; columns of no adapter are never read."""

    a_CJI: Tensor
    b_JCO: tuple[Tensor, ...]


@dataclass(frozen=True)
class _GainRows:
    """What the base gives rows start..end-1 is multiplied with `gains`."""

    start: int
    end: int
    gains: Mapping[ModuleKey, Tensor]


@dataclass(frozen=True)
class ColumnRows:
    """Rows start..end-1 use columns first..last-1 (none for the base)."""

    start: int
    end: int
    first: int
    last: int


class StackBinding:
    """What one step adds to the base's outputs; made by `AdapterSlots.bind`."""

    def __init__(
        self,
        stacks: Seq[Seq[_Stack]],
        rows: tuple[ColumnRows, ...],
        others_TC1: Tensor | None,
        gain_rows: tuple[_GainRows, ...],
    ):
        self._stacks, self._rows, self._others_TC1 = stacks, rows, others_TC1
        self._gain_rows = gain_rows

    def add(self, layer: int, fused: int, x_TI: Tensor, y_TO: Tensor) -> None:
        """Let `y_TO`, in place, have gains and increments of `FUSED_PROJECTIONS[fused]`."""
        stack = self._stacks[layer][fused]
        for gain_rows in self._gain_rows:
            _multiply_gains(gain_rows, layer, FUSED_PROJECTIONS[fused], stack, y_TO)
        if self._others_TC1 is not None:
            _add_masked(stack, x_TI, y_TO, self._others_TC1)
            return
        for rows in self._rows:
            _add_rows(stack, x_TI[rows.start : rows.end], y_TO[rows.start : rows.end], rows)


class AdapterSlots:
    """Owner of the stacks. Not thread-safe: the engine's thread alone calls it."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._config, self._device, self._dtype = config, device, dtype
        self._num_columns = 0
        self._range_of: OrderedDict[str, tuple[int, int]] = (
            OrderedDict()
        )  # least recently used first
        self._stacks: list[list[_Stack]] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all stacks."""
        return sum(
            stack.a_CJI.nbytes + sum(b.nbytes for b in stack.b_JCO)
            for layer in self._stacks
            for stack in layer
        )

    def bind(self, adapter_rows: Seq[AdapterRows]) -> StackBinding | None:
        """Bring the adapters of these rows into the stacks; None when all rows are the base's."""
        active = {
            rows.lease.factors.digest: rows.lease.factors
            for rows in adapter_rows
            if rows.lease is not None
        }
        if not active:
            return None
        self._place(active)
        bound = (self._columns_of(entry) for entry in adapter_rows if entry.lease is not None)
        rows = tuple(entry for entry in bound if entry.first < entry.last)
        if not rows:  # adapters without pairs
            return None
        others = None
        if _prefer_mask(rows, self._last_column(active)):
            others = self._others(rows, adapter_rows[-1].end, self._last_column(active))
        gain_rows = tuple(
            _GainRows(entry.start, entry.end, entry.lease.factors.gains)
            for entry in adapter_rows
            if entry.lease is not None and entry.lease.factors.gains
        )
        return StackBinding(self._stacks, rows, others, gain_rows)

    def check_integrity(self) -> None:
        """Assert that ranges of columns are disjoint and inside the stacks."""
        ranges = sorted(self._range_of.values())
        assert all(a[1] <= b[0] for a, b in pairwise(ranges)), "ranges overlap"
        assert not ranges or ranges[-1][1] <= self._num_columns, "a range is outside the stacks"

    def _columns_of(self, rows: AdapterRows) -> ColumnRows:
        assert rows.lease is not None
        return ColumnRows(rows.start, rows.end, *self._range_of[rows.lease.factors.digest])

    def _last_column(self, active: dict[str, AdapterFactors]) -> int:
        return max(self._range_of[digest][1] for digest in active)

    def _others(self, rows: tuple[ColumnRows, ...], num_rows: int, num_columns: int) -> Tensor:
        """Bool: True where a column is not the row's own."""
        others_TC = torch.ones(num_rows, num_columns, device=self._device, dtype=torch.bool)
        for entry in rows:
            others_TC[entry.start : entry.end, entry.first : entry.last] = False
        return others_TC[..., None]

    # -- placing -------------------------------------------------------------------------------

    def _place(self, active: dict[str, AdapterFactors]) -> None:
        for digest in active:
            if digest in self._range_of:
                self._range_of.move_to_end(digest)
        missing = [factors for digest, factors in active.items() if digest not in self._range_of]
        for factors in missing:
            place = self._find_room(factors.max_rank, active)
            if place is None:
                self._rebuild(active)
                return
            self._fill(factors, *place)

    def _find_room(self, rank: int, active: dict[str, AdapterFactors]) -> tuple[int, int] | None:
        """A free range of columns, after dropping idle adapters if need be; None if too small."""
        while (place := self._first_gap(rank)) is None:
            idle = next((digest for digest in self._range_of if digest not in active), None)
            if idle is None:
                return None
            del self._range_of[idle]
        return place

    def _first_gap(self, rank: int) -> tuple[int, int] | None:
        start = 0
        for first, last in sorted(self._range_of.values()):
            if first - start >= rank:
                break
            start = last
        return (start, start + rank) if start + rank <= self._num_columns else None

    def _rebuild(self, active: dict[str, AdapterFactors]) -> None:
        """New stacks for the active adapters alone, with a quarter of spare columns."""
        self._range_of.clear()
        needed = sum(factors.max_rank for factors in active.values())
        if needed > self._num_columns or needed * 4 < self._num_columns:
            self._num_columns = needed + needed // 4
            self._stacks = []  # freed before the new ones are made
            self._stacks = [
                [self._empty_stack(names) for names in FUSED_PROJECTIONS]
                for _ in range(self._config.num_layers)
            ]
        for factors in active.values():
            place = self._first_gap(factors.max_rank)
            assert place is not None
            self._fill(factors, *place)

    def _empty_stack(self, names: tuple[str, ...]) -> _Stack:
        num_in = self._config.projection_shape(names[0])[1]
        outs = [self._config.projection_shape(name)[0] for name in names]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=self._device, dtype=self._dtype)

        return _Stack(
            zeros(self._num_columns, len(names), num_in),
            tuple(zeros(self._num_columns, out) for out in outs),
        )

    def _fill(self, factors: AdapterFactors, first: int, last: int) -> None:
        """Copy an adapter into its columns; what it leaves alone becomes zero there."""
        for layer, stacks in enumerate(self._stacks):
            for stack, names in zip(stacks, FUSED_PROJECTIONS, strict=True):
                for index, name in enumerate(names):
                    a_CI, b_CO = stack.a_CJI[first:last, index], stack.b_JCO[index][first:last]
                    pair = factors.pairs.get(ModuleKey(layer, name))
                    rank = 0 if pair is None else pair.a_RI.shape[0]
                    if pair is not None:
                        a_CI[:rank] = pair.a_RI
                        torch.mul(pair.b_RO, pair.scale, out=b_CO[:rank])
                    if rank < last - first:
                        a_CI[rank:].zero_()
                        b_CO[rank:].zero_()
        self._range_of[factors.digest] = (first, last)


def _prefer_mask(rows: tuple[ColumnRows, ...], num_columns: int) -> bool:
    """Whether the masked product over all columns beats one product per adapter.

    Counted in columns times rows that are multiplied; a call of its own per adapter costs about
    as much as 256 of them (2 AVX2 cores, hidden size 576).
    """
    if len(rows) == 1:
        return False
    wasted = num_columns * rows[-1].end
    own = sum((entry.last - entry.first) * (entry.end - entry.start) for entry in rows)
    return wasted <= own + 256 * len(rows)


def _multiply_gains(
    rows: _GainRows, layer: int, names: tuple[str, ...], stack: _Stack, y_TO: Tensor
) -> None:
    start = 0
    for name, b_CO in zip(names, stack.b_JCO, strict=True):
        end = start + b_CO.shape[1]
        gain_O = rows.gains.get(ModuleKey(layer, name))
        if gain_O is not None:
            y_TO[rows.start : rows.end, start:end] *= gain_O
        start = end


def _add_masked(stack: _Stack, x_TI: Tensor, y_TO: Tensor, others_TC1: Tensor) -> None:
    num_columns = others_TC1.shape[1]
    a_CJI = stack.a_CJI[:num_columns]
    h_TCJ = (x_TI @ a_CJI.flatten(0, 1).T).unflatten(1, (num_columns, -1))
    h_TCJ.masked_fill_(others_TC1, 0)  # times 0, another adapter's inf would come through as NaN
    start = 0
    for index, b_CO in enumerate(stack.b_JCO):
        end = start + b_CO.shape[1]
        y_TO[:, start:end].addmm_(h_TCJ[:, :, index], b_CO[:num_columns])
        start = end


def _add_rows(stack: _Stack, x_TI: Tensor, y_TO: Tensor, rows: ColumnRows) -> None:
    a_CJI = stack.a_CJI[rows.first : rows.last]
    h_TCJ = (x_TI @ a_CJI.flatten(0, 1).T).unflatten(1, (rows.last - rows.first, -1))
    start = 0
    for index, b_CO in enumerate(stack.b_JCO):
        end = start + b_CO.shape[1]
        y_TO[:, start:end].addmm_(h_TCJ[:, :, index], b_CO[rows.first : rows.last])
        start = end
