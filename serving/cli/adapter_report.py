"""A table that describes one adapter for a person. Knows nothing of the command line."""

from __future__ import annotations

from pathlib import Path

from pydantic import ByteSize
from rich.table import Table

from adapters.compact import CompactAdapter, CompactVBLoRA, compact_bytes
from core.factors import PROJECTIONS
from core.model_config import ModelConfig

_BF16_BYTES = 2
_PAPER_LORA_RANK = 64  # the rank of LoRA that the VB-LoRA paper compares with on Llama 2


def adapter_report(directory: Path, adapter: CompactAdapter, model: ModelConfig) -> Table:
    """Kind, shape and sizes; LoRA's sizes are those of the same modules in bfloat16."""
    table = Table(title=str(directory), show_header=False, title_justify="left")
    rows = {
        "kind": adapter.kind,
        "rank": str(adapter.max_rank),
        **_bank_rows(adapter),
        "modules": _modules(adapter),
        "digest": adapter.digest,
        "stored parameters": f"{adapter.num_stored_parameters:,}",
        "compact form": human_bytes(compact_bytes(adapter)),
        "factors in float32": human_bytes(adapter.factor_bytes),
        f"LoRA of rank {adapter.max_rank}, bfloat16": _lora(adapter, model, adapter.max_rank),
        f"LoRA of rank {_PAPER_LORA_RANK}, bfloat16": _lora(adapter, model, _PAPER_LORA_RANK),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def human_bytes(num_bytes: int) -> str:
    """As 319.2KiB."""
    return ByteSize(num_bytes).human_readable()


def lora_bytes(adapter: CompactAdapter, model: ModelConfig, rank: int) -> int:
    """Size of LoRA's A and B of that rank on the adapter's modules, in bfloat16."""
    shapes = [model.projection_shape(spec.key.projection) for spec in adapter.modules]
    return sum(rank * sum(shape) * _BF16_BYTES for shape in shapes)


def _lora(adapter: CompactAdapter, model: ModelConfig, rank: int) -> str:
    size = lora_bytes(adapter, model, rank)
    return f"{human_bytes(size)}, {size / compact_bytes(adapter):.1f} times the compact form"


def _bank_rows(adapter: CompactAdapter) -> dict[str, str]:
    if not isinstance(adapter, CompactVBLoRA):
        return {}
    num_vectors, length = adapter.bank.vectors_HB.shape
    return {
        "k": str(adapter.indices_NK.shape[1]),
        "bank": f"{num_vectors} vectors of {length}, {human_bytes(adapter.bank.num_bytes)}",
        "sub-vectors": f"{adapter.indices_NK.shape[0]:,}",
    }


def _modules(adapter: CompactAdapter) -> str:
    keys = [spec.key for spec in adapter.modules]
    used = [name for name in PROJECTIONS if any(key.projection == name for key in keys)]
    return f"{len(keys)} in {len({key.layer for key in keys})} layers: {', '.join(used)}"
