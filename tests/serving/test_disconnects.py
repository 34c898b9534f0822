"""A client that goes away over a real socket ends its requests in the engine, at once."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from http_client import BASE

from serving.http.services import Services


async def until(condition, seconds: float = 5.0) -> float:
    """Seconds until `condition()`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it never happened"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


def bodies(stream: bool, num_prompts: int) -> list[tuple[str, dict]]:
    shared = {"model": BASE, "max_tokens": 200, "ignore_eos": True, "stream": stream}
    return [
        ("/v1/completions", {**shared, "prompt": ["Hello"] * num_prompts}),
        (
            "/v1/chat/completions",
            {**shared, "messages": [{"role": "user", "content": "Hello"}], "n": num_prompts},
        ),
    ]


@pytest.mark.parametrize("route", [0, 1])
@pytest.mark.parametrize("num_prompts", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_while_tokens_come(
    start_server, engine: FakeEngine, stream, num_prompts, route
):
    engine.seconds_per_step = 0.02
    path, body = bodies(stream, num_prompts)[route]
    async with httpx.AsyncClient(base_url=start_server()) as client:
        if stream:
            async with client.stream("POST", path, json=body) as response:
                assert response.status_code == 200
                async for _ in response.aiter_lines():
                    break
        else:
            with suppress(httpx.ReadTimeout):
                await client.post(path, json=body, timeout=0.3)
    seconds = await until(lambda: len(engine.aborted) == num_prompts)
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)
    assert engine.finished == []
    assert seconds < 1, "aborted, but not at once"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_while_its_request_waits(start_server, engine, stream):
    engine.seconds_per_step = 60.0  # the first token is far away
    path, body = bodies(stream, 1)[0]
    async with httpx.AsyncClient(base_url=start_server()) as client:
        with suppress(httpx.ReadTimeout):
            await client.post(path, json=body, timeout=0.3)
    assert await until(lambda: engine.aborted) < 1
    assert len(engine.requests) == 1


async def test_a_client_that_goes_between_two_slow_tokens(start_server, engine):
    """Nothing is being sent when it goes: only watching the connection tells."""
    engine.seconds_per_step = 0.4
    path, body = bodies(True, 1)[0]
    async with (
        httpx.AsyncClient(base_url=start_server()) as client,
        client.stream("POST", path, json=body) as response,
    ):
        async for _ in response.aiter_lines():
            break
    assert await until(lambda: engine.aborted) < 0.35


async def test_a_reader_that_stops_reading_and_goes(start_server, engine):
    """The server may be stuck in sending when the connection breaks."""
    engine.seconds_per_step = 0.01
    url = httpx.URL(start_server())
    reader, writer = await asyncio.open_connection(url.host, url.port, limit=1024)
    path, body = bodies(True, 100)[0]
    content = json.dumps({**body, "logprobs": 20, "return_token_ids": True}).encode()
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    await writer.drain()
    await reader.readexactly(100)
    await asyncio.sleep(0.5)
    writer.transport.abort()
    await until(lambda: len(engine.aborted) == 100)
    assert engine.finished == []


async def test_an_upload_that_breaks_off_leaves_nothing(
    start_server, services: Services, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    url = httpx.URL(start_server())
    _, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(
        b"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n"
        b"Content-Type: multipart/form-data; boundary=frontier\r\n\r\n--frontier\r\n"
        b'Content-Disposition: form-data; name="files"; filename="a.json"\r\n\r\n'
        + b"x"
        * 2_000_000
    )
    await writer.drain()
    await until(lambda: any((tmp_path / "spool").rglob("a.json")))
    writer.transport.abort()
    await until(lambda: not any((tmp_path / "spool").iterdir()))
    assert len(services.store.records()) == 1
