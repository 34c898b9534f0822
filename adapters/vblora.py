"""PEFT VB-LoRA (peft 0.21, both save modes) → `CompactVBLoRA`.

Per module and side, a file holds either full logits or the top-k; the tensors decide, not the
config's save_only_topk_weights. From full logits, top-k and softmax are computed as PEFT's forward
does, in float32 (PEFT casts adapters to float32 when it loads them), by the same torch operations,
so that ties fall the same way.

Why K - 1 weights are stored for both modes. Softmax weights sum to 1, so the last follows to within
float32 rounding (about 1e-7 of it), far under the 1e-6 that is promised; a 16-bit rounding of them
would cost 4e-3, so weights from full logits are kept in float32 whatever the logits' dtype. Weights
of a top-k file keep the dtype of the file: they are exact there, and the last is 1 - their sum in
float32, which loses nothing.

Shape legend: R rank, I and O tiles of the input and output (features / B), H vectors in the bank of
length B, K entries per sub-vector, J = K - 1, N sub-vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.bank_pool import Bank
from adapters.compact import CompactVBLoRA, index_dtype
from adapters.errors import MalformedAdapterError
from adapters.layout import ModuleSpec, Side, factor_order, in_layout_order, module_spec
from adapters.peft_config import check_features, positive_int
from adapters.peft_files import PeftFiles
from adapters.peft_targets import claimed_modules, module_path
from adapters.peft_tensors import FLOATS, PeftTensors, check_finite, tensor_name
from core.model_config import BaseInfo

_SERVED_KEYS = frozenset({"r", "num_vectors", "vector_length", "topk"})
_BANK_NAME = "base_model.vblora_vector_bank"
_INDEX_DTYPES = frozenset({torch.uint8, torch.int16, torch.int32, torch.int64})
_MAX_COMPARED = 8  # entries of a sub-vector that are compared in pairs, which is quadratic


class _Geometry(NamedTuple):
    """The sizes that a VB-LoRA config fixes."""

    rank: int
    num_vectors: int
    vector_length: int
    topk: int


class _SubVectors(NamedTuple):
    """One factor's sub-vectors in the order of the compact form: (n, K) and (n, J)."""

    name: str
    indices_NK: Tensor
    weights_NJ: Tensor


def read_vblora(files: PeftFiles, base: BaseInfo) -> CompactVBLoRA:
    """Validate a VB-LoRA adapter against the base and return its compact form.

    Raises UnsupportedAdapterError or MalformedAdapterError; nothing is served in part.
    """
    check_features(files.config, _SERVED_KEYS)
    geometry = _read_geometry(files)
    specs = _read_modules(files, geometry, base)
    tensors = PeftTensors(files.tensors)
    tensors.refuse_others(_expected_names(specs), {module_path(spec.key) for spec in specs})
    bank_shape = (geometry.num_vectors, geometry.vector_length)
    bank_HB = tensors.take(_BANK_NAME, bank_shape, FLOATS)
    check_finite(_BANK_NAME, bank_HB)
    parts = [_read_factor(tensors, spec, side, geometry) for spec, side in factor_order(specs)]
    # torch.cat takes the dtype that holds every part exactly
    indices_NK = torch.cat([part.indices_NK for part in parts])
    weights_NJ = torch.cat([part.weights_NJ for part in parts])
    _check_indices(parts, indices_NK, geometry.num_vectors)
    _check_weights(parts, weights_NJ)
    indices_NK = indices_NK.to(index_dtype(geometry.num_vectors))
    return CompactVBLoRA(base.fingerprint, specs, Bank(bank_HB), indices_NK, weights_NJ)


def _read_geometry(files: PeftFiles) -> _Geometry:
    geometry = _Geometry(
        rank=positive_int(files.config, "r"),
        num_vectors=positive_int(files.config, "num_vectors"),
        vector_length=positive_int(files.config, "vector_length"),
        topk=positive_int(files.config, "topk"),
    )
    if geometry.topk > geometry.num_vectors:
        raise MalformedAdapterError(
            f"topk={geometry.topk} is more than num_vectors={geometry.num_vectors}"
        )
    return geometry


def _read_modules(files: PeftFiles, geometry: _Geometry, base: BaseInfo) -> tuple[ModuleSpec, ...]:
    keys = claimed_modules(files.config, base.config.num_layers)
    specs = in_layout_order(module_spec(key, geometry.rank, 1.0, base.config) for key in keys)
    for spec in specs:
        for what, features in (("in", spec.in_features), ("out", spec.out_features)):
            if features % geometry.vector_length:
                raise MalformedAdapterError(
                    f"{module_path(spec.key)}: {what}_features {features} of the base is not "
                    f"divisible by vector_length {geometry.vector_length}"
                )
    return specs


