"""This project's server as a user starts it: `vbserve serve` on a free port, over HTTP alone."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from loadtest.bench.server_process import ServerProcess, free_port
from loadtest.errors import BenchError

BASE_NAME = "base"
_BOUNDARY = "vbserve-bench-4f1d9c27a6e8"
MULTIPART = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}


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

    def __enter__(self) -> Self:
        port = free_port()
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
        self._process = ServerProcess(
            "vbserve serve",
            command,
            _clean_environment(),
            port,
            "/readyz",
            self.log,
            self.ready_within_seconds,
        )
        self._process.__enter__()
        self.url = self._process.url
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.__exit__(kind, error, trace)

    @property
    def ready_seconds(self) -> float:
        """From its start to the first answer that it is ready."""
        return self._process.ready_seconds

    def pss_bytes(self) -> int | None:
        """Memory of the server and all its processes."""
        return self._process.pss_bytes()

    def register(self, numbers: Sequence[int], vblora: Path) -> list[float]:
        """Upload PEFT directories one after the other; seconds of each POST /v1/adapters."""
        files = ((adapter_id(n), _peft_files(vblora / f"{n:03d}")) for n in numbers)
        return self.upload(upload_body(*named) for named in files)

    def upload(self, bodies: Iterable[bytes]) -> list[float]:
        """Register one after the other; seconds of each POST /v1/adapters. Raises BenchError."""
        return asyncio.run(self._upload(bodies))

    def adapter(self, name: str) -> dict[str, Any]:
        """What GET /v1/adapters/{name} tells. Raises BenchError."""
        return asyncio.run(self._adapter(name))

    async def _adapter(self, name: str) -> dict[str, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/v1/adapters/{name}") as response,
        ):
            body: dict[str, Any] = await response.json()
        if response.status != 200:
            raise BenchError(f"GET /v1/adapters/{name} answered {response.status}: {body}")
        return body

    async def _upload(self, bodies: Iterable[bytes]) -> list[float]:
        seconds = []
        async with aiohttp.ClientSession() as session:
            for body in bodies:
                start = time.perf_counter()
                async with session.post(
                    f"{self.url}/v1/adapters", data=body, headers=MULTIPART
                ) as response:
                    text = await response.text()
                seconds.append(time.perf_counter() - start)
                if response.status != 201:
                    raise BenchError(f"POST /v1/adapters answered {response.status}: {text[:500]}")
        return seconds


def upload_body(name: str, files: Mapping[str, bytes]) -> bytes:
    """The multipart body that registers PEFT's files under `name`, see `MULTIPART`."""
    parts = [('name="id"', name.encode())]
    parts += [(f'name="files"; filename="{file}"', content) for file, content in files.items()]
    lines = [
        line
        for what, content in parts
        for line in (f"--{_BOUNDARY}", f"Content-Disposition: form-data; {what}", "", content)
    ]
    lines += [f"--{_BOUNDARY}--", ""]
    return b"\r\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)


def _peft_files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.glob("adapter_*"))}


def _vbserve() -> list[str]:
    """The console script beside this interpreter."""
    script = Path(sys.executable).with_name("vbserve")
    if not script.exists():
        raise BenchError(f"{script} does not exist: install the project into this environment")
    return [str(script)]


def _clean_environment() -> dict[str, str]:
    """Without VBSERVE_* settings of the user's own, except where the cache lies."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("VBSERVE_") or name == "VBSERVE_CACHE_DIR"
    }
