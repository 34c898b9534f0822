"""The tensors of a checkpoint's safetensors files by name, checked, cast and moved.

Knows nothing of what they are for.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from core.errors import UnsupportedModelError
from core.model_config import weight_files


class Checkpoint:
    """The tensors of a sharded or single-file checkpoint by name, read on demand."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._path, self._device = path, device
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        for file in weight_files(self._path):
            opened = self._stack.enter_context(safe_open(file, framework="pt"))
            self._files.update(dict.fromkeys(opened.keys(), opened))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self._files)

    def stored(self, name: str) -> Tensor:
        """The tensor `name` as the file has it; KeyError if it has not."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor `name`, moved and cast to `dtype`, by default the model's.

        Raises UnsupportedModelError if it is absent, misshapen or no float.
        """
        if name not in self._files:
            raise UnsupportedModelError(f"{self._path}: the weights lack {name}")
        tensor: Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UnsupportedModelError(
                f"{self._path}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}"
            )
        if not tensor.is_floating_point():
            raise UnsupportedModelError(
                f"{self._path}: {name} has dtype {tensor.dtype}, not a float"
            )
        return tensor.to(device=self._device, dtype=dtype or self.dtype)
