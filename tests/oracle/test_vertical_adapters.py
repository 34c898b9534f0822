"""PEFT's adapters over a vertical base: tokens are PEFT's over the Llama that it stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft_oracle import LlamaOnDisk, save_lora, save_vblora
from test_peft_parity import VBLORA_CASES
from test_peft_tokens import Case, references, run_mixed, write_word_tokenizer
from tiny_models import random_prompt
from vertical_models import write_expanded, write_vertical_llama

from core import EngineConfig


@pytest.fixture(scope="module")
def vertical(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Path], list[Case]]:
    """A vertical base, adapters that PEFT saved over its expansion, and PEFT's own tokens."""
    root = tmp_path_factory.mktemp("vertical")
    base = write_vertical_llama(root / "base", chunk_sizes=(2, 3), intermediate_size=128, std=0.05)
    write_word_tokenizer(base, 128)
    plain = LlamaOnDisk(write_expanded(root / "plain", base))
    for number, (name, settings) in enumerate(VBLORA_CASES.items()):
        save_vblora(plain, root / f"vblora-{name}", seed=number, bank_limit=0.5, **settings)
    save_lora(plain, root / "lora", r=8)
    save_lora(plain, root / "lora-dora", r=3, use_dora=True)
    directories = {path.name: path for path in sorted(root.glob("*lora*"))}
    prompts = [random_prompt(1, 5), random_prompt(2, 37)]
    return base, directories, references(plain.path, directories, prompts)


@pytest.mark.parametrize("way", ["factored", "expanded"])
@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "torch"])
def test_all_configurations_in_one_batch(
    vertical: tuple[Path, dict[str, Path], list[Case]], way: str, compiled: bool, tmp_path: Path
) -> None:
    base, directories, cases = vertical
    config = EngineConfig(
        max_num_batched_tokens=96, max_num_seqs=80, compiled_kernels=compiled, vertical=way
    )
    run_mixed(base, directories, cases, tmp_path / "store", config)
