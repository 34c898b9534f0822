"""The compact forms of adapters: what is stored, sent and kept in memory; factors derive from them.

A compact form is immutable and valid for one base. Its `digest` is its identity: a hash of what is
computed with (bank, indices, weights, modules, ranks, scales, base fingerprint), not of the files
that it came from. So one adapter saved in either of PEFT's VB-LoRA modes has one digest as long as
the numbers are the same, and another digest where a file's dtype has rounded them.

Knows nothing of PEFT's files, of names or of the disk.

Shape legend: N sub-vectors of all modules in `layout.factor_order`, K entries per sub-vector,
J = K - 1 stored weights, H vectors in the bank, B their length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor

from adapters.bank_pool import Bank, tensor_digest
from adapters.errors import MalformedAdapterError
from adapters.layout import (
    ModuleSpec,
    Side,
    factor_order,
    in_layout_order,
    module_spec,
    num_factor_values,
)
from adapters.safetensors_bytes import parse_safetensors, read_metadata
from adapters.stored_parameters import index_parameters, stored_parameters
from core.factors import PROJECTIONS, ModuleKey
from core.model_config import ModelConfig

METADATA_KEY = "vbserve"
_FACTOR_VALUE_BYTES = 4  # factors are float32 unless the engine asks for less


@dataclass(frozen=True, eq=False)
class _CompactForm:
    base_fingerprint: str
    modules: tuple[ModuleSpec, ...]

    kind: ClassVar[str]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the compact form by name, without the bank."""
        raise NotImplementedError

    @property
    def metadata(self) -> dict[str, Any]:
        """Everything but tensors, as plain JSON values."""
        return {
            "format": 1,
            "kind": self.kind,
            "base": self.base_fingerprint,
            "modules": _encode_modules(self.modules),
        }

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(spec.rank for spec in self.modules)

    @property
    def num_bytes(self) -> int:
        """Size of the tensors, without the bank."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def factor_bytes(self) -> int:
        """Size of the factors in float32."""
        return num_factor_values(self.modules) * _FACTOR_VALUE_BYTES

    @cached_property
    def factor_order(self) -> tuple[tuple[ModuleSpec, Side], ...]:
        """Every factor in the order of the buffer, see `layout`."""
        return tuple(factor_order(self.modules))

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of the content."""
        return tensor_digest(self._metadata_json, self.tensors)

    def to_bytes(self) -> bytes:
        """One safetensors file, without the bank."""
        return safetensors.torch.save(self.tensors, {METADATA_KEY: self._metadata_json})

    @cached_property
    def _metadata_json(self) -> str:
        return _canonical_json(self.metadata)


@dataclass(frozen=True, eq=False)
class CompactVBLoRA(_CompactForm):
    """VB-LoRA: sub-vector n is the sum over K of weight times bank row.

    indices_NK  smallest of uint8, int16, int32, int64 that holds H - 1
    weights_NJ  in the dtype of the file (float32 from full logits); the last weight of each
                sub-vector is max(0, 1 - the sum of the others), computed in float32
    """

    bank: Bank
    indices_NK: Tensor
    weights_NJ: Tensor

    kind: ClassVar[str] = "vblora"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """`indices` (N, K) and `weights` (N, K - 1)."""
        return {"indices": self.indices_NK, "weights": self.weights_NJ}

    @property
    def metadata(self) -> dict[str, Any]:
        """Adds the bank's digest."""
        return {**super().metadata, "bank": self.bank.digest}

    @property
    def num_stored_parameters(self) -> int:
        """In float32 equivalents, counted as PEFT's `get_nb_savable_parameters` does."""
        return self.parameters_where_an_index_is(index_parameters(len(self.bank.vectors_HB)))

    def parameters_where_an_index_is(self, an_index: float) -> int:
        """Stored parameters by another counting, see `stored_parameters`."""
        num_sub_vectors, topk = self.indices_NK.shape
        num_vectors, length = self.bank.vectors_HB.shape
        return stored_parameters(num_vectors, length, num_sub_vectors, topk, an_index)


