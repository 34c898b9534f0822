"""A table that describes one adapter for a person. Knows nothing of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ByteSize
from rich.table import Table

from adapters.bank_use import bank_use
from adapters.compact import CompactAdapter, CompactVBLoRA, compact_bytes
from adapters.stored_parameters import WHOLE
from core.factors import PROJECTIONS
from core.model_config import ModelConfig

_BF16_BYTES = 2
_PAPER_LORA_RANK = 64  # the rank of LoRA that the VB-LoRA paper compares with on Llama 2


def adapter_report(
    directory: Path, adapter: CompactAdapter, model: ModelConfig, lora_ranks: Sequence[int] = ()
) -> Table:
    """Kind, shape and sizes; LoRA's sizes are those of the same modules in bfloat16.

    LoRA is that of the adapter's own rank and of `lora_ranks`, by default the paper's.
    """
    table = Table(title=str(directory), show_header=False, title_justify="left")
    rows = {
        "kind": adapter.kind,
        "rank": str(adapter.max_rank),
        **_bank_rows(adapter),
        "modules": _modules(adapter),
        "digest": adapter.digest,
        "stored parameters": f"{adapter.num_stored_parameters:,}",
        **_paper_rows(adapter),
        "files": human_bytes(sum(f.stat().st_size for f in directory.glob("*.safetensors"))),
        "compact form": human_bytes(compact_bytes(adapter)),
        "factors in float32": human_bytes(adapter.factor_bytes),
    }
    for rank in (adapter.max_rank, *(lora_ranks or (_PAPER_LORA_RANK,))):
        rows[f"LoRA of rank {rank}, bfloat16"] = _lora(adapter, model, rank)
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


def _paper_rows(adapter: CompactAdapter) -> dict[str, str]:
    """The paper's tables of its larger models count an index as a parameter, PEFT its bytes."""
    if not isinstance(adapter, CompactVBLoRA):
        return {}
    use, whole = bank_use(adapter), adapter.parameters_where_an_index_is(WHOLE)
    return {
        "... with whole indices": f"{whole:,}",
        "unused bank vectors": str(use.num_unused),
        "entropy of the weights": (
            f"{use.mean_entropy_bits:.2f} of {use.most_entropy_bits:.2f} bits"
        ),
    }


def _modules(adapter: CompactAdapter) -> str:
    keys = [spec.key for spec in adapter.modules]
    used = [name for name in PROJECTIONS if any(key.projection == name for key in keys)]
    return f"{len(keys)} in {len({key.layer for key in keys})} layers: {', '.join(used)}"
