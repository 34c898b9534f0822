"""A PEFT adapter directory → its compact form, validated against one base: the kinds served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.compact import CompactAdapter, CompactVBLoRA
from adapters.errors import MalformedAdapterError, UnsupportedAdapterError
from adapters.lora import read_lora
from adapters.lora_variants import is_lora_xs, read_dora, read_lora_xs
from adapters.lowered import read_adalora, read_loha, read_vera
from adapters.peft_files import PeftFiles, read_peft_files
from adapters.vblora import read_vblora
from adapters.vblora_plans import VBLoRAPlans
from adapters.vertical_lora import PEFT_TYPE, read_vertical_lora
from core.model_config import BaseInfo

MAX_CONFIG_BYTES = 1024**2
MAX_WEIGHTS_BYTES = 512 * 1024**2

_Reader = Callable[[Mapping[str, Any], Mapping[str, Tensor], BaseInfo], CompactAdapter]


def _read_kind_of_lora(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseInfo
) -> CompactAdapter:
    """What PEFT or a method's authors call LORA. Raises as `read_lora` does."""
    if is_lora_xs(tensors):
        return read_lora_xs(config, tensors, base)
    if config.get("use_dora"):
        return read_dora(config, tensors, base)
    return read_lora(config, tensors, base)


_READERS: dict[str, _Reader] = {
    "VBLORA": read_vblora,
    "LORA": _read_kind_of_lora,
    "ADALORA": read_adalora,
    "VERA": read_vera,
    "LOHA": read_loha,
    PEFT_TYPE: read_vertical_lora,
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
    config, tensors = files.config, files.tensors
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise MalformedAdapterError(f"peft_type is {peft_type!r}: not the config of a PEFT adapter")
    reader = _READERS.get(peft_type)
    if reader is None:
        raise UnsupportedAdapterError(
            f"peft_type {peft_type[:40]!r} is not served, only {', '.join(_READERS)}",
            feature="peft_type",
        )
    return reader(config, tensors, base)


class PeftReader:
    """`compact_from_files` for one base, faster for VB-LoRA files like others before them."""

    def __init__(self, base: BaseInfo) -> None:
        self._base = base
        self._plans = VBLoRAPlans(base)

    def read(self, files: PeftFiles) -> CompactAdapter:
        """The compact form. Raises as `compact_from_files` does."""
        is_vblora = files.config.get("peft_type") == "VBLORA"
        compact = self._plans.read(files) if is_vblora else None
        if compact is not None:
            return compact
        adapter = compact_from_files(files, self._base)
        if isinstance(adapter, CompactVBLoRA):
            self._plans.learn(files, adapter)
        return adapter
