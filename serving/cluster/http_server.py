"""uvicorn on the loop that runs, on a port that replicas may share. Knows no application."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp

_KEEP_ALIVE_SECONDS = 90  # longer than clients and load balancers keep idle connections
_BACKLOG = 2048


class HttpServer:
    """Serves `app` on `host` and `port` between `start` and `stop`.

    `shares_port`: several processes listen on it and the kernel deals connections out.
    `stop_seconds`: what is left of answers that have begun, once it stops.
    """

    def __init__(
        self, app: ASGIApp, host: str, port: int, *, shares_port: bool, stop_seconds: int
    ) -> None:
        self._host, self._port, self._shares_port = host, port, shares_port
        config = uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=stop_seconds,
        )
        self._server = uvicorn.Server(config)
        self._serving: asyncio.Task[None] | None = None

    @property
    def is_serving(self) -> bool:
        """Whether connections are taken."""
        return self._serving is not None and not self._serving.done()

    async def start(self) -> None:
        """Listen; return when connections are taken. Raises OSError where that is not possible."""
        listening = self._listen()
        self._serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started:
            if self._serving.done():
                await self._serving
                raise OSError(f"nothing serves on {self._host} port {self._port}")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Take no more connections; what has not ended after `stop_seconds` is cut off."""
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving

    def _listen(self) -> socket.socket:
        family, kind, protocol, _, address = socket.getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._shares_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            raise
        listening.setblocking(False)
        return listening
