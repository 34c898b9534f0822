"""`vbserve`: one command with subcommands that are imported when they run.

`vbserve --help` answers at once, since nothing here imports torch, Ray or pydantic.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import click


class LazyCommand(NamedTuple):
    """Where a subcommand is, and its line in the group's help."""

    module: str
    attribute: str
    summary: str


class LazyGroup(click.Group):
    """A group that imports a subcommand only to run it or to show that one's help."""

    def __init__(self, *args: Any, lazy: Mapping[str, LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the subcommand; None for an unknown name."""
        lazy = self._lazy.get(cmd_name)
        if lazy is None:
            return None
        command = getattr(importlib.import_module(lazy.module), lazy.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.summary) for name, lazy in self._lazy.items()])


COMMANDS = {
    "serve": LazyCommand("serving.cli.serve", "serve", "Start a server; Ctrl-C stops it."),
    "adapters": LazyCommand(
        "serving.cli.adapters", "adapters", "Add, list, show and remove adapters."
    ),
    "train": LazyCommand(
        "serving.cli.train", "train", "Train a VB-LoRA adapter on a file of examples."
    ),
    "inspect": LazyCommand(
        "serving.cli.inspect", "inspect", "Tell what a PEFT adapter directory holds."
    ),
    "convert": LazyCommand(
        "serving.cli.convert",
        "convert",
        "LoRA as VB-LoRA, PiSSA as LoRA, a model as a vertical base.",
    ),
    "loadtest": LazyCommand(
        "loadtest.cli", "loadtest", "Measure a running server: latencies, throughput, plots."
    ),
}


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vbserve", message="vbserve %(version)s")
def main() -> None:
    """Serve one Llama-family base and thousands of VB-LoRA adapters in one batch.

    Start with `vbserve serve`: without options it serves SmolLM2-135M-Instruct and four adapters on
    http://127.0.0.1:8000.
    """


if __name__ == "__main__":
    main()
