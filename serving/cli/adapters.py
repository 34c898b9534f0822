"""`vbserve adapters`: over HTTP to a running server, or offline in a store's directory.

Both ways give the same rows; see `AdapterDirectory`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from serving.cli.errors import offline_errors, told_plainly
from serving.settings import CLIENT_KEY_VARIABLE, CLIENT_URL_VARIABLE

if TYPE_CHECKING:
    from serving.http.adapter_directory import AdapterDirectory, Row

Command = TypeVar("Command", bound=Callable[..., Any])

_COLUMNS = ("id", "kind", "rank", "num_modules", "compact_bytes", "factor_bytes", "digest")


def where_options(command: Command) -> Command:
    """Options that say which adapters are meant."""
    for option in (
        click.option("--model", type=click.Path(path_type=Path), help="With --store: the base."),
        click.option(
            "--store", type=click.Path(path_type=Path), help="Work in this directory, offline."
        ),
        click.option(
            "--api-key", envvar=CLIENT_KEY_VARIABLE, show_envvar=True, help="Management key."
        ),
        click.option(
            "--url",
            envvar=CLIENT_URL_VARIABLE,
            show_envvar=True,
            default="http://127.0.0.1:8000",
            show_default=True,
            help="The running server.",
        ),
    ):
        command = option(command)
    return command


@click.group()
def adapters() -> None:
    """Add, list, show and remove adapters.

    Talks to a running server, or works offline in the directory named by --store; a server sees
    what is changed there at once.
    """


@adapters.command()
@click.argument("adapter_id", metavar="ID")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--replace", is_flag=True, help="Replace other content under this id.")
@where_options
def add(adapter_id: str, directory: Path, replace: bool, **where: Any) -> None:
    """Register the PEFT adapter in DIRECTORY under ID."""
    with _opened(where) as place:
        row, created = place.add(adapter_id, directory, replace=replace)
        click.echo(f"{adapter_id} is {'registered' if created else 'there already, unchanged'}")
        _show(row)


@adapters.command(name="list")
@where_options
def list_(**where: Any) -> None:
    """List all adapters."""
    with _opened(where) as place:
        _tabulate(place.rows())


@adapters.command()
@click.argument("adapter_id", metavar="ID")
@where_options
def show(adapter_id: str, **where: Any) -> None:
    """Show all that is known of one adapter."""
    with _opened(where) as place:
        _show(place.row(adapter_id))


@adapters.command()
@click.argument("adapter_id", metavar="ID")
@where_options
def remove(adapter_id: str, **where: Any) -> None:
    """Remove an adapter; requests that run with it go on."""
    with _opened(where) as place:
        place.remove(adapter_id)
        click.echo(f"{adapter_id} is removed")


@contextlib.contextmanager
def _opened(where: dict[str, Any]) -> Iterator[AdapterDirectory]:
    """The server's adapters or the store's; errors are told in a line."""
    from serving.http.adapter_directory import ServerError, http_directory

    if where["store"] is None:
        with (
            told_plainly(ServerError),
            http_directory(where["url"], where["api_key"]) as directory,
        ):
            yield directory
    else:
        with told_plainly(*offline_errors()):
            yield _offline(where["store"], where["model"])


def _offline(store: Path, model: Path | None) -> AdapterDirectory:
    from adapters.store import AdapterStore
    from core.model_config import read_base_info
    from serving.default_base import ensure_default_base
    from serving.http.adapter_directory import StoreDirectory

    base = read_base_info(model or ensure_default_base(progress=click.echo))
    return StoreDirectory(AdapterStore.open(store, base))


def _show(row: Row) -> None:
    for name, value in row.items():
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        click.echo(f"{name:>22}  {text}")


def _tabulate(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        click.echo("no adapters")
        return
    table = Table(*_COLUMNS)
    for row in rows:
        table.add_row(*(str(row.get(column, ""))[:32] for column in _COLUMNS))
    Console().print(table)
