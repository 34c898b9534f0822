"""A PEFT adapter directory → its config as JSON and its weights, with caps before each read.

Only `adapter_config.json` and `adapter_model.safetensors` are opened; weights in another format or
in a second file are refused by name, every other file is left alone. Nothing is unpickled. Knows
nothing of what config keys and tensors mean.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
    """What a PEFT directory holds: the config, the weights file, and both files' sizes in bytes."""

    config: Mapping[str, Any]
    weights: bytes
    sizes: Mapping[str, int]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name. Raises MalformedAdapterError."""
        return parse_safetensors(self.weights)


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
    return _peft_files(
        _file_names(root),
        lambda name, max_bytes: _read_capped(root / name, max_bytes, allowed_root),
        max_config_bytes,
        max_weights_bytes,
    )


def peft_files_in_memory(
    contents: Mapping[str, bytes], *, max_config_bytes: int, max_weights_bytes: int
) -> PeftFiles:
    """`read_peft_files` of a directory's contents by file name, with the same refusals."""

    def read(name: str, max_bytes: int) -> bytes:
        if name not in contents:
            raise _unreadable(name, os.strerror(errno.ENOENT))
        _check_size(name, len(contents[name]), max_bytes)
        return contents[name]

    return _peft_files(sorted(contents), read, max_config_bytes, max_weights_bytes)


def _peft_files(
    names: Sequence[str],
    read: Callable[[str, int], bytes],
    max_config_bytes: int,
    max_weights_bytes: int,
) -> PeftFiles:
    _refuse_other_weights(names)
    config_bytes = read(CONFIG_NAME, max_config_bytes)
    config = _parse_config(config_bytes)
    weights = read(WEIGHTS_NAME, max_weights_bytes)
    return PeftFiles(config, weights, {CONFIG_NAME: len(config_bytes), WEIGHTS_NAME: len(weights)})


def _refuse_other_weights(names: Sequence[str]) -> None:
    for name in names:
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
        raise _unreadable(path.name, error.strerror) from error
    with os.fdopen(descriptor, "rb") as stream:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise MalformedAdapterError(f"{path.name} is not a regular file")
        data = stream.read(max_bytes + 1) if info.st_size <= max_bytes else b""
    _check_size(path.name, max(info.st_size, len(data)), max_bytes)
    return data


def _unreadable(name: str, reason: str | None) -> MalformedAdapterError:
    return MalformedAdapterError(f"{name} is missing or unreadable: {reason}")


def _check_size(name: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise AdapterTooLargeError(f"{name} has {num_bytes} bytes, at most {max_bytes} are allowed")


def _parse_config(data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedAdapterError(f"{CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise MalformedAdapterError(f"{CONFIG_NAME} is not a JSON object")
    return config
