"""What other processes do to a store in tests; run by multiprocessing, so importable by name."""

from __future__ import annotations

from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from adapters import AdapterExistsError, AdapterStore, CompactLoRA
from adapters.layout import module_spec
from core.factors import ModuleKey
from core.model_config import BaseInfo, read_base_info


def numbered_adapter(number: int, base: BaseInfo) -> CompactLoRA:
    """A LoRA adapter of one module, whose values are all `number`."""
    spec = module_spec(ModuleKey(0, "q_proj"), 1, 1.0, base.config)
    return CompactLoRA(base.fingerprint, (spec,), torch.full((128,), float(number)))


def register_forever(root: Path, base_path: Path, prefix: str, connection: Connection) -> None:
    """Add one adapter after the other, replacing "shared" each time; tell of each once it is in."""
    torch.set_num_threads(1)
    base = read_base_info(base_path)
    store = AdapterStore.open(root, base)
    for number in count():
        adapter = numbered_adapter(number, base)
        for adapter_id in (f"{prefix}/{number}", "shared"):
            result = store.add_compact(adapter_id, adapter, replace=True)
            connection.send((adapter_id, result.record.digest))


def register_some(
    root: Path, base_path: Path, prefix: str, num_adapters: int, connection: Connection
) -> None:
    """Add own names and contested ones; send which contested ones were won."""
    torch.set_num_threads(1)
    base = read_base_info(base_path)
    store = AdapterStore.open(root, base)
    offset = 1000 * ord(prefix)
    won = []
    for number in range(num_adapters):
        adapter = numbered_adapter(offset + number, base)
        store.add_compact(f"{prefix}/{number}", adapter)
        try:
            if store.add_compact(f"contested/{number}", adapter).created:
                won.append(number)
        except AdapterExistsError:
            pass
    connection.send(won)
