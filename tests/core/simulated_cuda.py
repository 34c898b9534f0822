"""Where tensors would be on a GPU, tracked on a machine that has none.

Arithmetic runs on the CPU; each tensor carries the device that it would have, and an operation
over tensors of two devices raises as CUDA does. It finds tensors that are made or left on the
wrong device. It says nothing of CUDA's kernels, of speed or of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")

_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
_TO_HOST = (Tensor.cpu, Tensor.numpy)


def device_of(tensor: Tensor) -> torch.device:
    """The device on which the tensor would be."""
    return CUDA if getattr(tensor, "_on_cuda", False) else CPU


class SimulatedCuda(TorchFunctionMode):
    """While it is entered, device="cuda" works, in this thread."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # a new object at each access
            return device_of(args[0])
        if func is torch.device:
            return func(*args, **kwargs)
        if func == Tensor.__iter__:
            return iter(args[0].unbind())
        wanted = CPU if func in _TO_HOST else _named_device(args, kwargs)
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(
            *tree_map(_on_cpu, args), **{name: _on_cpu(value) for name, value in kwargs.items()}
        )
        target = wanted or _common_device(func, args, sources)
        if any(result is source and device_of(source) != target for source in sources):
            result = result.clone()  # a copy on another device is another tensor
        return tree_map(lambda leaf: _tagged(leaf, target), result)


def _named_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    named = [kwargs.get("device"), *args]
    for value in named:
        if isinstance(value, torch.device):
            return CUDA if value.type == "cuda" else CPU
        if isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu"):
            return CUDA if value.startswith("cuda") else CPU
    return None


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return CPU if is_cuda else value


def _common_device(func: Any, args: tuple[Any, ...], sources: list[Tensor]) -> torch.device:
    if func in _INDEXING:  # CUDA takes indices from the host
        sources = [args[0]]
    devices = {device_of(source) for source in sources if source.dim()}
    if len(devices) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on one device, got {devices}")
    scalars = {device_of(source) for source in sources}
    return next(iter(devices or scalars), CPU)


def _tagged(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Tensor):
        leaf._on_cuda = device.type == "cuda"
    return leaf


def simulated_cuda(monkeypatch: Any, free_bytes: int) -> Iterator[None]:
    """A GPU with `free_bytes` of memory, as a fixture's body."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, free_bytes))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1)
    with SimulatedCuda():
        yield
