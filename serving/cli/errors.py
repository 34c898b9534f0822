"""Errors that a person can act on, told in one line instead of a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click


@contextlib.contextmanager
def told_plainly(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds into click's: the message on stderr, exit status 1."""
    try:
        yield
    except kinds as error:
        raise click.ClickException(str(error)) from None


def offline_errors() -> tuple[type[Exception], ...]:
    """What reading a base or an adapter in this process may raise. Imports torch, as that does."""
    from serving.stores import OFFLINE_ERRORS

    return OFFLINE_ERRORS