@dataclass(frozen=True, eq=False)
class CompactLoRA(_CompactForm):
    """LoRA and what is lowered to it: all factors in one flat tensor, rank-major, in
    `layout.factor_order`.

    `values` has the dtype of the file (of several, the one that holds all exactly); alpha, r and
    use_rslora are folded into each module's scale. `gains`, DoRA's alone, are the gain_O of all
    modules in their order, float32.
    """

    values: Tensor
    gains: Tensor | None = None

    kind: ClassVar[str] = "lora"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """`values` and, where there are any, `gains`; one-dimensional."""
        gains = {} if self.gains is None else {"gains": self.gains}
        return {"values": self.values, **gains}

    @property
    def bank(self) -> None:
        """LoRA has no bank."""
        return None

    @property
    def num_stored_parameters(self) -> int:
        """Number of values of all A and B, and of gains."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def factor_bytes(self) -> int:
        """Adds the gains."""
        gains = 0 if self.gains is None else self.gains.numel()
        return super().factor_bytes + gains * _FACTOR_VALUE_BYTES


CompactAdapter = CompactVBLoRA | CompactLoRA


def compact_bytes(adapter: CompactAdapter) -> int:
    """Size of a compact form with its bank, as if no other adapter shared it."""
    return adapter.num_bytes + (adapter.bank.num_bytes if adapter.bank is not None else 0)


def index_dtype(num_vectors: int) -> torch.dtype:
    """The smallest dtype (PEFT's choice of four) that holds indices below `num_vectors`."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if num_vectors - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64


def bank_to_bytes(bank: Bank) -> bytes:
    """One safetensors file."""
    return safetensors.torch.save({"vectors": bank.vectors_HB})


def bank_from_bytes(data: bytes) -> Bank:
    """Inverse of `bank_to_bytes`. Raises MalformedAdapterError."""
    tensors = parse_safetensors(data)
    if set(tensors) != {"vectors"} or tensors["vectors"].ndim != 2:
        raise MalformedAdapterError("a bank blob holds one tensor 'vectors' of two dimensions")
    return Bank(tensors["vectors"])


@dataclass(frozen=True)
class CompactBlob:
    """A compact form as read from bytes, not yet joined with its bank and a base's geometry."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def base_fingerprint(self) -> str:
        """The fingerprint of the base that it is for."""
        return str(self.metadata["base"])

    @property
    def digest(self) -> str:
        """Hex sha256 of the content, as `CompactAdapter.digest`."""
        return tensor_digest(_canonical_json(self.metadata), dict(self.tensors))

    @property
    def bank_digest(self) -> str | None:
        """The digest of the bank; None for LoRA."""
        return self.metadata.get("bank")

    def join(self, model: ModelConfig, bank: Bank | None) -> CompactAdapter:
        """The compact form over `model`'s geometry. Raises MalformedAdapterError."""
        try:
            modules = _decode_modules(_canonical_json(self.metadata["modules"]), model)
            if self.metadata["kind"] == CompactLoRA.kind:
                values, gains = self.tensors["values"], self.tensors.get("gains")
                return CompactLoRA(self.base_fingerprint, modules, values, gains)
            assert bank is not None and bank.digest == self.bank_digest
            indices, weights = self.tensors["indices"], self.tensors["weights"]
            return CompactVBLoRA(self.base_fingerprint, modules, bank, indices, weights)
        except (KeyError, ValueError, TypeError) as error:
            raise MalformedAdapterError(f"not a compact adapter: {error!r}") from error


def blob_from_bytes(data: bytes) -> CompactBlob:
    """Inverse of `to_bytes`. Raises MalformedAdapterError."""
    tensors = parse_safetensors(data)
    try:
        return CompactBlob(json.loads(read_metadata(data)[METADATA_KEY]), tensors)
    except (KeyError, ValueError) as error:
        raise MalformedAdapterError(f"not a compact adapter: {error!r}") from error


def _canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _encode_modules(modules: Sequence[ModuleSpec]) -> list[dict[str, Any]]:
    """Modules of one rank and scale share an entry: a few hundred bytes where a table takes KB."""
    groups: dict[tuple[int, float], dict[str, list[int]]] = {}
    for spec in modules:
        layers = groups.setdefault((spec.rank, spec.scale), {})
        layers.setdefault(spec.key.projection, []).append(spec.key.layer)
    return [
        {"rank": rank, "scale": scale, "layers": layers}
        for (rank, scale), layers in sorted(groups.items())
    ]


@lru_cache(maxsize=64)  # adapters of one kind have the same, and there are hundreds of modules
def _decode_modules(encoded: str, model: ModelConfig) -> tuple[ModuleSpec, ...]:
    specs = [
        module_spec(ModuleKey(layer, projection), group["rank"], float(group["scale"]), model)
        for group in json.loads(encoded)
        for projection, layers in group["layers"].items()
        for layer in layers
    ]
    if not all(spec.key.projection in PROJECTIONS for spec in specs):
        raise ValueError("unknown projection")
    return in_layout_order(specs)
