"""PEFT LoRA and rsLoRA (peft 0.21) → `CompactLoRA`.

y += scale * (x @ A.T) @ B.T with scale = alpha / r, or alpha / sqrt(r) for rsLoRA; rank_pattern and
alpha_pattern give single modules their own r and alpha. Initialisations that leave the base alone
are served; those that change it (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) are refused unless it
was converted, by PEFT or by `pissa`, since the increment belongs to the changed base.

Shape legend: R rank, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from adapters.compact import CompactLoRA
from adapters.errors import MalformedAdapterError
from adapters.layout import ModuleSpec, Side, factor_order, in_layout_order, module_spec
from adapters.peft_config import check_features
from adapters.peft_scaling import Scaling
from adapters.peft_targets import claimed_modules
from adapters.peft_tensors import FLOATS, PeftTensors, check_finite, tensor_name
from core.model_config import BaseInfo

SERVED_KEYS = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})


def read_lora(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseInfo
) -> CompactLoRA:
    """Validate a LoRA adapter against the base and return its compact form.

    Raises UnsupportedAdapterError or MalformedAdapterError; nothing is served in part.
    """
    check_features(config, SERVED_KEYS)
    specs = _read_modules(config, base)
    own = PeftTensors(tensors)
    names = {_weight_name(spec, side) for spec in specs for side in ("a", "b")}
    own.refuse_others(names, {spec.key.path for spec in specs})
    parts = [_read_factor(own, spec, side) for spec, side in factor_order(specs)]
    dtype = reduce(torch.promote_types, {part.dtype for part in parts})
    values = torch.cat([part.to(dtype) for part in parts])
    return CompactLoRA(base.fingerprint, specs, values)


def check_layers(config: Mapping[str, Any]) -> None:
    """Raise MalformedAdapterError where LoRA's config names layers and a pattern as well."""
    targets = config.get("target_modules")
    by_regex = isinstance(targets, str) and targets.lower() != "all-linear"
    if by_regex and config.get("layers_to_transform") is not None:
        raise MalformedAdapterError(
            "layers_to_transform cannot be used when target_modules is a pattern"
        )


def _read_modules(config: Mapping[str, Any], base: BaseInfo) -> tuple[ModuleSpec, ...]:
    check_layers(config)
    scaling = Scaling(config)
    keys = claimed_modules(config, base.config.num_layers)
    specs = (module_spec(key, *scaling.rank_and_scale(key), base.config) for key in keys)
    return in_layout_order(specs)


def _weight_name(spec: ModuleSpec, side: str) -> str:
    return tensor_name(spec.key.path, f"lora_{side.upper()}.weight")


def _read_factor(tensors: PeftTensors, spec: ModuleSpec, side: Side) -> Tensor:
    """One factor, rank-major and flat: A is (R, I) already, B comes as (O, R)."""
    name = _weight_name(spec, side)
    shape = (spec.rank, spec.in_features) if side == "a" else (spec.out_features, spec.rank)
    weight = tensors.take(name, shape, FLOATS)
    check_finite(name, weight)
    return (weight if side == "a" else weight.T).flatten()
