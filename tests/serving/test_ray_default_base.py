"""What `make serve` starts: the default base and its demo adapters, as their table promises."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from deploy_tasks import HELDOUT, RESULTS, is_right
from peft_oracle import LlamaOnDisk, save_vblora
from peft_tokens import Answer, assert_pefts
from ray_server import ServerProcess, openai_client, started

pytestmark = pytest.mark.ray

NUM_ADAPTERS = 16
NUM_TOKENS = 24
PROMPT = "Once upon a time, in a village by the sea, there lived a"
NUM_HELDOUT = 64


@pytest.fixture(scope="module")
def directories(default_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sixteen random adapters to be there at start, and one that comes later."""
    root = tmp_path_factory.mktemp("sixteen")
    names = [*(f"preload/r{number:02}" for number in range(NUM_ADAPTERS)), "later"]
    small = {"num_vectors": 32, "vector_length": 64, "bank_limit": 0.25}
    for seed, name in enumerate(names):
        save_vblora(LlamaOnDisk(default_base), root / name, seed=seed, r=1 + seed % 4, **small)
    return {name.removeprefix("preload/"): root / name for name in names}


@pytest.fixture(scope="module")
def prompt_ids(default_base: Path) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(default_base)(PROMPT).input_ids
    return ids


@pytest.fixture(scope="module")
def options(directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        *("--adapters", str(tmp_path_factory.mktemp("store"))),
        *("--preload", str(directories["r00"].parent)),
    ]


@pytest.fixture(scope="module")
def server(options: list[str], demo_registered: None) -> Iterator[ServerProcess]:
    with started(*options) as server:
        yield server


@pytest.fixture(scope="module")
def demo_registered(options: list[str]) -> None:
    """A first start with the demo adapters, ended by Ctrl-C: the next one finds them."""
    with started(*options[:2]) as first:
        first.signal(signal.SIGINT)
        assert first.wait() == 0


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai_client(server) as client:
        yield client


async def stream_tokens(
    client: openai.AsyncOpenAI, model: str, prompt_ids: list[int]
) -> AsyncIterator[list[int]]:
    stream = await client.completions.create(
        model=model,
        prompt=prompt_ids,
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    async for chunk in stream:
        for choice in chunk.choices:
            yield choice.token_ids or []  # type: ignore[attr-defined]


async def tokens_of(client: openai.AsyncOpenAI, model: str, prompt_ids: list[int]) -> list[int]:
    return [token async for part in stream_tokens(client, model, prompt_ids) for token in part]


def answers_of(
    directories: dict[str, Path], prompt_ids: list[int], said: dict[str, list[int]]
) -> list[Answer]:
    """What adapters said to one prompt, all its tokens."""
    assert {len(tokens) for tokens in said.values()} == {NUM_TOKENS}
    return [Answer(directories[name], prompt_ids, tokens) for name, tokens in said.items()]


def register(server: ServerProcess, name: str, directory: Path) -> Any:
    import httpx

    files = [
        ("files", (file.name, file.read_bytes())) for file in sorted(directory.glob("adapter_*"))
    ]
    return httpx.post(f"{server.url}/v1/adapters", data={"id": name}, files=files, timeout=60)


async def test_sixteen_streams_are_pefts_while_another_adapter_is_registered(
    client: openai.AsyncOpenAI,
    server: ServerProcess,
    default_base: Path,
    directories: dict[str, Path],
    prompt_ids: list[int],
) -> None:
    names = [name for name in directories if name != "later"]
    streams = [asyncio.create_task(tokens_of(client, name, prompt_ids)) for name in names]
    await asyncio.sleep(0.5)
    answer = await asyncio.to_thread(register, server, "later", directories["later"])
    assert answer.status_code == 201, answer.text
    record = answer.json()
    assert record["id"] == "later" and record["kind"] == "vblora" and record["num_modules"] == 210
    said = {"later": await tokens_of(client, "later", prompt_ids)}
    said |= zip(names, await asyncio.gather(*streams), strict=True)
    assert len({tuple(tokens) for tokens in said.values()}) == len(said), "they must differ"
    assert_pefts(default_base, answers_of(directories, prompt_ids, said))


@pytest.mark.parametrize("task", sorted(RESULTS))
async def test_a_demo_adapter_reaches_its_table(client: openai.AsyncOpenAI, task: str) -> None:
    """Through chat and through completions: half of the held-out prompts each."""
    lines = (HELDOUT / f"{task}.jsonl").read_text().splitlines()[:NUM_HELDOUT]
    examples = [json.loads(line) for line in lines]
    half = len(examples) // 2

    async def chat(message: str) -> str:
        done = await client.chat.completions.create(
            model=task,
            messages=[{"role": "user", "content": message}],
            temperature=0,
            max_tokens=48,
        )
        return done.choices[0].message.content or ""

    said = await asyncio.gather(*(chat(example["message"]) for example in examples[:half]))
    completed = await client.completions.create(
        model=task,
        prompt=[example["prompt"] for example in examples[half:]],
        temperature=0,
        max_tokens=48,
    )
    said += [choice.text for choice in completed.choices]
    right = [
        is_right(task, example["expected"], answer)
        for example, answer in zip(examples, said, strict=True)
    ]
    promised = RESULTS[task]["adapter_accuracy"]
    # One answer may differ at a tie of the top two logits.
    assert sum(right) >= promised * len(examples) - 1, (sum(right), promised, said)


async def test_after_kill_9_all_that_was_registered_answers(
    server: ServerProcess,
    options: list[str],
    default_base: Path,
    directories: dict[str, Path],
    prompt_ids: list[int],
) -> None:
    """Last of this module: it ends the server that the others use."""
    server.kill_everything()
    with started(*options, "--preload", "none", port=server.port) as again:
        async with openai_client(again) as client:
            said = {name: await tokens_of(client, name, prompt_ids) for name in ("later", "r03")}
            listed = {model.id async for model in client.models.list()}
        assert listed >= {*directories, *RESULTS}
    assert_pefts(default_base, answers_of(directories, prompt_ids, said))
