"""Real PEFT directories through store, cache and engine: in mixed batches the tokens are PEFT's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import LlamaOnDisk, TinyLlama, save_lora, save_vblora
from peft_tokens import Answer, assert_pefts, peft_greedy
from test_lora_variants import DORA_CASES
from test_lowered import CASES as LOWERED_CASES
from test_lowered import save_lowered
from test_peft_parity import LORA_CASES, VBLORA_CASES
from tiny_models import random_prompt
from transformers_oracle import ReferenceGreedy, assert_same_greedy

from adapters import AdapterStore, FactorCache
from core import LLM, EngineConfig, SamplingParams, read_base_info

NUM_TOKENS = 12

DEFAULT_BASE_CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "paper": (save_vblora, {"num_vectors": 256, "vector_length": 96}),
    "logits": (
        save_vblora,
        {"num_vectors": 64, "vector_length": 192, "save_only_topk_weights": False},
    ),
    "k3": (save_vblora, {"topk": 3, "r": 2, "num_vectors": 300, "vector_length": 64}),
    "k1_qv": (
        save_vblora,
        {"topk": 1, "vector_length": 64, "target_modules": ["q_proj", "v_proj"]},
    ),
    "bf16": (
        save_vblora,
        {"dtype": torch.bfloat16, "save_only_topk_weights": False, "vector_length": 32},
    ),
    "rslora": (save_lora, {"r": 8, "lora_alpha": 4, "use_rslora": True}),
    "dora": (save_lora, {"use_dora": True, "r": 8}),
    "lora_mlp": (
        save_lora,
        {"target_modules": ["gate_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
    ),
}


@dataclass(frozen=True)
class Case:
    adapter: str | None
    prompt: tuple[int, ...]
    expected: ReferenceGreedy


def generate_mixed(
    base: Path,
    directories: dict[str, Path],
    asked: Sequence[tuple[str | None, Sequence[int]]],
    store: Path,
    config: EngineConfig,
) -> list[Sequence[int]]:
    """Register all, then the tokens for all of `asked`, adapters and prompts, in one batch."""
    adapters = AdapterStore.open(store, read_base_info(base))
    digests: dict[str | None, str | None] = {None: None}
    for name, directory in directories.items():
        digests[name] = adapters.add(name, directory).record.digest
    with closing(FactorCache(adapters.load, budget_bytes=1 << 28)) as cache:
        llm = LLM(base, config, factor_source=cache)
        done = llm.generate(
            [prompt for _, prompt in asked],
            SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True),
            adapters=[digests[name] for name, _ in asked],
        )
        llm.engine.check_integrity()
        cache.check_integrity()
    return [completion.token_ids for completion in done]


def run_mixed(
    base: Path,
    directories: dict[str, Path],
    cases: Sequence[Case],
    store: Path,
    config: EngineConfig,
) -> None:
    """As `generate_mixed`, compared with each case's reference."""
    asked = [(case.adapter, case.prompt) for case in cases]
    for case, tokens in zip(
        cases, generate_mixed(base, directories, asked, store, config), strict=True
    ):
        assert_same_greedy(tokens, case.expected)


def references(
    base: Path, directories: dict[str, Path], prompts: Sequence[tuple[int, ...]]
) -> list[Case]:
    found = []
    for name in (None, *directories):
        path = None if name is None else directories[name]
        tokens = peft_greedy(base, path, prompts, NUM_TOKENS)
        found += [Case(name, *pair) for pair in zip(prompts, tokens, strict=True)]
    return found


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, Path], list[Case]]]:
    """Every configuration of the parity tests on a tiny random Llama, with PEFT's own tokens."""
    root = tmp_path_factory.mktemp("oracle")
    llama = TinyLlama(root / "base")
    # LLM wants a tokenizer; ids are all that is used here.
    write_word_tokenizer(llama.path, 128)
    for number, (name, settings) in enumerate(VBLORA_CASES.items()):
        save_vblora(llama, root / f"vblora-{name}", seed=number, **settings)
    for number, (name, settings) in enumerate(LORA_CASES.items()):
        save_lora(llama, root / f"lora-{name}", seed=number, **settings)
    for number, (name, settings) in enumerate(DORA_CASES.items()):
        save_lora(llama, root / f"lora-{name}", seed=number, use_dora=True, **settings)
    for name, (kind, settings) in LOWERED_CASES.items():
        save_lowered(llama, root / f"lora-{name}", kind, **settings)
    directories = {path.name: path for path in sorted(root.glob("*lora-*"))}
    prompts = [random_prompt(1, 5), random_prompt(2, 37)]
    yield llama.path, directories, references(llama.path, directories, prompts)


def write_word_tokenizer(path: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{number}": number for number in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "torch"])
def test_all_configurations_in_one_batch(
    tiny: tuple[Path, dict[str, Path], list[Case]], tmp_path: Path, compiled: bool
) -> None:
    base, directories, cases = tiny
    config = EngineConfig(max_num_batched_tokens=96, max_num_seqs=80, compiled_kernels=compiled)
    run_mixed(base, directories, cases, tmp_path / "store", config)


def test_all_configurations_under_memory_pressure(
    tiny: tuple[Path, dict[str, Path], list[Case]], tmp_path: Path
) -> None:
    """Pages for a third of the batch, so that sequences are preempted and computed again."""
    base, directories, cases = tiny
    page_bytes = 16 * 2 * 2 * 2 * 16 * 4
    config = EngineConfig(
        max_num_batched_tokens=96, max_num_seqs=80, kv_cache_bytes=40 * page_bytes
    )
    run_mixed(base, directories, cases, tmp_path / "store", config)


def test_default_base_in_one_batch(default_base: Path, tmp_path: Path) -> None:
    directories = {}
    for number, (name, (save, settings)) in enumerate(DEFAULT_BASE_CASES.items()):
        directories[name] = tmp_path / name
        small = {"num_vectors": 32, "bank_limit": 0.25} if save is save_vblora else {}
        save(LlamaOnDisk(default_base), directories[name], seed=number, **{**small, **settings})
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_base)
    prompts = [
        tuple(tokenizer(text).input_ids)
        for text in ("The capital of France is", "def fibonacci(n):\n    ")
    ]
    asked = [(name, prompt) for name in (None, *directories) for prompt in prompts]
    config = EngineConfig(max_num_seqs=32)
    said = generate_mixed(default_base, directories, asked, tmp_path / "store", config)
    answers = [
        Answer(None if name is None else directories[name], prompt, tokens)
        for (name, prompt), tokens in zip(asked, said, strict=True)
    ]
    assert {len(answer.token_ids) for answer in answers} == {NUM_TOKENS}
    assert_pefts(default_base, answers)
