"""In which order the factors of an adapter lie in its one flat buffer.

Layer by layer; inside a layer the modules that read the same input stand together (q, k, v; o;
gate, up; down), first the a_RI of all of them, then their b_RO. A kernel can so read the factors of
a fused projection in one sweep. Knows nothing of banks, files or values.

Shape legend: R rank, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np

from core.factors import PROJECTIONS, ModuleKey
from core.flat_factors import PLACE, FlatLayout
from core.model_config import ModelConfig

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_GROUP_OF = {name: group for group, names in enumerate(_GROUPS) for name in names}

Side = Literal["a", "b"]


class ModuleSpec(NamedTuple):
    """One adapted module: which, the rank and scale of its increment, and its geometry."""

    key: ModuleKey
    rank: int
    scale: float
    in_features: int
    out_features: int

    def num_values(self, side: Side) -> int:
        """Number of values of a_RI ("a") or b_RO ("b")."""
        return self.rank * (self.in_features if side == "a" else self.out_features)


def module_spec(key: ModuleKey, rank: int, scale: float, model: ModelConfig) -> ModuleSpec:
    """The spec of `key` with the geometry of `model`."""
    out_features, in_features = model.projection_shape(key.projection)
    return ModuleSpec(key, rank, scale, in_features, out_features)


def in_layout_order(specs: Iterable[ModuleSpec]) -> tuple[ModuleSpec, ...]:
    """The specs sorted by layer, then in the order of the forward."""
    return tuple(sorted(specs, key=lambda spec: (spec.key.layer, PROJECTIONS.index(spec.key[1]))))


def factor_order(specs: Sequence[ModuleSpec]) -> Iterator[tuple[ModuleSpec, Side]]:
    """Every factor of `specs` (which are in layout order) once, in the order of the buffer."""
    start = 0
    while start < len(specs):
        end = start
        while end < len(specs) and _same_group(specs[start], specs[end]):
            end += 1
        yield from ((spec, "a") for spec in specs[start:end])
        yield from ((spec, "b") for spec in specs[start:end])
        start = end


@lru_cache(maxsize=64)
def flat_layout(specs: tuple[ModuleSpec, ...]) -> FlatLayout:
    """The places of all factors of `specs`, which are in layout order."""
    row_of = {spec.key: row for row, spec in enumerate(specs)}
    places = np.zeros(len(specs), dtype=PLACE)
    order = list(factor_order(specs))
    starts = accumulate((spec.num_values(side) for spec, side in order), initial=0)
    for (spec, side), start in zip(order, starts, strict=False):
        places[side][row_of[spec.key]] = start
    for name in ("rank", "in_features", "out_features", "scale"):
        places[name] = [getattr(spec, name) for spec in specs]
    return FlatLayout(row_of, places)


def _same_group(first: ModuleSpec, second: ModuleSpec) -> bool:
    same_layer = first.key.layer == second.key.layer
    return same_layer and _GROUP_OF[first.key.projection] == _GROUP_OF[second.key.projection]


def num_factor_values(specs: Iterable[ModuleSpec]) -> int:
    """Number of values in all factors of `specs` together."""
    return sum(spec.rank * (spec.in_features + spec.out_features) for spec in specs)
