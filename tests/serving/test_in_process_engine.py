"""The HTTP application over a real engine in this process, with real adapters."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from http_client import BASE, client_of
from transformers import LlamaForCausalLM

from adapters.factor_cache import FactorCache
from adapters.store import AdapterStore
from core.engine import Engine
from core.engine_config import EngineConfig
from core.errors import EngineOverloadedError, InvalidRequestError
from core.loading import load_engine
from core.requests import FinishReason, GenerationRequest, SamplingParams
from serving.engine_client import EngineDiedError
from serving.http.services import Services
from serving.in_process_engine import InProcessEngineClient
from serving.metrics import AdapterLabels, EngineMetrics, EngineState

NUM_TOKENS = 12
ENDLESS = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0)


@pytest.fixture
def cache(store: AdapterStore) -> AsyncIterator[FactorCache]:
    cache = FactorCache(
        store.load, budget_bytes=1 << 20, device=torch.device("cpu"), dtype=torch.float32
    )
    yield cache
    cache.close()


@pytest.fixture
def real_engine(tiny_model: Path, cache: FactorCache) -> Engine:
    config = EngineConfig(
        device="cpu", dtype="float32", kv_cache_bytes=1 << 22, max_waiting=4, max_num_seqs=4
    )
    return load_engine(tiny_model, config, cache)


@pytest.fixture
async def engines(real_engine: Engine, cache: FactorCache) -> AsyncIterator[InProcessEngineClient]:
    metrics = EngineMetrics(AdapterLabels(BASE, 4), EngineState)
    async with InProcessEngineClient(real_engine, metrics=metrics) as engines:
        cache.set_on_ready(engines.wake)
        yield engines


@pytest.fixture
def real_services(services: Services, engines: InProcessEngineClient) -> Services:
    return dataclasses.replace(services, engines=engines)


def greedy(tiny_model: Path, prompt: list[int]) -> list[int]:
    """The slow twin: transformers' own generation."""
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


async def test_served_tokens_are_those_of_transformers(
    real_services: Services, tiny_model: Path, tokenizer: Any
):
    prompt = tokenizer.encode("The quick brown")
    body = {
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "min_tokens": NUM_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
    }
    async with client_of(real_services) as client:
        answers = await asyncio.gather(
            *(
                client.post("/v1/completions", json={"model": name, **body})
                for name in (BASE, "team/one", BASE)
            )
        )
    base, adapter, again = (answer.json()["choices"][0] for answer in answers)
    assert base["token_ids"] == again["token_ids"] == greedy(tiny_model, prompt)
    assert adapter["token_ids"] != base["token_ids"]
    assert base["text"] == tokenizer.decode(base["token_ids"], skip_special_tokens=True)


async def test_scores_of_a_prompt_are_those_of_transformers(
    real_services: Services, tiny_model: Path, tokenizer: Any
):
    prompt = tokenizer.encode("The quick brown fox")
    body = {"model": BASE, "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
    async with client_of(real_services) as client:
        answer = (await client.post("/v1/completions", json=body)).json()
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(tiny_model)(torch.tensor([prompt])).logits[0]
    expected = logits.log_softmax(-1)[range(len(prompt) - 1), prompt[1:]].tolist()
    logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert logprobs[0] is None
    assert logprobs[1:] == pytest.approx(expected, abs=1e-4)


async def test_closing_frees_everything_within_a_step(
    engines: InProcessEngineClient, real_engine: Engine, cache: FactorCache, store: AdapterStore
):
    digest = store.resolve("team/one").digest
    outputs = engines.generate(GenerationRequest("r", (1, 2, 3), ENDLESS, digest))
    await anext(outputs)
    assert real_engine.stats().kv_bytes_used > 0
    assert cache.stats.num_leases == 1
    await outputs.aclose()
    for _ in range(100):
        if real_engine.stats().num_running == 0 and cache.stats.num_leases == 0:
            break
        await asyncio.sleep(0.01)
    assert real_engine.stats().num_running == 0
    assert real_engine.stats().kv_bytes_used == 0
    assert cache.stats.num_leases == 0


async def test_refusals_come_before_the_first_output(engines: InProcessEngineClient):
    with pytest.raises(InvalidRequestError):
        await anext(engines.generate(GenerationRequest("r", ())))
    running = [
        asyncio.ensure_future(anext(engines.generate(GenerationRequest(f"r{n}", (1,), ENDLESS))))
        for n in range(40)
    ]
    results = await asyncio.gather(*running, return_exceptions=True)
    assert any(isinstance(result, EngineOverloadedError) for result in results)


async def test_an_engine_that_stops_ends_its_requests(real_engine: Engine):
    async with InProcessEngineClient(real_engine) as engines:
        assert await engines.ready()
        outputs = engines.generate(GenerationRequest("r", (1, 2), ENDLESS))
        await anext(outputs)
    reasons = [output.finish_reason async for output in outputs]
    assert reasons[-1] is FinishReason.ABORT
    assert not await engines.ready()
    with pytest.raises(EngineDiedError):
        await anext(engines.generate(GenerationRequest("s", (1, 2), ENDLESS)))


async def test_an_engine_that_breaks_is_lost(
    engines: InProcessEngineClient, real_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    def broken() -> None:
        raise RuntimeError("a secret of the inside")

    outputs = engines.generate(GenerationRequest("r", (1, 2), ENDLESS))
    await anext(outputs)
    monkeypatch.setattr(real_engine, "step", broken)
    with pytest.raises(EngineDiedError) as died:
        async for _ in outputs:
            pass
    assert "secret" not in str(died.value)
    assert not await engines.ready()


async def test_metrics_follow_the_requests(real_services: Services, engines: InProcessEngineClient):
    body = {"model": "team/one", "prompt": "Hello", "max_tokens": 5, "ignore_eos": True}
    async with client_of(real_services) as client:
        await client.post("/v1/completions", json=body)
        text = (await client.get("/metrics")).text
    line = next(row for row in text.splitlines() if row.startswith("vbserve_generation_tokens"))
    assert line.endswith(" 5.0")
    assert 'replica="engine"' in line
