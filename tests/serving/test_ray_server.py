"""The real thing: `vbserve serve` with two engine and two ingress replicas, killed in parts.

One server for all tests but the last ones. What it generates is held to PEFT, one model per
adapter.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from ray_model import MAX_MODEL_LEN, Oracle, save_model
from ray_server import ServerProcess, openai_client, started, wait_until
from tiny_model import save_vblora

pytestmark = pytest.mark.ray

PROMPT = [5, 6, 7, 8, 9]
NUM_TOKENS = 24
LONG = MAX_MODEL_LEN - 100  # a stream that is still running when something happens to it
GREEDY: dict[str, Any] = {
    "temperature": 0,
    "extra_body": {"ignore_eos": True, "return_token_ids": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "slow-llama"
    save_model(path)
    return path


@pytest.fixture(scope="module")
def adapters(model: Path) -> Path:
    """PEFT directories: four that are there at start, one that comes later."""
    for seed, name in enumerate(("a0", "a1", "a2", "a3")):
        save_vblora(model, model.parent / "preload" / name, seed=seed)
    save_vblora(model, model.parent / "later", seed=9)
    return model.parent / "preload"


@pytest.fixture(scope="module")
def expected(model: Path, adapters: Path) -> dict[str, list[int]]:
    """What each model says to PROMPT."""
    oracle = Oracle(model)
    directories = {path.name: path for path in (*adapters.iterdir(), model.parent / "later")}
    tokens = {name: oracle.tokens(PROMPT, NUM_TOKENS, path) for name, path in directories.items()}
    tokens[model.name] = oracle.tokens(PROMPT, NUM_TOKENS)
    assert len({tuple(said) for said in tokens.values()}) == len(tokens), "they must differ"
    return tokens


@pytest.fixture(scope="module")
def options(model: Path, adapters: Path) -> list[str]:
    """One replica of each kind; room for all long streams, so that none is preempted."""
    paths = {"--model": model, "--adapters": model.parent / "store", "--preload": adapters}
    pairs = [*paths.items(), ("--num-threads", 1), ("--kv-cache-bytes", "512MiB")]
    return [str(word) for pair in pairs for word in pair]


@pytest.fixture(scope="module")
def server(options: list[str]) -> Iterator[ServerProcess]:
    two = ["--num-engine-replicas", "2", "--num-ingress-replicas", "2"]
    with started(*options, *two) as server:
        yield server


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai_client(server) as client:
        yield client


async def complete(client: openai.AsyncOpenAI, model: str, num_tokens: int = NUM_TOKENS) -> Any:
    return await client.completions.create(
        model=model, prompt=PROMPT, max_tokens=num_tokens, **GREEDY
    )


async def tokens_of(client: openai.AsyncOpenAI, model: str) -> list[int]:
    answer = await complete(client, model)
    tokens: list[int] = answer.choices[0].token_ids
    return tokens


def add_over_http(
    server: ServerProcess, adapter_id: str, directory: Path
) -> subprocess.CompletedProcess[str]:
    command = ["adapters", "add", adapter_id, str(directory), "--url", server.url]
    return subprocess.run(
        [sys.executable, "-m", "serving.cli.main", *command], capture_output=True, text=True
    )


class Stream:
    """A streamed completion that is read in the background."""

    def __init__(self, client: openai.AsyncOpenAI, model: str, num_tokens: int) -> None:
        self.model, self.tokens = model, list[int]()
        self._client, self._num_tokens = client, num_tokens
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        stream = await self._client.completions.create(
            model=self.model, prompt=PROMPT, max_tokens=self._num_tokens, stream=True, **GREEDY
        )
        async for chunk in stream:
            for choice in chunk.choices:
                self.tokens += choice.token_ids

    async def begun(self) -> None:
        while not self.tokens:
            assert not self.task.done(), self.task
            await asyncio.sleep(0.02)

    async def end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, openai.OpenAIError):
            await self.task


def test_the_ready_line_names_the_models_and_its_curl_works(
    server: ServerProcess, model: Path
) -> None:
    server.wait_for("Ctrl-C stops the server.", 5)
    assert f"READY at {server.url}, serving {model.name}, a0, a1, a2, a3" in server.output
    command = server.output.partition("Try:")[2].partition("Ctrl-C")[0].replace("\\\n", " ")
    curl, url, _, header, _, body = shlex.split(command)
    assert curl == "curl"
    name, _, value = header.partition(": ")
    answer = httpx.post(url, content=body, headers={name: value}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"


def test_a_port_in_use_is_told_before_the_slow_start(
    server: ServerProcess, options: list[str]
) -> None:
    second = ServerProcess(*options, port=server.port)
    assert second.wait() == 1
    assert f"cannot listen on 127.0.0.1 port {server.port}" in second.output
    assert "✓" not in second.output


def test_no_process_runs_for_nobody(server: ServerProcess) -> None:
    """What Ray starts whatever it is told, and takes cores from the engines that wait for them."""
    titles = list(server.processes().values())
    assert any("ServeController" in title for title in titles)
    needless = ("log_monitor.py", "monitor.py", "dashboard.py")
    assert not [title for title in titles if any(name in title for name in needless)]


def test_nothing_unpickles_for_strangers(server: ServerProcess) -> None:
    """Serve's replicas listen for Ray's own calls on all addresses; they want the token."""
    for port in server.ports_open_to_others():
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as error:
                call(b"", timeout=20)
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED, (port, error.value)


async def test_base_and_adapters_match_peft_in_one_batch(
    client: openai.AsyncOpenAI, expected: dict[str, list[int]]
) -> None:
    names = [name for name in expected if name != "later"] * 4
    whole = asyncio.gather(*(tokens_of(client, name) for name in names))
    streams = [Stream(client, name, NUM_TOKENS) for name in names]
    await asyncio.gather(*(stream.task for stream in streams))
    assert {s.model: s.tokens for s in streams} == {name: expected[name] for name in names}
    assert await whole == [expected[name] for name in names]


async def test_an_unknown_model_is_not_the_base(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await complete(client, "no-such-adapter")


async def test_core_errors_arrive_as_themselves(client: openai.AsyncOpenAI) -> None:
    """Only the engine knows how long a sequence may be; the error crosses two processes."""
    with pytest.raises(openai.BadRequestError) as error:
        await client.completions.create(model="a0", prompt=PROMPT, max_tokens=MAX_MODEL_LEN)
    assert error.value.code == "context_length_exceeded"


async def test_registration_disturbs_no_stream_and_reaches_both_engines(
    client: openai.AsyncOpenAI, server: ServerProcess, model: Path, expected: dict[str, list[int]]
) -> None:
    streams = [Stream(client, f"a{n % 4}", LONG) for n in range(8)]
    await asyncio.gather(*(stream.begun() for stream in streams))
    done = await asyncio.to_thread(add_over_http, server, "later", model.parent / "later")
    assert done.stdout.startswith("later is registered"), done
    assert await tokens_of(client, "later") == expected["later"]
    answers = await asyncio.gather(*(tokens_of(client, "later") for _ in range(16)))
    assert answers == [expected["later"]] * 16
    for stream in streams:
        assert not stream.task.done(), stream.task
        assert len(stream.tokens) >= NUM_TOKENS
        assert stream.tokens[:NUM_TOKENS] == expected[stream.model]
        await stream.end()
    # While one engine has the long streams, the other may get all of these: ask on now.
    for replica in ("engine-0", "engine-1"):
        for _ in range(20):
            used = await asyncio.to_thread(
                server.metric, "vbserve_generation_tokens_total", adapter="later", replica=replica
            )
            if used:
                break
            answers = await asyncio.gather(*(tokens_of(client, "later") for _ in range(16)))
            assert answers == [expected["later"]] * 16
        assert used > 0, replica
    for ingress in ("ingress-0", "ingress-1"):
        answered = await asyncio.to_thread(
            server.metric, "vbserve_http_requests_total", replica=ingress
        )
        assert answered > 0, ingress


async def test_a_client_that_leaves_frees_its_sequence(
    client: openai.AsyncOpenAI, server: ServerProcess
) -> None:
    def aborted() -> float:
        return server.metric("vbserve_requests_total", outcome="abort")

    before = await asyncio.to_thread(aborted)
    streams = [Stream(client, "a1", LONG) for _ in range(6)]
    await asyncio.gather(*(stream.begun() for stream in streams))
    assert await asyncio.to_thread(server.metric, "vbserve_requests_running") == 6
    unary = asyncio.create_task(complete(client, "a2", LONG))
    await asyncio.to_thread(wait_until, lambda: server.metric("vbserve_requests_running") == 7, 10)
    for task in (*(stream.task for stream in streams), unary):
        task.cancel()
    await asyncio.to_thread(wait_until, lambda: server.metric("vbserve_requests_running") == 0, 10)
    assert await asyncio.to_thread(aborted) == before + 7


async def test_a_killed_engine_fails_its_own_requests_and_comes_back(
    client: openai.AsyncOpenAI, server: ServerProcess, expected: dict[str, list[int]]
) -> None:
    streams = [Stream(client, "a3", LONG) for _ in range(8)]
    await asyncio.gather(*(stream.begun() for stream in streams))
    whole = [asyncio.create_task(complete(client, "a2", LONG)) for _ in range(4)]
    await asyncio.to_thread(wait_until, lambda: server.metric("vbserve_requests_running") == 12, 10)
    victim = server.replicas("engine")[0]
    os.kill(victim, signal.SIGKILL)
    begun = time.monotonic()
    tasks = [*(stream.task for stream in streams), *whole]
    await asyncio.wait(tasks, timeout=10, return_when=asyncio.FIRST_EXCEPTION)
    assert time.monotonic() - begun < 10
    await asyncio.sleep(1)  # for the others that it ran
    failed = [task.exception() for task in tasks if task.done()]
    running = [stream for stream in streams if not stream.task.done()]
    assert failed
    assert {getattr(error, "code", None) for error in failed} == {"engine_unavailable"}, failed
    assert running, "the other engine's streams go on"
    for stream in running:
        assert stream.tokens[:NUM_TOKENS] == expected["a3"]
        await stream.end()
    for task in whole:
        task.cancel()
    # requests are served meanwhile, and by the new replica in the end
    assert await tokens_of(client, "later") == expected["later"]
    await asyncio.to_thread(
        wait_until,
        lambda: len(server.replicas("engine")) == 2 and victim not in server.replicas("engine"),
        60,
    )
    for name in expected:
        assert await tokens_of(client, name) == expected[name]


def test_ctrl_c_stops_everything(server: ServerProcess) -> None:
    """The last test on the shared server."""
    assert len(server.processes()) > 5
    server.signal(signal.SIGINT)
    assert server.wait() == 0, server.output
    assert "stopped" in server.output
    assert server.processes() == {}


def test_kill_9_of_everything_loses_no_adapter(
    options: list[str], model: Path, expected: dict[str, list[int]], tmp_path: Path
) -> None:
    """An adapter that was registered a moment before is there after a restart."""
    own_store = [*options, "--adapters", str(tmp_path / "store")]
    with started(*own_store) as server:
        done = add_over_http(server, "later", model.parent / "later")
        server.kill_everything()
    assert done.stdout.startswith("later is registered"), done
    with started(*own_store) as server:
        for name in ("later", "a0"):
            body = {"model": name, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
            more = {"ignore_eos": True, "return_token_ids": True}
            answer = httpx.post(f"{server.url}/v1/completions", json=body | more, timeout=60).json()
            assert answer["choices"][0]["token_ids"] == expected[name]
        server.terminate()
        assert server.wait() == 0
        assert server.processes() == {}


@pytest.mark.parametrize("stage", ["", "✓ Ray", "✓ adapters"])
def test_an_interrupted_start_leaves_nothing(options: list[str], stage: str) -> None:
    server = ServerProcess(*options)
    try:
        server.wait_for(stage)
        time.sleep(2)  # into the middle of the next stage
        server.signal(signal.SIGINT)
        server.wait()
        assert server.processes() == {}
    finally:
        server.kill_everything()
