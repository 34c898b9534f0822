"""`vbserve inspect`: what a PEFT directory holds, and its size beside LoRA's."""

from __future__ import annotations

from pathlib import Path

import click

from serving.cli.errors import offline_errors, told_plainly


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--model", type=click.Path(path_type=Path), help="The adapter's base. Default: SmolLM2-135M."
)
def inspect(directory: Path, model: Path | None) -> None:
    """Tell kind, rank, modules and sizes of the PEFT adapter in DIRECTORY.

    Reads and checks it as registering it would, so it also tells why one is refused.
    """
    from rich.console import Console  # these import torch; --help needs none of it

    from adapters.peft_adapter import read_peft_adapter
    from core.model_config import read_base_info
    from serving.cli.adapter_report import adapter_report
    from serving.default_base import ensure_default_base

    with told_plainly(*offline_errors()):
        base = read_base_info(model or ensure_default_base(progress=click.echo))
        adapter = read_peft_adapter(directory, base)
    Console().print(adapter_report(directory, adapter, base.config))
