"""A store of small adapters whose loads wait and fail as a test wants."""

from __future__ import annotations

import threading

import torch

from adapters import (
    CompactAdapter,
    CompactLoRA,
    UnknownAdapterError,
)
from adapters.layout import in_layout_order, module_spec
from core.factors import ModuleKey
from core.model_config import ModelConfig

FACTOR_BYTES = 4 * 2 * (64 + 64)  # rank 2, one 64x64 module, float32


def small_adapter(number: int, model: ModelConfig) -> CompactLoRA:
    """A LoRA adapter of one module, whose values are all `number`."""
    spec = module_spec(ModuleKey(0, "q_proj"), 2, 1.0, model)
    values = torch.full((2 * 128,), float(number))
    return CompactLoRA("base", in_layout_order([spec]), values)


class FakeStore:
    """Adapters by digest; digests in `broken` fail; `gate` holds loads back while it is closed."""

    def __init__(self, model: ModelConfig, num_adapters: int) -> None:
        adapters = [small_adapter(number, model) for number in range(num_adapters)]
        self.by_digest = {adapter.digest: adapter for adapter in adapters}
        self.digests = [adapter.digest for adapter in adapters]
        self.broken: set[str] = set()
        self.loads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def load(self, digest: str) -> CompactAdapter:
        self.loads.append(digest)
        assert self.gate.wait(10)
        if digest in self.broken:
            raise UnknownAdapterError("it is gone")
        return self.by_digest[digest]
