"""Which bank vectors an adapter's layers use, and how evenly sub-vectors mix them.

Knows nothing of how that is drawn.

Shape legend: L layers, H bank vectors, N sub-vectors, K entries each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.compact import CompactVBLoRA
from adapters.rebuild import all_weights


@dataclass(frozen=True)
class BankUse:
    """What an adapter makes of its bank.

    layers          the decoder layers that it adapts, ascending: the rows of weight_LH
    weight_LH       float32: the weights with which a layer's sub-vectors use a bank vector, summed
    entropy_bits    by projection, of each sub-vector: 0 where one vector is all, at most log2 K
    """

    layers: tuple[int, ...]
    weight_LH: Tensor
    entropy_bits: Mapping[str, Tensor]
    topk: int

    @property
    def num_unused(self) -> int:
        """Bank vectors that no sub-vector uses."""
        return int((self.weight_LH.sum(0) == 0).sum())

    @property
    def mean_entropy_bits(self) -> float:
        """Over all sub-vectors."""
        return float(torch.cat(list(self.entropy_bits.values())).mean())

    @property
    def most_entropy_bits(self) -> float:
        """When all K weights are equal."""
        return math.log2(self.topk)


def bank_use(adapter: CompactVBLoRA) -> BankUse:
    """Count the bank's use over all sub-vectors."""
    weights_NK = all_weights(adapter.weights_NJ)
    entropy_N = -(weights_NK * weights_NK.clamp_min(1e-30).log2()).sum(1)
    length = adapter.bank.vectors_HB.shape[1]
    order = adapter.factor_order
    sizes = [spec.num_values(side) // length for spec, side in order]
    layers = tuple(sorted({spec.key.layer for spec, _ in order}))
    weight_LH = torch.zeros(len(layers), len(adapter.bank.vectors_HB))
    entropies: dict[str, list[Tensor]] = {}
    pieces = zip(
        order,
        adapter.indices_NK.long().split(sizes),
        weights_NK.split(sizes),
        entropy_N.split(sizes),
        strict=True,
    )
    for (spec, _), indices, weights, entropy in pieces:
        row_H = weight_LH[layers.index(spec.key.layer)]
        row_H.index_add_(0, indices.flatten(), weights.flatten())
        entropies.setdefault(spec.key.projection, []).append(entropy)
    bits = {name: torch.cat(parts).clamp_min(0) for name, parts in entropies.items()}
    return BankUse(layers, weight_LH, bits, weights_NK.shape[1])
