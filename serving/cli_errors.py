"""Errors that a person can act on, told in one line instead of a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click

from adapters.errors import AdapterError
from core.errors import CoreError
from serving.default_base import DefaultBaseError
from serving.settings import SettingsError


@contextlib.contextmanager
def told_plainly(*more: type[Exception]) -> Iterator[None]:
    """Turn our own errors, and those of `more`, into click's: message on stderr, exit status 1."""
    expected: tuple[type[Exception], ...] = (AdapterError, CoreError, DefaultBaseError, *more)
    try:
        yield
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    except expected as error:
        raise click.ClickException(str(error)) from None
