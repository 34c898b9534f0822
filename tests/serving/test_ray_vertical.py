"""A vertical base that was trained as one (deploy/vertical), served end to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from peft_oracle import LlamaOnDisk, save_vblora
from peft_tokens import peft_greedy
from ray_server import ServerProcess, openai_client, started
from test_ray_default_base import NUM_TOKENS, register, tokens_of
from transformers_oracle import ReferenceGreedy, assert_same_greedy
from vertical_models import write_expanded

pytestmark = pytest.mark.ray

MODEL = Path(__file__).parents[2] / "deploy" / "vertical" / "model"
PROMPT = "The import statement"
ADAPTERS = ("own", "other")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_expanded(tmp_path_factory.mktemp("vertical") / "plain", MODEL)


@pytest.fixture(scope="module")
def directories(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(ADAPTERS):
        save_vblora(LlamaOnDisk(plain), root / name, seed=seed, vector_length=32, bank_limit=0.25)
    return {name: root / name for name in ADAPTERS}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    with started("--model", str(MODEL), "--model-name", "v", "--adapters", str(store)) as server:
        yield server


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai_client(server) as client:
        yield client


async def test_base_and_adapters_in_one_batch_are_pefts(
    client: openai.AsyncOpenAI,
    server: ServerProcess,
    plain: Path,
    directories: dict[str, Path],
) -> None:
    prompt = [byte + 2 for byte in PROMPT.encode()]
    expected: dict[str, ReferenceGreedy] = {}
    for name, path in {"v": None, **directories}.items():
        (expected[name],) = peft_greedy(plain, path, [prompt], NUM_TOKENS)
        if path is not None:
            answer = await asyncio.to_thread(register, server, name, path)
            assert answer.status_code == 201, answer.text
    streams = [tokens_of(client, name, prompt) for name in expected]
    for reference, tokens in zip(expected.values(), await asyncio.gather(*streams), strict=True):
        assert_same_greedy(tokens, reference)


async def test_it_has_learnt_its_text(client: openai.AsyncOpenAI) -> None:
    """Words of the language reference, which 26 letters at random are not."""
    done = await client.completions.create(model="v", prompt=PROMPT, max_tokens=80, temperature=0)
    words = done.choices[0].text.split()
    assert len(words) >= 5
    assert {"the", "a", "is", "of", "to", "and", "in"} & set(words)


def test_resident_weights_are_the_checkpoints_share(server: ServerProcess, plain: Path) -> None:
    """The page of metrics tells the base's bytes: near the checkpoint's share of the full model."""
    whole = (plain / "model.safetensors").stat().st_size
    held = server.metric("vbserve_base_weights_bytes")
    assert held < 0.5 * whole
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "v"
