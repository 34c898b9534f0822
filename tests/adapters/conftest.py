"""A tiny random Llama on disk, and adapters that PEFT itself has written for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft_oracle import TinyLlama, save_lora, save_vblora
from store_children import numbered_adapter

from adapters import AdapterStore, CompactLoRA
from core.model_config import BaseInfo, read_base_info


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are tiny; threads would only cost."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return TinyLlama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base(llama: TinyLlama) -> BaseInfo:
    return read_base_info(llama.path)


@pytest.fixture
def store(tmp_path: Path, base: BaseInfo) -> AdapterStore:
    return AdapterStore.open(tmp_path / "store", base)


@pytest.fixture(scope="session")
def vblora_dirs(llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three different VB-LoRA adapters; the first two share their bank."""
    root = tmp_path_factory.mktemp("vblora")
    seeds = ((1, 1), (2, 1), (3, 3))  # of the logits, of the bank
    for logits_seed, bank_seed in seeds:
        save_vblora(llama, root / str(logits_seed), seed=logits_seed, bank_seed=bank_seed)
    return [root / str(seed) for seed, _ in seeds]


@pytest.fixture(scope="session")
def lora_dir(llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "lora"
    save_lora(llama, path)
    return path


@pytest.fixture
def numbered(base: BaseInfo) -> Callable[[int], CompactLoRA]:
    """Small adapters by number."""
    return lambda number: numbered_adapter(number, base)


@pytest.fixture
def vblora(vblora_dirs: list[Path], tmp_path: Path) -> Path:
    """A copy of a VB-LoRA adapter, to be damaged."""
    return Path(shutil.copytree(vblora_dirs[0], tmp_path / "vblora"))
