"""Processes of the bench: scripts run to their end, and peers that answer JSON lines.

Whatever a process prints besides answers goes to a log file; its end is quoted when it fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loadtest.bench.machine import pss_bytes
from loadtest.errors import BenchError

PEERS = Path(__file__).parent.parent / "peers"
_ROOT = PEERS.parent.parent
_LOG_CHARS = 2000
_END_SECONDS = 15.0


def run_script(name: str, *arguments: object) -> str:
    """Run peers/`name` to its end and return what it printed. Raises BenchError."""
    return run_python([str(PEERS / name), *map(str, arguments)])


def run_python(arguments: Sequence[str]) -> str:
    """Run this interpreter with `arguments`; returns standard output. Raises BenchError."""
    return run_command([sys.executable, *arguments])


def run_command(command: Sequence[object], environment: Mapping[str, str] | None = None) -> str:
    """Run a program to its end; returns standard output. Raises BenchError."""
    words = [str(word) for word in command]
    done = subprocess.run(  # noqa: S603 - our own scripts, and programs of installed peers
        words, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise BenchError(f"{' '.join(words[:8])} failed:\n{done.stderr[-_LOG_CHARS:]}")
    return done.stdout


def log_tail(path: Path) -> str:
    """The last lines of a log."""
    return path.read_text(errors="replace")[-_LOG_CHARS:] if path.exists() else "(no log)"


def end_process(process: subprocess.Popen[Any], *, group: bool, seconds: float) -> None:
    """Interrupt a process, wait, and kill it (with its process group) if it does not end."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    if group:
        with contextlib.suppress(ProcessLookupError):  # all of it has ended, as it should
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class ScriptPeer:
    """One of the peer scripts as a running process. `ready` is what it said once loaded.

    `python` is another environment's interpreter; the script finds this package from there too.
    Raises BenchError when the process ends, or takes longer than `timeout_seconds` to answer.
    """

    def __init__(
        self,
        script: str,
        arguments: Sequence[object],
        log: Path,
        timeout_seconds: float = 1800.0,
        python: Path | None = None,
    ) -> None:
        self._script, self._log, self._timeout = script, log, timeout_seconds
        interpreter = str(python or sys.executable)
        self._command = [interpreter, str(PEERS / script), *map(str, arguments)]
        self._environment = None if python is None else {**os.environ, "PYTHONPATH": str(_ROOT)}
        self.ready: Mapping[str, Any] = {}
        self.ready_seconds = 0.0

    def __enter__(self) -> Self:
        start = time.perf_counter()
        self._stderr = self._log.open("w")
        self._process = subprocess.Popen(  # noqa: S603 - our own script
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        try:
            self.ready = self._answer()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.ready_seconds = time.perf_counter() - start
        return self

    def pss_bytes(self) -> int | None:
        """Memory of the script and its processes."""
        return pss_bytes(self._process.pid)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.close()  # the script's loop ends with its input
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            end_process(self._process, group=False, seconds=_END_SECONDS)
        stdout.close()
        self._stderr.close()

    def ask(self, **command: object) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: the missing answer says so
            stdin.write(json.dumps(command) + "\n")
            stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        watchdog = threading.Timer(self._timeout, self._process.kill)
        watchdog.start()
        try:
            line = stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise BenchError(f"{self._script} ended or hung:\n{log_tail(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        return answer
