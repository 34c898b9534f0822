"""The HTTP server of an ingress replica, over real sockets."""

import asyncio
import socket

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from serving.cluster.http_server import HttpServer

HOST = "127.0.0.1"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def server_of(app: Starlette, port: int, *, shares_port: bool = False) -> HttpServer:
    return HttpServer(app, HOST, port, shares_port=shares_port, stop_seconds=1)


def named_app(name: str) -> Starlette:
    async def answer(_: Request) -> Response:
        return PlainTextResponse(name)

    return Starlette(routes=[Route("/", answer)])


async def test_it_serves_from_start_to_stop(port: int) -> None:
    server = server_of(named_app("one"), port)
    assert not server.is_serving
    await server.start()
    assert server.is_serving
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}") as client:
        answer = await client.get("/")
        assert (answer.status_code, answer.text) == (200, "one")
        assert "server" not in answer.headers
    await server.stop()
    assert not server.is_serving
    with pytest.raises(httpx.ConnectError):
        await httpx.AsyncClient().get(f"http://{HOST}:{port}")


async def test_replicas_share_a_port_and_one_may_leave(port: int) -> None:
    servers = [
        HttpServer(named_app(name), HOST, port, shares_port=True, stop_seconds=1) for name in "ab"
    ]
    for server in servers:
        await server.start()
    seen = set()
    async with asyncio.timeout(20):
        while seen != {"a", "b"}:
            async with httpx.AsyncClient() as client:
                seen.add((await client.get(f"http://{HOST}:{port}")).text)
    await servers[0].stop()
    for _ in range(20):
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://{HOST}:{port}")).text == "b"
    await servers[1].stop()


async def test_a_port_in_use_is_an_error_and_nothing_runs(port: int) -> None:
    first = server_of(named_app("first"), port)
    await first.start()
    second = server_of(named_app("second"), port)
    with pytest.raises(OSError, match="in use"):
        await second.start()
    assert not second.is_serving
    await second.stop()
    await first.stop()


async def test_an_answer_that_does_not_end_is_cut_off(port: int) -> None:
    entered = asyncio.Event()

    async def hang(_: Request) -> Response:
        entered.set()
        await asyncio.sleep(600)
        return Response()

    server = HttpServer(
        Starlette(routes=[Route("/", hang)]), HOST, port, shares_port=False, stop_seconds=1
    )
    await server.start()
    async with httpx.AsyncClient(timeout=30) as client:
        waiting = asyncio.create_task(client.get(f"http://{HOST}:{port}"))
        await entered.wait()
        async with asyncio.timeout(20):
            await server.stop()
        assert not server.is_serving
        assert (await waiting).status_code == 500
