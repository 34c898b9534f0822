"""A PEFT adapter directory → its config as JSON and its tensors, with caps before each read.

Only `adapter_config.json` and `adapter_model.safetensors` are opened; weights in another format or
in a second file are refused by name, every other file is left alone. Nothing is unpickled. Knows
nothing of what config keys and tensors mean.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.errors import AdapterTooLargeError, MalformedAdapterError, UnsupportedAdapterError
from adapters.safetensors_bytes import parse_safetensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_MAX_DIRECTORY_ENTRIES = 1024


@dataclass(frozen=True)
class PeftFiles:
    """What a PEFT directory holds: the config, the tensors, and the size of both files in bytes."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    sizes: Mapping[str, int]


def read_peft_files(
    directory: Path | str,
    *,
    max_config_bytes: int,
    max_weights_bytes: int,
    allowed_root: Path | None = None,
) -> PeftFiles:
    """Read a directory as PEFT's `save_pretrained` writes it.

    `allowed_root`: where given, both files must lie under it after symbolic links are followed.
    Raises MalformedAdapterError, AdapterTooLargeError, or UnsupportedAdapterError for weights that
    are not in one safetensors file.
    """
    root = Path(directory)
    _refuse_other_weights(root)
    config_bytes = _read_capped(root / CONFIG_NAME, max_config_bytes, allowed_root)
    config = _parse_config(config_bytes)
    weights = _read_capped(root / WEIGHTS_NAME, max_weights_bytes, allowed_root)
    tensors = parse_safetensors(weights)
    return PeftFiles(config, tensors, {CONFIG_NAME: len(config_bytes), WEIGHTS_NAME: len(weights)})


def _refuse_other_weights(root: Path) -> None:
    for name in _file_names(root):
        if name == WEIGHTS_NAME:
            continue
        if name.endswith(".bin") and name.startswith(("adapter_model", "pytorch_model")):
            raise UnsupportedAdapterError(
                f"{name}: pickled weights are not read; save the adapter as safetensors",
                feature=name,
            )
        if name.startswith("adapter_model") or name.endswith(".safetensors"):
            raise UnsupportedAdapterError(
                f"{name}: a second weights file; all tensors must be in {WEIGHTS_NAME}",
                feature=name,
            )


def _file_names(root: Path) -> list[str]:
    names: list[str] = []
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > _MAX_DIRECTORY_ENTRIES:
                    raise MalformedAdapterError(
                        f"{root} has over {_MAX_DIRECTORY_ENTRIES} entries: no adapter directory"
                    )
    except OSError as error:
        raise MalformedAdapterError(f"{root} is not a readable directory: {error}") from error
    return sorted(names)


def _read_capped(path: Path, max_bytes: int, allowed_root: Path | None) -> bytes:
    """The bytes of a regular file of at most `max_bytes`; never blocks on a pipe or device."""
    try:
        target = path.resolve(strict=True)
        if allowed_root is not None and not target.is_relative_to(allowed_root.resolve()):
            raise MalformedAdapterError(f"{path.name} leads outside of the allowed directory")
        # what was checked is what is opened: no link is followed a second time
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise MalformedAdapterError(
            f"{path.name} is missing or unreadable: {error.strerror}"
        ) from error
    with os.fdopen(descriptor, "rb") as stream:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise MalformedAdapterError(f"{path.name} is not a regular file")
        data = stream.read(max_bytes + 1) if info.st_size <= max_bytes else b""
    size = max(info.st_size, len(data))
    if size > max_bytes:
        raise AdapterTooLargeError(f"{path.name} has {size} bytes, at most {max_bytes} are allowed")
    return data


def _parse_config(data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedAdapterError(f"{CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise MalformedAdapterError(f"{CONFIG_NAME} is not a JSON object")
    return config
