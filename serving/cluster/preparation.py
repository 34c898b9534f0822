"""Base and adapters looked at before replicas start, in a child process while Ray starts.

So the launcher itself never imports torch: that takes seconds, which pass beside Ray's start, and
hundreds of megabytes, which are given back when the child ends. Knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from serving.cluster.garbage import collection_paused
from serving.cluster.launch_checks import LaunchError
from serving.settings import Settings

_GARBAGE_GRACE_SECONDS = 3600.0  # requests of another server may still run on what was removed
_STOP_SECONDS = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class FoundBase(NamedTuple):
    """The base that will be served, under `name`."""

    name: str
    path: Path


class FoundAdapters(NamedTuple):
    """Ids of the adapters that are served, and what a person should know of them."""

    ids: list[str]
    notes: list[str]


class Preparation:
    """A child at work. Ask for `base` first, then for `adapters`."""

    def __init__(self, inbox: Connection) -> None:
        self._inbox = inbox

    def base(self, tell: Callable[[str], None]) -> FoundBase:
        """Wait for the base; `tell` hears of each long step. Raises LaunchError."""
        while isinstance(message := self._receive(), str):
            tell(message)
        assert isinstance(message, FoundBase)
        return message

    def adapters(self) -> FoundAdapters:
        """Wait until the adapters are registered that should be there. Raises LaunchError."""
        message = self._receive()
        assert isinstance(message, FoundAdapters)
        return message

    def _receive(self) -> object:
        try:
            message: object = self._inbox.recv()
        except EOFError:
            raise LaunchError("reading base and adapters failed") from None
        if isinstance(message, LaunchError):
            raise message
        return message


@contextlib.contextmanager
def preparation(settings: Settings) -> Iterator[Preparation]:
    """Start the child; it is gone at the end, whether it was done or not.

    Call it while the process has one thread: the child is forked.
    """
    context = multiprocessing.get_context("fork")
    inbox, outbox = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(settings, inbox, outbox), daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the child has its handlers
    try:
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    outbox.close()
    try:
        yield Preparation(inbox)
    finally:
        child.terminate()
        child.join(_STOP_SECONDS)
        child.kill()
        child.join()
        child.close()
        inbox.close()


def _run(settings: Settings, inbox: Connection, outbox: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # ends what it waits for, too
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    inbox.close()
    with collection_paused():
        from serving.stores import OFFLINE_ERRORS
    last: FoundAdapters | LaunchError
    try:
        last = _prepare(settings, outbox.send)
    except OFFLINE_ERRORS as error:
        last = LaunchError(str(error))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself now
    outbox.send(last)


def _prepare(settings: Settings, send: Callable[[str | FoundBase], None]) -> FoundAdapters:
    from adapters.errors import StoreCorruptedError
    from core.model_config import read_base_info
    from serving.default_base import BASE_NAME, ensure_default_base
    from serving.stores import open_store, preload_adapters, preload_directory, served_ids

    path = settings.model or ensure_default_base(progress=send)
    info = read_base_info(path)
    name = settings.model_name or (path.name if settings.model else BASE_NAME)
    send(FoundBase(name, path))
    store = open_store(settings, name, info)
    notes = []
    source = preload_directory(settings)
    if source is not None:
        preloaded = preload_adapters(store, source)
        notes.append(f"{len(preloaded.added)} new from {source}")
        if preloaded.differing:
            notes.append(f"kept other content of {', '.join(preloaded.differing)}")
    ids = served_ids(store)
    notes.append(f"{len(ids)} in {store.root}")
    try:
        store.collect_garbage(_GARBAGE_GRACE_SECONDS)
    except StoreCorruptedError as error:
        notes.append(f"nothing is cleaned up: {error}")
    return FoundAdapters(ids, notes)
