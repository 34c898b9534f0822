"""From settings to a running server, and down again: base, adapters, Ray, deployments, ready.

Whatever was started is stopped when the server ends, is interrupted or fails half-way. Knows
nothing of routes or of tensors.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

import httpx
from rich.console import Console

from adapters.errors import StoreCorruptedError
from adapters.store import AdapterStore
from core.model_config import BaseInfo, read_base_info
from serving.cluster.launch_checks import LaunchError
from serving.cluster.launch_messages import Stages, ready_message, server_url
from serving.cluster.ray_cluster import existing_cluster, private_cluster
from serving.default_base import BASE_NAME, ensure_default_base
from serving.settings import Settings
from serving.stores import open_store, preload_adapters, preload_directory, served_ids

_READY_SECONDS = 120.0
_POLL_SECONDS = 0.1
_GARBAGE_GRACE_SECONDS = 3600.0  # requests of another server may still run on what was removed


class NamedBase(NamedTuple):
    """The base, and the model name under which it is served."""

    name: str
    info: BaseInfo


def serve_forever(settings: Settings, console: Console) -> None:
    """Start everything, wait for SIGINT or SIGTERM, stop everything.

    Raises LaunchError, and what reading the base or an adapter raises, after stopping all.
    """
    stages = Stages(console)
    with _interruptible(), contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as server:
        base = _find_base(settings, stages)
        store = _open_store(settings, base, stages)
        with stages.stage("Ray"):
            server.enter_context(_cluster(settings))
        with stages.stage("engine and HTTP"):
            server.enter_context(_application(settings, base))
        console.print(ready_message(settings, base.name, served_ids(store)), soft_wrap=True)
        try:
            threading.Event().wait()
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


def _find_base(settings: Settings, stages: Stages) -> NamedBase:
    with stages.stage("base") as note:
        path = settings.model or ensure_default_base(progress=stages.tell)
        info = read_base_info(path)
        own_name = path.name if settings.model else BASE_NAME
        name = settings.model_name or own_name
        note(f"{name} in {path}")
    return NamedBase(name, info)


def _open_store(settings: Settings, base: NamedBase, stages: Stages) -> AdapterStore:
    with stages.stage("adapters") as note:
        store = open_store(settings, base.name, base.info)
        source = preload_directory(settings)
        if source is not None:
            preloaded = preload_adapters(store, source)
            note(f"{len(preloaded.added)} new from {source}")
            if preloaded.differing:
                note(f"kept other content of {', '.join(preloaded.differing)}")
        note(f"{len(served_ids(store))} in {store.root}")
        try:
            store.collect_garbage(_GARBAGE_GRACE_SECONDS)
        except StoreCorruptedError as error:
            note(f"nothing is cleaned up: {error}")
    return store


@contextlib.contextmanager
def _cluster(settings: Settings) -> Iterator[None]:
    if settings.ray_address is None:
        cluster = private_cluster(num_cpus=len(os.sched_getaffinity(0)))
    else:
        cluster = existing_cluster(settings.ray_address)
    with contextlib.ExitStack() as stack:
        with _held_signals():
            stack.enter_context(cluster)
        yield


@contextlib.contextmanager
def _application(settings: Settings, base: NamedBase) -> Iterator[None]:
    from serving.cluster.application import deployed  # only now: it imports Ray, see `cluster`

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(deployed(settings, base.name, base.info))
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
