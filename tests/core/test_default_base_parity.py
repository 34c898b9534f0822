"""The default base on real prompts: logits within 1e-4 of transformers', the same words."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from memory_factors import MemoryFactorSource, random_factors
from transformers import LlamaForCausalLM
from transformers_oracle import (
    assert_close_logits,
    assert_same_greedy,
    load_reference,
    reference_greedy,
    reference_logits,
)

from core import LLM, EngineConfig, SamplingParams
from core.batch import build_batch
from core.factors import AdapterFactors
from core.kv_storage import KVStorage
from core.requests import GenerationRequest
from core.sequence import Chunk, Sequence
from serving.default_base import DownloadFailedError, ensure_default_base

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "naïve café, 東京都, 🙂",
]


@pytest.fixture(scope="module")
def base() -> Path:
    try:
        return ensure_default_base()
    except DownloadFailedError as error:
        pytest.skip(f"the default base is not cached and can't be fetched: {error}")


@pytest.fixture(scope="module")
def reference(base: Path) -> LlamaForCausalLM:
    return load_reference(base)


@pytest.fixture(scope="module")
def llm(base: Path) -> Iterator[LLM]:
    source = MemoryFactorSource()
    config = EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=1 << 26)
    made = LLM(base, config, factor_source=source)
    source.known["random"] = random_factors(
        made.engine.model.config,
        "random",
        std=0.4,
        layers=(0, 9, 29),
        projections=("v_proj", "o_proj"),
    )
    yield made
    assert not made.engine.has_work


def known_factors(llm: LLM) -> AdapterFactors:
    lease = llm.engine.scheduler._factor_source.try_acquire("random")
    lease.release()
    return lease.factors


def engine_logits(llm: LLM, token_ids: list[int], sizes: list[int]) -> torch.Tensor:
    """Logits of all rows of one forward per chunk, over pages of 16."""
    model = llm.engine.model
    kv = KVStorage(model.config, 8, 16, model.device, model.dtype)
    sampling = SamplingParams(prompt_logprobs=0)
    seq = Sequence.start(GenerationRequest("x", tuple(token_ids), sampling), 0.0)
    seq.pages, start, parts = [5, 2, 7, 1], 0, []
    for size in sizes:
        batch = build_batch([Chunk(seq, start, size)], 16, model.device, with_lengths=False)
        parts.append(model.head.logits(model.forward(batch, kv)))
        start += size
    return torch.cat(parts)


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_logits_on_real_prompts(prompt: str, llm: LLM, reference) -> None:
    """A prompt's chunk and one token after it."""
    tokens = llm.tokenizer(prompt).input_ids
    own = engine_logits(llm, tokens, [len(tokens) - 1, 1])
    assert_close_logits(own, reference_logits(reference, tokens), 1e-4)


def test_greedy_words_of_base_and_adapter_in_one_batch(llm: LLM, reference) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    prompts = [PROMPTS[0], PROMPTS[0]]
    done = llm.generate(prompts, sampling, adapters=[None, "random"])
    for prompt, adapter, own in zip(prompts, (None, "random"), done, strict=True):
        factors = None if adapter is None else known_factors(llm)
        ids = llm.tokenizer(prompt).input_ids
        assert_same_greedy(own.token_ids, reference_greedy(reference, ids, 5, factors))
    assert "Paris" in done[0].text
    assert done[0].text != done[1].text
