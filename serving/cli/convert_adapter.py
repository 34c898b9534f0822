"""`vbserve convert lora` and `pissa`: adapters in other forms, and how far those are off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from serving.cli.convert_report import spread
from serving.cli.errors import offline_errors, told_plainly
from serving.cli.train import need_peft, split_examples

if TYPE_CHECKING:
    from adapters.training.from_lora import FittedLoRA
    from core.model_config import BaseInfo

_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
_COUNT = click.IntRange(min=1)
_MAX_TOKENS = 512  # of an example


@click.command()
@click.argument("source", type=_FOLDER)
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--model", type=_FOLDER, help="The adapter's base. Default: SmolLM2-135M.")
@click.option("--rank", type=_COUNT, help="Default: the adapter's own.")
@click.option("--num-vectors", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("--vector-length", type=_COUNT, help="Default: the longest that fits.")
@click.option("--topk", type=_COUNT, default=2, show_default=True)
@click.option("--rounds", type=_COUNT, default=20, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--distil",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Examples, as `vbserve train` takes: train the fit to answer them as SOURCE does.",
)
@click.option("--distil-steps", type=_COUNT, default=100, show_default=True)
def lora(
    source: Path,
    target: Path,
    model: Path | None,
    rank: int | None,
    num_vectors: int,
    vector_length: int | None,
    topk: int,
    rounds: int,
    seed: int,
    distil: Path | None,
    distil_steps: int,
) -> None:
    """Fit a VB-LoRA adapter to the LoRA adapter SOURCE and write it to TARGET.

    Reports how far it is off. A bank says less than the factors did, so judge the result by its
    answers; --distil brings those nearer.
    """
    from adapters.compact import compact_bytes
    from adapters.peft_adapter import read_peft_adapter
    from adapters.training.from_lora import fit_lora
    from adapters.training.recipe import Recipe
    from core.model_config import read_base_info
    from serving.default_base import ensure_default_base

    if target.exists():
        raise click.ClickException(f"{target} exists already")
    if distil is not None:
        need_peft()
    with told_plainly(*offline_errors(), OSError):
        base = read_base_info(model or ensure_default_base(progress=click.echo))
        shape = Recipe(
            num_steps=distil_steps,
            topk=topk,
            num_vectors=num_vectors,
            vector_length=vector_length,
            seed=seed,
        )
        with click.progressbar(length=rounds, label="fitting") as bar:
            result = fit_lora(
                source,
                target,
                base,
                shape,
                rank=rank,
                rounds=rounds,
                progress=lambda error: bar.update(1),
            )
        _show_errors(result)
        if distil is not None:
            _distil(base, target, result, distil)
        made = read_peft_adapter(target, base)
    recipe = result.recipe
    click.echo(
        f"{target}: rank {recipe.rank}, {num_vectors} vectors of {recipe.vector_length}, k {topk}; "
        f"{compact_bytes(result.source):,} bytes -> {compact_bytes(made):,}"
    )


def _show_errors(result: FittedLoRA) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "relative error of B A")
    for name in result.recipe.target_modules:
        own = [error for key, error in result.errors.items() if key.projection == name]
        table.add_row(name, spread(own))
    Console().print(table)


def _distil(base: BaseInfo, target: Path, result: FittedLoRA, data: Path) -> None:
    from adapters.training.distillation import Distillation
    from adapters.training.trainer import shuffled

    seen, judged = split_examples(data, None, base.path, _MAX_TOKENS)
    recipe = replace(result.recipe, batch_size=min(result.recipe.batch_size, len(seen)))
    training = Distillation(base.path, target, result.pairs, recipe, shuffled(seen, recipe))
    before = training.loss_over(judged)
    with click.progressbar(length=recipe.num_steps, label="distilling") as bar:
        while not training.is_done:
            training.step()
            bar.update(1)
    after = training.loss_over(judged)
    training.save(target, base.path.name)
    click.echo(
        f"divergence from {len(judged)} held-out answers' next tokens: {before:.4f} -> {after:.4f} "
        "nats a token"
    )


@click.command()
@click.argument("source", type=_FOLDER)
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--model", type=_FOLDER, help="The adapter's base. Default: SmolLM2-135M.")
def pissa(source: Path, target: Path, model: Path | None) -> None:
    """Write the PiSSA adapter SOURCE as LoRA of twice the rank over the plain base to TARGET.

    Exact but for rounding; needs a singular value decomposition of each adapted matrix of the base.
    """
    from adapters.pissa import convert_pissa
    from core.model_config import read_base_info
    from serving.default_base import ensure_default_base

    if target.exists():
        raise click.ClickException(f"{target} exists already")
    with told_plainly(*offline_errors(), OSError):
        base = read_base_info(model or ensure_default_base(progress=click.echo))
        with click.progressbar(length=1, label="decomposing") as bar:

            def show(done: int, total: int) -> None:
                bar.length = total
                bar.update(1)

            convert_pissa(source, target, base, progress=show)
    click.echo(f"{target} is written: {target.name} can be registered as it is")
