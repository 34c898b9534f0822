"""Factors in one buffer: the views, and the addresses that kernels get without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from memory_factors import MemoryFactorSource, MemoryLease

from core.batch import AdapterRows
from core.factors import AdapterFactors, ModuleKey
from core.flat_factors import PLACE, FlatLayout, FlatPairs
from core.kernels.adapter_tables import AdapterTables
from core.model_config import ModelConfig

MODULES = [  # layer, projection, rank, scale
    (0, "q_proj", 4, 1.0),
    (0, "down_proj", 2, 0.5),
    (1, "k_proj", 8, 2.0),
    (1, "gate_proj", 1, 1.0),
]


def flat_pairs(config: ModelConfig, dtype: torch.dtype = torch.float32) -> FlatPairs:
    """All b before all a, so that places are no running sum of anything in a row."""
    places = np.zeros(len(MODULES), dtype=PLACE)
    start = 0
    for side in ("b", "a"):
        for row, (_, name, rank, scale) in enumerate(MODULES):
            num_out, num_in = config.projection_shape(name)
            for field, value in zip(PLACE.names[2:], (rank, num_in, num_out, scale), strict=True):
                places[field][row] = value
            places[side][row] = start
            start += rank * (num_in if side == "a" else num_out)
    row_of = {ModuleKey(layer, name): row for row, (layer, name, _, _) in enumerate(MODULES)}
    return FlatPairs(torch.arange(start).to(dtype), FlatLayout(row_of, places))


def addresses_of(factors: AdapterFactors, config: ModelConfig) -> np.ndarray:
    rows = AdapterRows(MemoryLease(MemoryFactorSource(), factors), 0, 1)
    return AdapterTables(config).segments([rows]).tables[0].pairs


def test_pairs_are_views_of_their_places(tiny_config: ModelConfig):
    pairs = flat_pairs(tiny_config)
    assert list(pairs) == [ModuleKey(layer, name) for layer, name, _, _ in MODULES]
    start = 0
    for side in ("b_RO", "a_RI"):
        for layer, name, rank, scale in MODULES:
            pair = pairs[ModuleKey(layer, name)]
            num_features = tiny_config.projection_shape(name)[side == "a_RI"]
            end = start + rank * num_features
            wanted = torch.arange(start, end).float().view(rank, num_features)
            assert torch.equal(getattr(pair, side), wanted)
            assert pair.scale == scale
            start = end
    assert start == len(pairs.buffer_V)
    assert ModuleKey(0, "k_proj") not in pairs


def test_addresses_are_those_of_the_views(tiny_config: ModelConfig):
    pairs = flat_pairs(tiny_config)
    flat = addresses_of(AdapterFactors("flat", pairs, 0), tiny_config)
    one_by_one = addresses_of(AdapterFactors("dict", dict(pairs), 0), tiny_config)
    assert (flat["rank"] > 0).sum() == len(MODULES)
    assert np.array_equal(flat, one_by_one)


def test_a_buffer_of_another_dtype_is_refused(tiny_config: ModelConfig):
    with pytest.raises(TypeError, match="fp32"):
        addresses_of(AdapterFactors("half", flat_pairs(tiny_config, torch.float16), 0), tiny_config)
