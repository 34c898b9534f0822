"""This project's server as a user starts it: `vbserve serve` on a free port, over HTTP alone."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from loadtest.bench.machine import pss_bytes
from loadtest.bench.processes import end_process, log_tail
from loadtest.errors import BenchError

BASE_NAME = "base"
_POLL_SECONDS = 0.05
_END_SECONDS = 40.0


def adapter_id(number: int) -> str:
    """The id under which adapter `number` is registered."""
    return f"adapter-{number:03d}"


@dataclass
class VbserveServer:
    """A server process, ready when entered, all of its processes gone when left.

    `registry` is its directory of adapters and outlives it; `flags` are passed on as they are.
    """

    base: Path
    registry: Path
    log: Path
    flags: Sequence[str] = ()
    ready_within_seconds: float = 300.0
    ready_seconds: float = 0.0

    def __enter__(self) -> Self:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *_vbserve(),
            "serve",
            "--model",
            str(self.base),
            "--model-name",
            BASE_NAME,
            "--adapters",
            str(self.registry),
            "--preload",
            "none",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            *self.flags,
        ]
        start = time.perf_counter()
        self._log = self.log.open("a")
        self._process = subprocess.Popen(  # noqa: S603 - our own command
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=_clean_environment(),
            process_group=0,  # not a session of its own, see ARCHITECTURE.md on autogroups
        )
        try:
            asyncio.run(self._wait_ready(start + self.ready_within_seconds))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.ready_seconds = time.perf_counter() - start
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end_process(self._process, group=True, seconds=_END_SECONDS)
        self._log.close()

    def pss_bytes(self) -> int | None:
        """Memory of the server and all its processes."""
        return pss_bytes(self._process.pid)

    async def _wait_ready(self, deadline: float) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while not await self._is_ready(session):
                if self._process.poll() is not None:
                    raise BenchError(f"vbserve serve ended at start:\n{log_tail(self.log)}")
                if time.perf_counter() > deadline:
                    raise BenchError(f"vbserve serve is not ready:\n{log_tail(self.log)}")
                await asyncio.sleep(_POLL_SECONDS)

    async def _is_ready(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.url}/readyz") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def register(self, numbers: Sequence[int], vblora: Path) -> list[float]:
        """Upload PEFT directories one after the other; seconds of each POST /v1/adapters."""
        return asyncio.run(self._register(numbers, vblora))

    async def _register(self, numbers: Sequence[int], vblora: Path) -> list[float]:
        seconds = []
        async with aiohttp.ClientSession() as session:
            for number in numbers:
                form = aiohttp.FormData({"id": adapter_id(number)})
                for file in sorted((vblora / f"{number:03d}").glob("adapter_*")):
                    form.add_field("files", file.read_bytes(), filename=file.name)
                start = time.perf_counter()
                async with session.post(f"{self.url}/v1/adapters", data=form) as response:
                    body = await response.text()
                seconds.append(time.perf_counter() - start)
                if response.status != 201:
                    raise BenchError(f"POST /v1/adapters answered {response.status}: {body[:500]}")
        return seconds


def _vbserve() -> list[str]:
    """The console script beside this interpreter."""
    script = Path(sys.executable).with_name("vbserve")
    if not script.exists():
        raise BenchError(f"{script} does not exist: install the project into this environment")
    return [str(script)]


def _clean_environment() -> dict[str, Any]:
    """Without VBSERVE_* settings of the user's own, except where the cache lies."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("VBSERVE_") or name == "VBSERVE_CACHE_DIR"
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
