"""What the bench's commands share on a terminal."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import click


def say(message: str) -> None:
    """A line of progress, beside the page that goes to standard output."""
    click.echo(message, err=True)


def end_as_exceptions_do() -> None:
    """On SIGTERM too leave no server or peer behind."""
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