def _expected_names(specs: Sequence[ModuleSpec]) -> set[str]:
    names = [_logits_name(spec, side) for spec in specs for side in ("a", "b")]
    suffixes = ("", "_topk_indices", "_topk_weights")
    return {_BANK_NAME}.union(name + suffix for name in names for suffix in suffixes)


def _logits_name(spec: ModuleSpec, side: str) -> str:
    return tensor_name(module_path(spec.key), f"vblora_logits_{side.upper()}")


def _read_factor(
    tensors: PeftTensors, spec: ModuleSpec, side: Side, geometry: _Geometry
) -> _SubVectors:
    name = _logits_name(spec, side)
    rank, length = spec.rank, geometry.vector_length
    a_shape, b_shape = (rank, spec.in_features // length), (spec.out_features // length, rank)
    shape = a_shape if side == "a" else b_shape
    has_topk = f"{name}_topk_indices" in tensors or f"{name}_topk_weights" in tensors
    if name in tensors and has_topk:
        raise MalformedAdapterError(f"{name} is there twice: as full logits and as top-k")
    read = _read_topk if has_topk else _read_logits
    indices, weights = read(tensors, name, shape, geometry)
    # PEFT keeps B's sub-vectors as (O, R); rank-major is what b_RO needs to be contiguous
    if side == "b":
        indices, weights = indices.transpose(0, 1), weights.transpose(0, 1)
    return _SubVectors(name, indices.flatten(0, 1), weights.flatten(0, 1))


def _read_logits(
    tensors: PeftTensors, name: str, shape: tuple[int, int], geometry: _Geometry
) -> tuple[Tensor, Tensor]:
    """Source: `_get_low_rank_matrix`: topk, then softmax over the top-k logits alone."""
    logits = tensors.take(name, (*shape, geometry.num_vectors), FLOATS).float()
    top_logits, indices = logits.topk(geometry.topk, dim=-1)
    # -inf is how PEFT itself writes "not among the top k"; it must not be all there is
    if logits.isnan().any() or not torch.isfinite(top_logits[..., 0]).all():
        raise MalformedAdapterError(f"tensor {name} has values that are not finite")
    return indices, torch.softmax(top_logits, dim=-1)[..., :-1]


def _read_topk(
    tensors: PeftTensors, name: str, shape: tuple[int, int], geometry: _Geometry
) -> tuple[Tensor, Tensor]:
    """Source: `_remap_adapter_state_dict_for_load`. Values are checked for all factors at once."""
    indices = tensors.take(f"{name}_topk_indices", (*shape, geometry.topk), _INDEX_DTYPES)
    weights = tensors.take(f"{name}_topk_weights", (*shape, geometry.topk - 1), FLOATS)
    return indices, weights


def _check_indices(parts: Sequence[_SubVectors], indices_NK: Tensor, num_vectors: int) -> None:
    wide_NK = indices_NK.to(torch.int64)
    if int(wide_NK.min()) < 0 or int(wide_NK.max()) >= num_vectors:
        name, row = _first_bad(parts, ((wide_NK < 0) | (wide_NK >= num_vectors)).any(-1))
        raise MalformedAdapterError(
            f"tensor {name}_topk_indices has the index {_outside(wide_NK[row], num_vectors)}, must "
            f"be in 0..{num_vectors - 1}"
        )
    twice_N = _named_twice(wide_NK)
    if twice_N.any():
        name, row = _first_bad(parts, twice_N)
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


def _check_weights(parts: Sequence[_SubVectors], weights_NJ: Tensor) -> None:
    """The stored weights are a softmax without its last: finite, none negative, sum at most 1."""
    wide_NJ = weights_NJ.float()
    # parts may differ in dtype: what rounding may add to a sum is that of the coarsest
    epsilon = max(torch.finfo(dtype).eps for dtype in {part.weights_NJ.dtype for part in parts})
    most = 1 + max(1e-5, epsilon)
    sum_N = wide_NJ.sum(-1)
    if not wide_NJ.numel() or (float(wide_NJ.min()) >= 0 and float(sum_N.max()) <= most):
        return  # NaN and infinities fail one of the two
    infinite_N = ~torch.isfinite(wide_NJ).all(-1)
    if infinite_N.any():
        name, _ = _first_bad(parts, infinite_N)
        raise MalformedAdapterError(f"tensor {name}_topk_weights has values that are not finite")
    name, row = _first_bad(parts, (wide_NJ < 0).any(-1) | (sum_N > most))
    raise MalformedAdapterError(
        f"tensor {name}_topk_weights is no softmax: it has the weights {wide_NJ[row].tolist()} "
        "and one that is 1 minus their sum"
    )


def _first_bad(parts: Sequence[_SubVectors], bad_N: Tensor) -> tuple[str, int]:
    """The name of the factor with the first bad sub-vector, and that sub-vector's number."""
    row = int(bad_N.nonzero()[0, 0])
    ends = accumulate(len(part.indices_NK) for part in parts)
    return next(part.name for part, end in zip(parts, ends, strict=True) if row < end), row
