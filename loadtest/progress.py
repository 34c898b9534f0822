"""A progress bar with live figures on the terminal's error stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from loadtest.live import LiveCounts
from loadtest.run import Watch

_PERIOD_SECONDS = 0.5  # drawing costs CPU that the server may need


def watcher(
    console: Console, num_requests: int | None, duration_seconds: float | None, *, quiet: bool
) -> Watch:
    """A `Watch` that draws the share of requests sent and ended, or of the time gone by."""
    if quiet:
        return lambda live, clock: nullcontext()

    @contextmanager
    def watch(live: LiveCounts, clock: Callable[[], float]) -> Iterator[None]:
        total = num_requests or duration_seconds
        columns = [SpinnerColumn(), BarColumn(), TextColumn("{task.fields[figures]}")]
        columns.insert(2, MofNCompleteColumn() if num_requests else TimeElapsedColumn())
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            task = progress.add_task("load", total=total, figures="")

            def draw() -> None:
                done = live.finished if num_requests else clock()
                _draw(progress, task, done, live, clock())

            with _every(_PERIOD_SECONDS, draw):
                yield
            draw()

    return watch


def _draw(progress: Progress, task: TaskID, done: float, live: LiveCounts, seconds: float) -> None:
    rate = live.tokens / seconds if seconds > 0 else 0.0
    figures = f"{rate:7.1f} tok/s  {live.in_flight} in flight  {live.finished} done"
    if live.failed:
        figures += f"  [red]{live.failed} failed[/red]"
    progress.update(task, completed=done, figures=figures)
    progress.refresh()


@contextmanager
def _every(period_seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call from a thread of its own, so that the event loop keeps its timing."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(period_seconds):
            call()

    thread = threading.Thread(target=loop, name="loadtest-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
