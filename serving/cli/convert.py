"""`vbserve convert`: models and adapters in other forms, and how far those are off."""

from __future__ import annotations

import click

from serving.cli.convert_adapter import lora, pissa
from serving.cli.convert_model import vertical


@click.group()
def convert() -> None:
    """Turn a model or an adapter into another form."""


for command in (vertical, lora, pissa):
    convert.add_command(command)
