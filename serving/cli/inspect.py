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
@click.option(
    "--lora-rank",
    "lora_ranks",
    type=click.IntRange(min=1),
    multiple=True,
    help="A rank of LoRA to compare with; may be repeated. Default: 64, the paper's.",
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a PNG of a VB-LoRA adapter's bank: which layers use which vectors, how evenly.",
)
def inspect(
    directory: Path, model: Path | None, lora_ranks: tuple[int, ...], picture: Path | None
) -> None:
    """Tell kind, rank, modules and sizes of the PEFT adapter in DIRECTORY.

    Reads and checks it as registering it would, so it also tells why one is refused.
    """
    from rich.console import Console  # these import torch; --help needs none of it

    from adapters.compact import CompactVBLoRA
    from adapters.peft_adapter import read_peft_adapter
    from core.model_config import read_base_info
    from serving.cli.adapter_report import adapter_report
    from serving.default_base import ensure_default_base

    with told_plainly(*offline_errors()):
        base = read_base_info(model or ensure_default_base(progress=click.echo))
        adapter = read_peft_adapter(directory, base)
    Console().print(adapter_report(directory, adapter, base.config, lora_ranks))
    if picture is not None:
        if not isinstance(adapter, CompactVBLoRA):
            raise click.ClickException(f"a {adapter.kind} adapter has no bank to draw")
        from adapters.bank_use import bank_use
        from serving.cli.bank_picture import draw_bank_use

        with told_plainly(OSError):
            draw_bank_use(bank_use(adapter), directory.name, picture)
        click.echo(f"{picture} shows its bank")
