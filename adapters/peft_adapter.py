"""A PEFT adapter directory → its compact form, validated against one base: LoRA or VB-LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adapters.compact import CompactAdapter
from adapters.errors import MalformedAdapterError, UnsupportedAdapterError
from adapters.lora import read_lora
from adapters.peft_files import PeftFiles, read_peft_files
from adapters.vblora import read_vblora
from core.model_config import BaseInfo

MAX_CONFIG_BYTES = 1024**2
MAX_WEIGHTS_BYTES = 512 * 1024**2

_READERS: dict[str, Callable[[PeftFiles, BaseInfo], CompactAdapter]] = {
    "VBLORA": read_vblora,
    "LORA": read_lora,
}


def read_peft_adapter(
    directory: Path | str,
    base: BaseInfo,
    *,
    max_config_bytes: int = MAX_CONFIG_BYTES,
    max_weights_bytes: int = MAX_WEIGHTS_BYTES,
    allowed_root: Path | None = None,
) -> CompactAdapter:
    """Read what PEFT's `save_pretrained` wrote and check it against the base.

    Raises MalformedAdapterError, UnsupportedAdapterError or AdapterTooLargeError.
    """
    files = read_peft_files(
        directory,
        max_config_bytes=max_config_bytes,
        max_weights_bytes=max_weights_bytes,
        allowed_root=allowed_root,
    )
    return compact_from_files(files, base)


def compact_from_files(files: PeftFiles, base: BaseInfo) -> CompactAdapter:
    """The compact form of files that have been read. Raises as `read_peft_adapter` does."""
    peft_type = files.config.get("peft_type")
    if not isinstance(peft_type, str):
        raise MalformedAdapterError(f"peft_type is {peft_type!r}: not the config of a PEFT adapter")
    reader = _READERS.get(peft_type)
    if reader is None:
        raise UnsupportedAdapterError(
            f"peft_type {peft_type[:40]!r} is not served, only {' and '.join(_READERS)}",
            feature="peft_type",
        )
    return reader(files, base)
