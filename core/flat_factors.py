"""An adapter's factors in one flat buffer: pairs that are made when asked for, and their places.

Hundreds of small tensors take milliseconds of Python to make and to read addresses from, for every
adapter that comes; where all lie in one buffer, a kernel needs its address and a layout that all
adapters of the same modules share. Knows nothing of how a buffer was filled.

Shape legend: V values of all factors, M modules, R rank, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from core.factors import LowRankPair, ModuleKey

PLACE = np.dtype(
    [(name, "i8") for name in ("a", "b", "rank", "in_features", "out_features")] + [("scale", "f8")]
)


@dataclass(frozen=True, eq=False)
class FlatLayout:
    """Where the factors of some modules lie in a buffer; any number of buffers may share it.

    row_of    each module's row of `places`
    places    (M,) `PLACE`: the first value of a_RI, of b_RO, and what their shapes are
    """

    row_of: Mapping[ModuleKey, int]
    places: npt.NDArray[np.void]


class FlatPairs(Mapping[ModuleKey, LowRankPair]):
    """The pairs of `layout` as views of `buffer_V`."""

    def __init__(self, buffer_V: Tensor, layout: FlatLayout) -> None:
        self.buffer_V, self.layout = buffer_V, layout

    def __getitem__(self, key: ModuleKey) -> LowRankPair:
        a, b, rank, num_in, num_out, scale = self.layout.places[self.layout.row_of[key]].item()
        return LowRankPair(
            self.buffer_V[a : a + rank * num_in].view(rank, num_in),
            self.buffer_V[b : b + rank * num_out].view(rank, num_out),
            scale,
        )

    def __iter__(self) -> Iterator[ModuleKey]:
        return iter(self.layout.row_of)

    def __len__(self) -> int:
        return len(self.layout.row_of)
