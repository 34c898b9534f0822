"""A server of any make as a process: started on a free port, ready when it answers, ended for sure.

Shares this process's session (ARCHITECTURE.md on autogroups) and has a process group of its own,
which is killed as a whole.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from loadtest.bench.machine import pss_bytes
from loadtest.bench.processes import end_process, log_tail
from loadtest.errors import BenchError

_POLL_SECONDS = 0.05
_END_SECONDS = 40.0


@dataclass
class ServerProcess:
    """Ready when entered, all of its processes gone when left. Raises BenchError.

    name          for messages
    ready_path    answers 200 once requests can be sent
    environment   all of it
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    port: int
    ready_path: str
    log: Path
    ready_within_seconds: float = 300.0
    ready_seconds: float = 0.0

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        start = time.perf_counter()
        self._log = self.log.open("a")
        self._process = subprocess.Popen(  # noqa: S603 - commands of the bench's own
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self.environment,
            process_group=0,
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
        """Memory of the server and all its processes; None once it has ended."""
        return pss_bytes(self._process.pid) if self._process.poll() is None else None

    async def _wait_ready(self, deadline: float) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while not await self._is_ready(session):
                if self._process.poll() is not None:
                    raise BenchError(f"{self.name} ended at start:\n{log_tail(self.log)}")
                if time.perf_counter() > deadline:
                    raise BenchError(f"{self.name} is not ready:\n{log_tail(self.log)}")
                await asyncio.sleep(_POLL_SECONDS)

    async def _is_ready(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.url}{self.ready_path}") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
