"""The engine on a simulated GPU: all that a step computes with is on one device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_runs import greedy, request, run_all
from memory_factors import MemoryFactorSource
from simulated_cuda import CPU, CUDA, device_of, simulated_cuda
from tiny_models import random_prompt, small_engine
from transformers_oracle import assert_same_greedy, reference_greedy

from core.engine import Engine
from core.engine_config import EngineConfig
from core.factors import AdapterFactors, LowRankPair
from core.loading import load_engine, resolve_placement
from core.requests import FinishReason, SamplingParams
from core.torch_layers import TorchLayers

FREE_BYTES = 1 << 22


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from simulated_cuda(monkeypatch, FREE_BYTES)


def on_cuda(factors: AdapterFactors) -> AdapterFactors:
    pairs = {
        key: LowRankPair(pair.a_RI.to("cuda"), pair.b_RO.to("cuda"), pair.scale)
        for key, pair in factors.pairs.items()
    }
    return AdapterFactors(factors.digest, pairs, factors.num_bytes)


def cuda_engine(path: Path, source: MemoryFactorSource | None = None) -> Engine:
    return small_engine(path, source, device="auto", dtype="float32", num_pages=200)


def test_the_simulation_refuses_what_cuda_refuses(cuda: None) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert (there * 2).device == CUDA and there[torch.tensor([0])].device == CUDA
    assert there.cpu().device == CPU and there.to("cpu").device == CPU
    assert [row.device for row in torch.ones(2, 2, device="cuda")] == [CUDA, CUDA]
    for mixed in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: there.index_copy_(0, torch.tensor([0]), there[:1].clone()),
    ):
        with pytest.raises(RuntimeError, match="one device"):
            mixed()


def test_auto_is_bfloat16_on_cuda_with_a_share_of_the_free_memory(
    cuda: None, tiny_path: Path
) -> None:
    assert resolve_placement(EngineConfig()) == (torch.device("cuda"), torch.bfloat16)
    engine = load_engine(tiny_path, EngineConfig())
    stats = engine.stats()
    assert 0.5 * FREE_BYTES < stats.kv_bytes_total <= 0.6 * FREE_BYTES
    assert stats.device_bytes == 1
    assert isinstance(engine.model.layers, TorchLayers)
    weights = engine.model.weights
    assert {device_of(t) for t in (weights.embedding_VH, weights.norm_H)} == {CUDA}
    results = run_all(engine, [request("a", random_prompt(1, 9))])
    assert results["a"].finish_reason is FinishReason.LENGTH


def test_a_step_holds_more_tokens_than_on_the_cpu(cuda: None, tiny_path: Path) -> None:
    engine = load_engine(tiny_path, EngineConfig())
    for n in range(3):
        engine.add(request(str(n), random_prompt(n, 200), greedy(2)))
    assert [output.request_id for output in engine.step()] == ["0", "1", "2"]  # on the CPU two


def test_a_mixed_batch_stays_on_the_device_and_equals_the_oracle(
    tiny_path: Path, reference, adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked prompts, decodes, shared pages, the base and adapters of mixed ranks and targets."""
    digests = [None, *adapters, None, *adapters]
    prompts = [random_prompt(n % 7, 5 + 11 * (n % 7)) for n in range(len(digests))]
    expected = [
        reference_greedy(reference, prompt, 8, None if digest is None else adapters[digest])
        for prompt, digest in zip(prompts, digests, strict=True)
    ]
    for _ in simulated_cuda(monkeypatch, FREE_BYTES):
        source = MemoryFactorSource.of(*(on_cuda(factors) for factors in adapters.values()))
        engine = cuda_engine(tiny_path, source)
        results = run_all(
            engine,
            [
                request(str(n), prompt, greedy(8), digest)
                for n, (prompt, digest) in enumerate(zip(prompts, digests, strict=True))
            ],
        )
    for n, wanted in enumerate(expected):
        assert_same_greedy(results[str(n)].token_ids, wanted)


def test_sampling_and_logprobs_on_the_device(cuda: None, tiny_path: Path) -> None:
    ways = {
        "random": SamplingParams(temperature=0.9, seed=1, max_tokens=6),
        "filtered": SamplingParams(temperature=0.9, top_k=9, top_p=0.8, min_p=0.01, seed=2),
        "adjusted": SamplingParams(
            temperature=0.5, presence_penalty=0.5, frequency_penalty=0.2, logit_bias={5: 3.0}
        ),
        "logprobs": SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, max_tokens=4),
    }
    engine = cuda_engine(tiny_path)
    results = run_all(engine, [request(name, random_prompt(3, 20), p) for name, p in ways.items()])
    for name in ways:
        assert results[name].finish_reason in (FinishReason.LENGTH, FinishReason.STOP), name
    assert len(results["logprobs"].logprobs) == 4
