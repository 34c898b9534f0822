"""What the bench's commands share on a terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import click

from loadtest.bench.machine import describe_machine
from loadtest.errors import LoadtestError

short_option = click.option(
    "--short", is_flag=True, help="Tiny sizes: does it run, and is it exact?"
)
base_option = click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A Hugging Face folder. [default: the project's default base]",
)
out_option = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="bench-out",
    show_default=True,
)


def say(message: str) -> None:
    """A line of progress, beside the page that goes to standard output."""
    click.echo(message, err=True)


def conditions_now() -> dict[str, object]:
    """Date and machine, for a page."""
    return {"date": datetime.now(UTC).date().isoformat(), **describe_machine()}


def run(bench: Callable[..., None], options: Mapping[str, Any]) -> None:
    """Call `bench` with a command's options; its LoadtestError is the command's error.

    On SIGTERM too no server or peer is left behind.
    """
    signal.signal(signal.SIGTERM, _leave)
    try:
        bench(**options)
    except LoadtestError as error:
        raise click.ClickException(str(error)) from error


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
