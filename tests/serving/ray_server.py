"""A really started `vbserve serve`, and what is needed to kill parts of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 240.0
STOP_SECONDS = 60.0
_LISTEN = "0A"  # in /proc/net/tcp
_LOOPBACK = {"0100007F", f"{'0' * 24}01000000", f"{'0' * 16}FFFF00000100007F"}  # also of tcp6


class ServerProcess:
    """`vbserve serve` with the given options, on a free port unless they name one."""

    def __init__(self, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._mark = f"VBTEST_MARK={uuid.uuid4().hex}"
        self._lines: list[str] = []
        command = [
            sys.executable,
            "-m",
            "serving.cli.main",
            "serve",
            "--port",
            str(self.port),
            *options,
        ]
        # what Ray tells its own children must not reach this one
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("VBSERVE_", "RAY_"))}
        name, value = self._mark.split("=")
        self._process = subprocess.Popen(
            command,
            env={**clean, name: value, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,  # not a session of its own, see ARCHITECTURE.md on autogroups
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait_for(self, text: str, seconds: float = START_SECONDS) -> None:
        """Until the server has printed `text`."""
        wait_until(
            lambda: text in self.output or self._process.poll() is not None,
            seconds,
            lambda: f"no {text!r} in:\n{self.output}",
        )
        assert text in self.output, self.output

    def signal(self, number: int) -> None:
        """To the launcher's process group, as a terminal's Ctrl-C."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def terminate(self) -> None:
        """SIGTERM to the launcher alone, as `kill` and process managers do."""
        self._process.terminate()

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """The launcher's exit status."""
        status = self._process.wait(seconds)
        self._close()
        return status

    def processes(self) -> dict[int, str]:
        """All living processes that descend from the launcher: pid and title."""
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (directory / "environ").read_bytes().split(b"\0"):
                    title = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if title:
                        found[int(directory.name)] = title.strip()
        return found

    def ports_open_to_others(self) -> list[int]:
        """TCP ports on which the server's processes listen beyond loopback."""
        own = {inode for pid in self.processes() for inode in _socket_inodes(pid)}
        ports = []
        for table in ("tcp", "tcp6"):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                address, _, port = local.partition(":")
                if state == _LISTEN and inode in own and address not in _LOOPBACK:
                    ports.append(int(port, 16))
        return ports

    def replicas(self, kind: str) -> list[int]:
        """Pids of the replicas of the deployment `kind`."""
        return [
            pid
            for pid, title in self.processes().items()
            if f"ServeReplica:vbserve:{kind}" in title
        ]

    def kill_everything(self) -> None:
        while pids := list(self.processes()):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        self._process.wait(5)
        self._close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels, over all replicas."""
        page = httpx.get(f"{self.url}/metrics", timeout=30).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def _read(self) -> None:
        assert self._process.stdout is not None
        self._lines.extend(self._process.stdout)

    def _close(self) -> None:
        """Once no process is left that could write."""
        assert self._process.stdout is not None
        self._reader.join(5)
        assert not self._reader.is_alive(), f"someone still writes: {self.processes()}"
        self._process.stdout.close()


def openai_client(server: ServerProcess) -> openai.AsyncOpenAI:
    """OpenAI's own, for a server without keys; it tries once and waits long."""
    url = f"{server.url}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)


@contextlib.contextmanager
def started(*options: str, port: int | None = None) -> Iterator[ServerProcess]:
    """A server that is ready; nothing of it is left afterwards."""
    server = ServerProcess(*options, port=port)
    try:
        server.wait_for("READY")
        yield server
    finally:
        server.kill_everything()


def _socket_inodes(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            found.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    return found


def wait_until(
    condition: Callable[[], bool], seconds: float, message: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {message()}"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
