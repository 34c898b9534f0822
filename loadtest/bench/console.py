"""What the bench's commands share on a terminal."""

from __future__ import annotations

import signal
import sys
from datetime import UTC, datetime
from types import FrameType

import click

from loadtest.bench.machine import describe_machine


def say(message: str) -> None:
    """A line of progress, beside the page that goes to standard output."""
    click.echo(message, err=True)


def conditions_now() -> dict[str, object]:
    """Date and machine, for a page."""
    return {"date": datetime.now(UTC).date().isoformat(), **describe_machine()}


def end_as_exceptions_do() -> None:
    """On SIGTERM too leave no server or peer behind."""
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
