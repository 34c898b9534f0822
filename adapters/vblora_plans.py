"""Reading VB-LoRA files that are laid out like one that was read before, without a look per tensor.

A fleet of adapters comes from few training scripts, so most files have the config (as far as it
matters) and the header of another one: then the same modules are claimed, each value lies at the
same place, and whatever `read_vblora` refuses by names, shapes and dtypes is not there. A plan says
from where each index and weight is gathered; what is left to check are the values. Files with full
logits, or with several dtypes, have no plan.

Shape legend: N sub-vectors in `layout.factor_order`, K entries per sub-vector, J = K - 1, H vectors
in the bank, B their length.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.bank_pool import Bank
from adapters.compact import CompactVBLoRA
from adapters.layout import ModuleSpec, Side
from adapters.peft_config import TARGET_KEYS, check_features
from adapters.peft_files import PeftFiles
from adapters.peft_tensors import check_finite
from adapters.safetensors_bytes import split_header
from adapters.safetensors_layout import Place, SafetensorsLayout, read_layout
from adapters.vblora import BANK_NAME, SERVED_KEYS, logits_name
from adapters.vblora_checks import Factor, check_indices, check_weights
from core.model_config import BaseInfo

_MAX_PLANS = 8
_MAX_HEADER_BYTES = 4 * 1024**2  # a plan takes about as much memory as the header
_KEYS = sorted(SERVED_KEYS | TARGET_KEYS)
_UNORDERED_KEYS = frozenset({"target_modules", "exclude_modules"})  # PEFT writes sets in any order


class _Key(NamedTuple):
    """What two files have in common that have one plan."""

    config: str
    header_sha256: bytes
    num_bytes: int


@dataclass(frozen=True)
class _Plan:
    """From where in the areas of a file its compact form is gathered: positions (N, K), (N, J)."""

    base_fingerprint: str
    modules: tuple[ModuleSpec, ...]
    layout: SafetensorsLayout
    factors: Sequence[Factor]
    index_dtypes: tuple[torch.dtype, torch.dtype]  # of the file, of the compact form
    index_places_NK: Tensor
    weight_places_NJ: Tensor

    def read(self, weights: bytes) -> CompactVBLoRA:
        """The compact form of a file of this layout. Raises MalformedAdapterError for values."""
        areas = self.layout.areas(weights)
        bank_HB = self.layout.places[BANK_NAME].values_of(areas)
        check_finite(BANK_NAME, bank_HB)
        file_dtype, dtype = self.index_dtypes
        indices_NK = areas[file_dtype][self.index_places_NK]
        weights_NJ = areas[self.factors[0].weights_dtype][self.weight_places_NJ]
        check_indices(self.factors, indices_NK, len(bank_HB))
        check_weights(self.factors, weights_NJ)
        return CompactVBLoRA(
            self.base_fingerprint, self.modules, Bank(bank_HB), indices_NK.to(dtype), weights_NJ
        )


class VBLoRAPlans:
    """The plans for one base that were used last. Safe to use from several threads."""

    def __init__(self, base: BaseInfo) -> None:
        self._base = base
        self._plans: OrderedDict[_Key, _Plan] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def read(self, files: PeftFiles) -> CompactVBLoRA | None:
        """The compact form; None without a plan. Raises as `read_vblora` does."""
        key = _key(files)
        with self._lock:
            plan = self._plans.get(key) if key is not None else None
            if key is None or plan is None:
                return None
            self._plans.move_to_end(key)
        check_features(files.config, SERVED_KEYS)
        return plan.read(files.weights)

    def learn(self, files: PeftFiles, compact: CompactVBLoRA) -> None:
        """Keep a plan from files that `read_vblora` has accepted, where there can be one."""
        key = _key(files)
        plan = _plan(files, compact) if key is not None else None
        if key is None or plan is None or plan.read(files.weights).digest != compact.digest:
            return
        with self._lock:
            self._plans[key] = plan
            while len(self._plans) > _MAX_PLANS:
                self._plans.popitem(last=False)


def _key(files: PeftFiles) -> _Key | None:
    header, _ = split_header(files.weights)
    if len(header) > _MAX_HEADER_BYTES:
        return None
    config = {key: files.config.get(key) for key in _KEYS}
    for key in _UNORDERED_KEYS:
        names = config[key]
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            config[key] = sorted(names)
    try:
        matters = json.dumps(config)
    except RecursionError:  # nested as deeply as can just be read
        return None
    return _Key(matters, hashlib.sha256(header).digest(), len(files.weights))


def _plan(files: PeftFiles, compact: CompactVBLoRA) -> _Plan | None:
    layout = read_layout(files.weights)
    order = compact.factor_order
    names = [logits_name(spec, side) for spec, side in order]
    if any(name in layout.places for name in names):
        return None
    indices = [layout.places[f"{name}_topk_indices"] for name in names]
    weights = [layout.places[f"{name}_topk_weights"] for name in names]
    index_dtypes = {place.dtype for place in indices}
    weight_dtypes = {place.dtype for place in weights}
    if len(index_dtypes) > 1 or len(weight_dtypes) > 1 or not weight_dtypes <= layout.runs.keys():
        return None  # the last: one index per sub-vector has no stored weights
    sides = [side for _, side in order]
    return _Plan(
        compact.base_fingerprint,
        compact.modules,
        layout,
        [
            Factor(name, place.shape[0] * place.shape[1], place.dtype)
            for name, place in zip(names, weights, strict=True)
        ],
        (index_dtypes.pop(), compact.indices_NK.dtype),
        _places(indices, sides),
        _places(weights, sides),
    )


def _places(places: Sequence[Place], sides: Sequence[Side]) -> Tensor:
    """Where the compact form's values come from: rank-major, so B's (O, R, ...) is turned."""
    parts = [
        place.positions() if side == "a" else place.positions().transpose(0, 1)
        for place, side in zip(places, sides, strict=True)
    ]
    return torch.cat([part.flatten(0, 1) for part in parts])
