"""The bodies of POST /v1/adapters: broken, too large, of unknown size, in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from http_client import client_of
from uploading import ADAPTERS, error_of, files_of, upload

from adapters.store import AdapterStore
from serving.http import bodies
from serving.http.services import Services

MULTIPART = {"content-type": "multipart/form-data; boundary=frontier"}


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"no multipart at all", MULTIPART),
        (b'--frontier\r\nContent-Disposition: form-data; name="id"\r\n\r\ntwo\r\n', MULTIPART),
        (b"", MULTIPART),
        (b"x", {"content-type": "multipart/form-data"}),
    ],
)
async def test_a_broken_multipart_body(client, content, headers):
    response = await client.post(ADAPTERS, content=content, headers=headers)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_multipart"


@pytest.mark.parametrize("announced", [True, False])
async def test_an_upload_over_the_cap_leaves_nothing_behind(
    services: Services, store: AdapterStore, tmp_path: Path, announced: bool
):
    spool = tmp_path / "spool"
    spool.mkdir()
    written: list[int] = []

    def body() -> Iterator[bytes]:
        yield (
            b'--frontier\r\nContent-Disposition: form-data; name="files"; '
            b'filename="adapter_model.safetensors"\r\n\r\n'
        )
        for _ in range(64):
            yield b"x" * 65536
            written.append(sum(f.stat().st_size for f in spool.rglob("*") if f.is_file()))
        yield b"\r\n--frontier--\r\n"

    async def in_pieces():
        for piece in body():
            yield piece

    content = b"".join(body()) if announced else in_pieces()
    access = {"max_upload_bytes": 1_000_000, "spool_directory": spool}
    async with client_of(services, **access) as client:
        response = await client.post(ADAPTERS, content=content, headers=MULTIPART)
    assert response.status_code == 413
    assert max(written) <= 1_000_000
    assert list(spool.iterdir()) == []
    assert len(store.records()) == 1


async def send_in_pieces(client: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
    """The same body, without an announcement of its size."""
    content = request.read()

    async def pieces():
        for start in range(0, len(content), 1000):
            yield content[start : start + 1000]

    headers = {"content-type": request.headers["content-type"]}
    return await client.post(request.url, content=pieces(), headers=headers)


async def test_a_body_of_unknown_size_goes_through_a_spool(
    services, store, peft_adapters, tmp_path
):
    spool = tmp_path / "spool"
    spool.mkdir()
    async with client_of(services, spool_directory=spool) as client:
        form = {"data": {"id": "two"}, "files": files_of(peft_adapters / "two")}
        request = client.build_request("POST", ADAPTERS, **form)
        assert (await send_in_pieces(client, request)).status_code == 201
        assert list(spool.iterdir()) == []
        assert (await upload(client, peft_adapters / "two", "other")).status_code == 201
    assert store.resolve("two").digest == store.resolve("other").digest
    assert store.resolve("two").source_files == store.resolve("other").source_files


async def test_a_small_body_needs_no_spool(services, peft_adapters, tmp_path):
    async with client_of(services, spool_directory=tmp_path / "absent") as client:
        assert (await upload(client, peft_adapters / "two", "two")).status_code == 201


REFUSED = {
    "no_config": [("files", ("adapter_model.safetensors", b"x"))],
    "no_weights": [("files", ("adapter_config.json", b"{}"))],
    "no_json": [("files", ("adapter_config.json", b"{"))],
    "pickle": [("files", ("adapter_model.bin", b"x"))],
    "two_weights": [("files", ("more.safetensors", b"x"))],
    "twice": [("files", ("a.txt", b"x")), ("files", ("a.txt", b"x"))],
    "path": [("files", ("../a.txt", b"x"))],
    "other_field": [("file", ("a.txt", b"x"))],
    "over_the_cap": [("files", ("a.txt", b"x" * 200_000))],
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_do_not_depend_on_how_a_body_comes(services, name):
    async with client_of(services, max_upload_bytes=100_000) as client:
        form = {"data": {"id": "bad"}, "files": REFUSED[name]}
        in_memory = await client.post(ADAPTERS, **form)
        request = client.build_request("POST", ADAPTERS, **form)
        spooled = await send_in_pieces(client, request)
    assert in_memory.is_client_error
    assert (in_memory.status_code, in_memory.json()) == (spooled.status_code, spooled.json())


FIRST_PIECE = (
    b'--frontier\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nx'
)


@pytest.mark.parametrize(("num_uploads", "announced", "most"), [(20, False, 8), (100, True, 64)])
async def test_the_bodies_of_too_many_uploads_wait_unread(
    services, tmp_path, num_uploads, announced, most
):
    go_on = asyncio.Event()
    begun = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal begun
        begun += 1
        yield FIRST_PIECE
        await go_on.wait()

    headers = MULTIPART | ({"content-length": "1000"} if announced else {})
    async with client_of(services, spool_directory=tmp_path) as client:
        posts = [
            asyncio.create_task(client.post(ADAPTERS, content=body(), headers=headers))
            for _ in range(num_uploads)
        ]
        await asyncio.sleep(1)
        assert begun == most
        async with asyncio.timeout(5):  # what headers tell needs no waiting
            too_large = await client.post(
                ADAPTERS, content=body(), headers=MULTIPART | {"content-length": str(2**50)}
            )
        assert too_large.status_code == 413
        assert begun == most
        go_on.set()
        responses = await asyncio.gather(*posts)
    assert begun == num_uploads
    assert {error_of(response)["code"] for response in responses} == {"invalid_multipart"}


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("path", [ADAPTERS, "/v1/completions"])
async def test_a_body_that_stops_coming(services, tmp_path, monkeypatch, announced, path):
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr(bodies, "PATIENCE_SECONDS", 0.1)

    async def body() -> AsyncIterator[bytes]:
        yield FIRST_PIECE
        await asyncio.sleep(60)

    headers = MULTIPART if path == ADAPTERS else {"content-type": "application/json"}
    headers = headers | ({"content-length": "1000"} if announced else {})
    async with client_of(services, spool_directory=spool) as client:
        response = await client.post(path, content=body(), headers=headers)
        assert response.status_code == 408
        assert error_of(response)["code"] == "body_timeout"
        assert "0.1 seconds" in error_of(response)["message"]
    assert list(spool.iterdir()) == []
