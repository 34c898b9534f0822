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

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.bank_pool import Bank
from adapters.compact import CompactVBLoRA, index_dtype
from adapters.errors import MalformedAdapterError
from adapters.layout import ModuleSpec, Side, factor_order, in_layout_order, module_spec
from adapters.peft_config import check_features, positive_int
from adapters.peft_targets import claimed_modules
from adapters.peft_tensors import FLOATS, PeftTensors, check_finite, tensor_name
from adapters.vblora_checks import Factor, check_indices, check_weights
from core.model_config import BaseInfo

SERVED_KEYS = frozenset({"r", "num_vectors", "vector_length", "topk"})
BANK_NAME = "base_model.vblora_vector_bank"
_INDEX_DTYPES = frozenset({torch.uint8, torch.int16, torch.int32, torch.int64})


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

    @property
    def factor(self) -> Factor:
        return Factor(self.name, len(self.indices_NK), self.weights_NJ.dtype)


def read_vblora(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseInfo
) -> CompactVBLoRA:
    """Validate a VB-LoRA adapter against the base and return its compact form.

    Raises UnsupportedAdapterError or MalformedAdapterError; nothing is served in part.
    """
    check_features(config, SERVED_KEYS)
    geometry = _read_geometry(config)
    specs = _read_modules(config, geometry, base)
    own = PeftTensors(tensors)
    own.refuse_others(_expected_names(specs), {spec.key.path for spec in specs})
    bank_HB = own.take(BANK_NAME, (geometry.num_vectors, geometry.vector_length), FLOATS)
    check_finite(BANK_NAME, bank_HB)
    parts = [_read_factor(own, spec, side, geometry) for spec, side in factor_order(specs)]
    # torch.cat takes the dtype that holds every part exactly
    indices_NK = torch.cat([part.indices_NK for part in parts])
    weights_NJ = torch.cat([part.weights_NJ for part in parts])
    factors = [part.factor for part in parts]
    check_indices(factors, indices_NK, geometry.num_vectors)
    check_weights(factors, weights_NJ)
    indices_NK = indices_NK.to(index_dtype(geometry.num_vectors))
    return CompactVBLoRA(base.fingerprint, specs, Bank(bank_HB), indices_NK, weights_NJ)


def _read_geometry(config: Mapping[str, Any]) -> _Geometry:
    geometry = _Geometry(
        rank=positive_int(config, "r"),
        num_vectors=positive_int(config, "num_vectors"),
        vector_length=positive_int(config, "vector_length"),
        topk=positive_int(config, "topk"),
    )
    if geometry.topk > geometry.num_vectors:
        raise MalformedAdapterError(
            f"topk={geometry.topk} is more than num_vectors={geometry.num_vectors}"
        )
    return geometry


def _read_modules(
    config: Mapping[str, Any], geometry: _Geometry, base: BaseInfo
) -> tuple[ModuleSpec, ...]:
    keys = claimed_modules(config, base.config.num_layers)
    specs = in_layout_order(module_spec(key, geometry.rank, 1.0, base.config) for key in keys)
    for spec in specs:
        for what, features in (("in", spec.in_features), ("out", spec.out_features)):
            if features % geometry.vector_length:
                raise MalformedAdapterError(
                    f"{spec.key.path}: {what}_features {features} of the base is not "
                    f"divisible by vector_length {geometry.vector_length}"
                )
    return specs


def _expected_names(specs: Sequence[ModuleSpec]) -> set[str]:
    names = [logits_name(spec, side) for spec in specs for side in ("a", "b")]
    suffixes = ("", "_topk_indices", "_topk_weights")
    return {BANK_NAME}.union(name + suffix for name in names for suffix in suffixes)


def logits_name(spec: ModuleSpec, side: str) -> str:
    """The name of a factor's full logits; a top-k factor's two tensors add a suffix."""
    return tensor_name(spec.key.path, f"vblora_logits_{side.upper()}")


def _read_factor(
    tensors: PeftTensors, spec: ModuleSpec, side: Side, geometry: _Geometry
) -> _SubVectors:
    name = logits_name(spec, side)
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
