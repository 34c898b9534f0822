"""Any number of distinct VB-LoRA adapters from one: made when they are sent, never on disk.

With a bank each, the bank is the template's with noise; over one shared bank, the bank is the
template's and each sub-vector names other vectors of it. They may have another rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BANK = "base_model.vblora_vector_bank"
_INDICES = "_topk_indices"
_LOGITS_A = ".vblora_logits_A_"  # [rank, tile, k]; those of B are [tile, rank, k]
_NOISE = 0.02  # beside a bank of standard deviation 0.1

Tensors = dict[str, npt.NDArray[Any]]
Upload = tuple[str, Mapping[str, bytes]]
"""An id, and the contents of PEFT's files by name."""


class Variants:
    """Uploads by number; the same number gives the same bytes."""

    def __init__(self, template: Path, *, shared_bank: bool, rank: int | None = None) -> None:
        """`template` is a PEFT directory saved with save_only_topk_weights."""
        self._config = (template / _CONFIG).read_bytes()
        self._tensors: Tensors = load((template / _WEIGHTS).read_bytes())
        config = json.loads(self._config)
        if rank is not None and rank != config["r"]:
            self._tensors = _of_rank(self._tensors, config["r"], rank)
            self._config = json.dumps({**config, "r": rank}).encode()
        self._shared_bank = shared_bank

    def files(self, number: int) -> Mapping[str, bytes]:
        """PEFT's two files of variant `number`."""
        rng = np.random.default_rng(number)
        tensors = dict(self._tensors)
        bank = tensors[_BANK]
        if not self._shared_bank:
            noise = rng.normal(0.0, _NOISE, bank.shape).astype(bank.dtype)
            tensors[_BANK] = bank + noise
        else:
            order = rng.permutation(len(bank))  # keeps the indices of a sub-vector distinct
            for name in (name for name in tensors if name.endswith(_INDICES)):
                indices = tensors[name]
                tensors[name] = order[indices].astype(indices.dtype)
        return {_CONFIG: self._config, _WEIGHTS: save(tensors, metadata={"format": "pt"})}

    def uploads(self, ids: Sequence[tuple[int, str]]) -> Iterator[Upload]:
        """(number, id) → uploads, each made when it is asked for."""
        for number, adapter_id in ids:
            yield adapter_id, self.files(number)


def _of_rank(tensors: Tensors, old: int, rank: int) -> Tensors:
    """Repeat the rows of rank, each time with other vectors of the bank.

    The bank is scaled so that B @ A stays as large as it was: it goes with the bank's square and
    the root of the rank.
    """
    rng = np.random.default_rng(rank)
    orders = [rng.permutation(len(tensors[_BANK])) for _ in range(-(-rank // old))]
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name == _BANK:
            found[name] = (tensor * (old / rank) ** 0.25).astype(tensor.dtype)
            continue
        axis = 0 if _LOGITS_A in name else 1
        is_indices = name.endswith(_INDICES)
        copies = [order[tensor].astype(tensor.dtype) if is_indices else tensor for order in orders]
        found[name] = np.concatenate(copies, axis).take(range(rank), axis)
    return found
