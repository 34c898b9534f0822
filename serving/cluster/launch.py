"""From settings to a running server, and down again: Ray, base, adapters, deployments, ready.

Whatever was started is stopped when the server ends, is interrupted or fails half-way. Knows
nothing of routes or of tensors.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from types import FrameType

import httpx
from rich.console import Console

from serving.cluster.garbage import collection_paused
from serving.cluster.launch_checks import LaunchError
from serving.cluster.launch_messages import Stages, ready_message, server_url
from serving.cluster.preparation import FoundBase, preparation
from serving.cluster.ray_cluster import existing_cluster, private_cluster
from serving.settings import Settings

_READY_SECONDS = 120.0
_POLL_SECONDS = 0.1


def serve_forever(settings: Settings, console: Console) -> None:
    """Start everything, wait for SIGINT or SIGTERM, stop everything.

    Raises LaunchError after stopping all.
    """
    stages = Stages(console)
    with _interruptible(), contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as server:
        with preparation(settings) as prepared:
            with stages.stage("Ray"):
                server.enter_context(_cluster(settings))
            with stages.stage("base") as note:
                base = prepared.base(stages.tell)
                note(f"{base.name} in {base.path}")
            with stages.stage("adapters") as note:
                adapters = prepared.adapters()
                for line in adapters.notes:
                    note(line)
        with stages.stage("engine and HTTP"):
            server.enter_context(_application(settings, base))
        console.print(ready_message(settings, base.name, adapters.ids), soft_wrap=True)
        try:
            _wait_for_signals()
        finally:
            with stages.stage("stopped"):
                server.close()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt once; more of them do not disturb the clean-up."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _arm_signals()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_for_signals() -> None:
    """Wait until a signal's handler raises, whichever thread the system gives the signal to.

    The main thread, which runs handlers, sleeps on when another one gets it (so it is when another
    signal is still on its way to the main thread); the byte that Python then writes wakes it.
    """
    waking, woken = socket.socketpair()
    with waking, woken:
        waking.setblocking(False)
        previous = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        try:
            while True:
                woken.recv(1)
        finally:
            signal.set_wakeup_fd(previous)


def _arm_signals() -> None:
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the body is done.

    Ray forgets the processes that it has begun to start when its start is interrupted.
    """
    held: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        _arm_signals()  # Ray has put its own handler there
    if held:
        _interrupt(held[0], None)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextlib.contextmanager
def _cluster(settings: Settings) -> Iterator[None]:
    """Ray, and Serve's controller on it."""
    if settings.ray_address is None:
        cluster = private_cluster(num_cpus=len(os.sched_getaffinity(0)))
    else:
        cluster = existing_cluster(settings.ray_address)
    with contextlib.ExitStack() as stack:
        with _held_signals():
            stack.enter_context(cluster)
        with collection_paused():
            from serving.cluster.application import serve_running  # only now: it imports Ray
        try:
            stack.enter_context(serve_running(settings))
        except RuntimeError as error:
            raise LaunchError(f"Ray Serve did not start: {error}") from error
        yield


@contextlib.contextmanager
def _application(settings: Settings, base: FoundBase) -> Iterator[None]:
    from serving.cluster.application import deployed

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(deployed(settings, base.name, base.path))
        except RuntimeError as error:  # what Serve raises for a deployment that fails
            raise LaunchError(f"the server did not come up: {error}") from error
        _wait_until_ready(server_url(settings))
        yield


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    with httpx.Client(trust_env=False, timeout=_READY_SECONDS) as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"{url}/readyz").is_success:
                    return
            time.sleep(_POLL_SECONDS)
    raise LaunchError(f"{url}/readyz did not answer within {_READY_SECONDS:.0f} s")
