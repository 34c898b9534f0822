"""`vbserve convert vertical`: a pretrained Llama as a vertical base, and what that loses."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from serving.cli.convert_report import spread
from serving.cli.errors import offline_errors, told_plainly

if TYPE_CHECKING:
    from core.vertical import VerticalConfig
    from core.vertical_conversion import MatrixFit

_WINDOWS, _WINDOW = 16, 256  # of text, in tokens


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--chunks", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--increments",
    type=click.Choice(["recursive", "base-relative"]),
    default="recursive",
    show_default=True,
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="What perplexity is measured on. Default: Python's language reference.",
)
@click.option("--accept-loss", is_flag=True, help="Write TARGET whatever is lost.")
def vertical(
    source: Path,
    target: Path,
    chunks: int,
    rank: int,
    increments: str,
    text: Path | None,
    accept_loss: bool,
) -> None:
    """Report what is lost when SOURCE, a pretrained Llama, becomes a vertical base.

    Layers of pretrained models have little in common, so that is most of what the model knows;
    vertical models are trained (deploy/vertical). Nothing is written without --accept-loss.
    """
    from core.model_config import read_model_config
    from core.vertical import VerticalConfig, even_chunks
    from core.vertical_conversion import convert_to_vertical

    if target.exists():
        raise click.ClickException(f"{target} exists already")
    with told_plainly(*offline_errors(), OSError), tempfile.TemporaryDirectory() as folder:
        num_layers = read_model_config(source).num_layers
        sizes = even_chunks(num_layers, chunks)
        config = VerticalConfig(sizes, rank, float(rank), increments)  # type: ignore[arg-type]
        made = Path(folder) / "vertical"
        total = (num_layers - chunks) * len(config.target_modules)
        with click.progressbar(length=total, label="factorising") as bar:
            fits = convert_to_vertical(source, made, config, progress=lambda fit: bar.update(1))
        _report(source, made, config, fits, text)
        if not accept_loss:
            raise click.ClickException(
                "nothing was written: a vertical base is trained, not converted; --accept-loss "
                "writes this one all the same"
            )
        shutil.move(made, target)
    click.echo(f"{target} is written")


def _report(
    source: Path, made: Path, config: VerticalConfig, fits: Sequence[MatrixFit], text: Path | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "relative error", "rank alone", "cosine to the layer before")
    for name in config.target_modules:
        own = [fit for fit in fits if fit.key.projection == name]
        if own:
            columns = ([f.error for f in own], [f.alone for f in own], [f.cosine for f in own])
            table.add_row(name, *(spread(column) for column in columns))
    Console().print(table)
    before, after = (_perplexity(path, text) for path in (source, made))
    sizes = [
        sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (source, made)
    ]
    click.echo(
        f"chunks of {', '.join(map(str, config.chunk_sizes))} layers, rank {config.rank}, "
        f"{config.increments}\n"
        f"weights: {sizes[0]:,} bytes -> {sizes[1]:,}, {sizes[1] / sizes[0]:.1%}\n"
        f"perplexity over {_WINDOWS} times {_WINDOW} tokens: {before:.2f} -> {after:,.2f}"
    )


def _perplexity(model: Path, text: Path | None) -> float:
    from core import LLM, EngineConfig
    from core.perplexity import perplexity, read_tokens, spread_windows

    llm = LLM(model, EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=1 << 28))
    tokens = llm.tokenizer(_text(text), verbose=False).input_ids
    if len(tokens) < 2 * _WINDOW:
        raise click.ClickException(f"{text} has {len(tokens)} tokens, {2 * _WINDOW} are needed")
    windows = spread_windows(tokens, _WINDOWS, min(_WINDOW, llm.engine.max_model_len))
    return perplexity([place.logprob for place in read_tokens(llm, windows)])


def _text(text: Path | None) -> str:
    if text is not None:
        return text.read_text(errors="replace")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
