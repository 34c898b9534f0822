"""What a store says of an adapter without reading its tensors, and which ids may name one.

Knows nothing of where records are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adapters.compact import CompactAdapter, compact_bytes
from adapters.errors import InvalidAdapterIdError, StoreCorruptedError
from core.factors import PROJECTIONS

MAX_ID_CHARS = 128
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")
_ID_RULE = (
    f"1 to {MAX_ID_CHARS} characters A-Z a-z 0-9 . _ : / -, the first a letter or digit, "
    "no empty, '.' or '..' part between slashes"
)


@dataclass(frozen=True)
class AdapterRecord:
    """One registered adapter.

    digest                 identity of the content; what requests carry
    kind                   "vblora" or "lora"
    rank                   the largest rank of any module
    targets                the projections that are adapted in at least one layer
    num_modules            adapted linear layers
    num_stored_parameters  for VB-LoRA in float32 equivalents, as PEFT counts them
    compact_bytes          the compact form with its bank, as if no other adapter shared that
    factor_bytes           all factors in float32
    created                unix seconds
    source_files           size in bytes by name of the files that it was read from
    base_fingerprint       the base that it was registered for
    bank_digest            None for LoRA
    """

    id: str
    digest: str
    kind: str
    rank: int
    targets: tuple[str, ...]
    num_modules: int
    num_stored_parameters: int
    compact_bytes: int
    factor_bytes: int
    created: int
    source_files: Mapping[str, int]
    base_fingerprint: str
    bank_digest: str | None

    def to_json(self) -> bytes:
        """The manifest of this record."""
        return json.dumps({"format": 1, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> AdapterRecord:
        """Inverse of `to_json`. Raises StoreCorruptedError."""
        try:
            fields: dict[str, Any] = json.loads(data)
            if fields.pop("format") != 1:
                raise ValueError("format is not 1")
            return cls(**{**fields, "targets": tuple(fields["targets"])})
        except (KeyError, TypeError, ValueError) as error:
            raise StoreCorruptedError(f"not a manifest: {error!r}") from error


def record_of(
    adapter_id: str, adapter: CompactAdapter, source_files: Mapping[str, int], created: int
) -> AdapterRecord:
    """The record of a compact form under an id."""
    projections = {spec.key.projection for spec in adapter.modules}
    return AdapterRecord(
        id=adapter_id,
        digest=adapter.digest,
        kind=adapter.kind,
        rank=adapter.max_rank,
        targets=tuple(name for name in PROJECTIONS if name in projections),
        num_modules=len(adapter.modules),
        num_stored_parameters=adapter.num_stored_parameters,
        compact_bytes=compact_bytes(adapter),
        factor_bytes=adapter.factor_bytes,
        created=created,
        source_files=dict(source_files),
        base_fingerprint=adapter.base_fingerprint,
        bank_digest=adapter.bank.digest if adapter.bank is not None else None,
    )


def check_adapter_id(adapter_id: str, reserved: Collection[str] = ()) -> None:
    """Raise InvalidAdapterIdError unless `adapter_id` may name an adapter."""
    parts = adapter_id.split("/")
    well_formed = _ID.fullmatch(adapter_id) and len(adapter_id) <= MAX_ID_CHARS
    if not well_formed or any(part in ("", ".", "..") for part in parts):
        raise InvalidAdapterIdError(f"adapter id {adapter_id[:160]!r} is not valid: {_ID_RULE}")
    if adapter_id in reserved:
        raise InvalidAdapterIdError(f"adapter id {adapter_id!r} is the name of the base")


def manifest_name(adapter_id: str) -> str:
    """A file name for an id: readable, unique on file systems that ignore case, of safe length."""
    readable = re.sub(r"[^a-z0-9-]", "_", adapter_id.lower())[:60]
    return f"{readable}.{hashlib.sha256(adapter_id.encode()).hexdigest()[:40]}.json"
