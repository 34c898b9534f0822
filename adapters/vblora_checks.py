"""The values of a VB-LoRA file: indices that a bank has, weights that are a softmax.

All factors are checked at once; only what is wrong is looked for factor by factor. Knows nothing of
files.

Shape legend: N sub-vectors of all factors, K entries per sub-vector, J = K - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.errors import MalformedAdapterError

_MAX_COMPARED = 8  # entries of a sub-vector that are compared in pairs, which is quadratic


class Factor(NamedTuple):
    """One factor's part of the sub-vectors: its name for messages, their number, their dtype."""

    name: str
    num_sub_vectors: int
    weights_dtype: torch.dtype


def check_indices(factors: Sequence[Factor], indices_NK: Tensor, num_vectors: int) -> None:
    """Raise MalformedAdapterError for an index that the bank lacks, or twice in a sub-vector."""
    wide_NK = indices_NK.to(torch.int64)
    if int(wide_NK.min()) < 0 or int(wide_NK.max()) >= num_vectors:
        name, row = _first_bad(factors, ((wide_NK < 0) | (wide_NK >= num_vectors)).any(-1))
        raise MalformedAdapterError(
            f"tensor {name}_topk_indices has the index {_outside(wide_NK[row], num_vectors)}, must "
            f"be in 0..{num_vectors - 1}"
        )
    twice_N = _named_twice(wide_NK)
    if twice_N.any():
        name, row = _first_bad(factors, twice_N)
        raise MalformedAdapterError(
            f"tensor {name}_topk_indices names a bank vector twice in one sub-vector: "
            f"{wide_NK[row].tolist()}"
        )


def _named_twice(indices_NK: Tensor) -> Tensor:
    """(N,) bool: rows with two equal entries. Comparing pairs of columns is faster than sorting."""
    if indices_NK.shape[1] > _MAX_COMPARED:
        ordered_NK = indices_NK.sort(-1).values
        return (ordered_NK[:, 1:] == ordered_NK[:, :-1]).any(-1)
    columns = indices_NK.T.contiguous()
    twice_N = torch.zeros(len(indices_NK), dtype=torch.bool)
    for one, other in combinations(columns, 2):
        twice_N |= one == other
    return twice_N


def _outside(indices_K: Tensor, num_vectors: int) -> int:
    return next(int(index) for index in indices_K if not 0 <= index < num_vectors)


def check_weights(factors: Sequence[Factor], weights_NJ: Tensor) -> None:
    """Raise MalformedAdapterError unless the weights are a softmax without its last.

    That is: finite, none negative, their sum at most 1.
    """
    wide_NJ = weights_NJ.float()
    # factors may differ in dtype: what rounding may add to a sum is that of the coarsest
    epsilon = max(torch.finfo(dtype).eps for dtype in {factor.weights_dtype for factor in factors})
    most = 1 + max(1e-5, epsilon)
    sum_N = wide_NJ.sum(-1)
    if not wide_NJ.numel() or (float(wide_NJ.min()) >= 0 and float(sum_N.max()) <= most):
        return  # NaN and infinities fail one of the two
    infinite_N = ~torch.isfinite(wide_NJ).all(-1)
    if infinite_N.any():
        name, _ = _first_bad(factors, infinite_N)
        raise MalformedAdapterError(f"tensor {name}_topk_weights has values that are not finite")
    name, row = _first_bad(factors, (wide_NJ < 0).any(-1) | (sum_N > most))
    raise MalformedAdapterError(
        f"tensor {name}_topk_weights is no softmax: it has the weights {wide_NJ[row].tolist()} "
        "and one that is 1 minus their sum"
    )


def _first_bad(factors: Sequence[Factor], bad_N: Tensor) -> tuple[str, int]:
    """The name of the factor with the first bad sub-vector, and that sub-vector's number."""
    row = int(bad_N.nonzero()[0, 0])
    ends = accumulate(factor.num_sub_vectors for factor in factors)
    return next(factor.name for factor, end in zip(factors, ends, strict=True) if row < end), row
