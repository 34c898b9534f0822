"""`make bench-scale`: thousands of adapters in one server, written to SCALE.md and scale.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import click

from loadtest.bench.inputs import default_base, prepare
from loadtest.bench.machine import describe_machine
from loadtest.bench.plan import FULL
from loadtest.bench.scale import ScaleBench, ScaleResult
from loadtest.bench.tables import plain, table
from loadtest.errors import LoadtestError
from loadtest.stats import Distribution

_MIB = 2**20


@click.command()
@click.option("--adapters", type=click.IntRange(min=200), default=10_000, show_default=True)
@click.option("--shared-bank", is_flag=True, help="All over one bank, not a bank each.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A Hugging Face folder. [default: the project's default base]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="bench-out",
    show_default=True,
)
def main(adapters: int, shared_bank: bool, rounds: int, base: Path | None, out: Path) -> None:
    """Register thousands of adapters in one server and measure what they cost."""
    try:
        inputs = prepare(base or default_base(), FULL, out / "cache")
        with ExitStack() as stack:
            bench = ScaleBench(
                stack, inputs, FULL, adapters, shared_bank=shared_bank, out=out, say=_say
            )
            result = bench.run(rounds)
    except LoadtestError as error:
        raise click.ClickException(str(error)) from error
    page = scale_page(result, {"date": datetime.now(UTC).date().isoformat(), **describe_machine()})
    name = "scale-shared" if shared_bank else "scale"
    (out / f"{name.upper()}.md").write_text(page)
    (out / f"{name}.json").write_text(json.dumps(asdict(result), indent=1))
    click.echo(page)


def scale_page(result: ScaleResult, conditions: dict[str, object]) -> str:
    """The figures as Markdown."""
    bank = "one shared bank" if result.shared_bank else "a bank each"
    rows = [
        ["memory (PSS) per registered adapter, none used yet", _share(result.pss_bytes, result)],
        ["the same as LoRA of that rank, fp32, by that memory", _times(result)],
        ["disk per registered adapter", _share(result.store_bytes, result)],
        ["POST /v1/adapters, the first 100, p50 / max", _pair(result.first_registrations)],
        ["the last 100", _pair(result.last_registrations)],
        ["100 beside 16 running streams", _pair(result.registrations_under_load)],
    ]
    rates = [
        ("base alone, no adapter registered", result.base_without, None),
        ("base alone, all registered", result.base_with, result.base_without),
        ("16 clients, Zipf's law over 64", result.zipf_few, None),
        ("16 clients, Zipf's law over all", result.zipf_all, result.zipf_few),
        ("16 streams of the base", result.quiet, None),
        ("the same while 100 are registered", result.registering, result.quiet),
    ]
    lines = [f"- {name}: {plain(value)}" for name, value in conditions.items()]
    busiest = max(result.foreign_cores, default=0.0)
    return (
        "\n\n".join(
            [
                f"# {result.num_adapters:,} adapters in one server, {bank}",
                table(["", ""], rows),
                f"Output tokens a second, prefill included; medians of {len(result.quiet)} rounds "
                "(lowest to highest); ratios to the line above, medians of each round's.",
                table(
                    ["", "tok/s", "ratio"],
                    [
                        [name, _rate(own), f"{result.ratio(own, other):.2f}" if other else ""]
                        for name, own, other in rates
                    ],
                ),
                "\n".join([*lines, f"- other programs: at most {busiest:.2f} cores in a wave"]),
            ]
        )
        + "\n"
    )


def _share(num_bytes: int | None, result: ScaleResult) -> str:
    return "-" if num_bytes is None else f"{num_bytes / result.num_adapters / _MIB:.3f} MiB"


def _times(result: ScaleResult) -> str:
    if not result.pss_bytes or result.pss_bytes < 0:
        return "-"
    return f"{result.lora_bytes / (result.pss_bytes / result.num_adapters):.1f} times"


def _pair(seconds: Distribution) -> str:
    return f"{(seconds.p50 or 0.0) * 1e3:.1f} / {(seconds.max or 0.0) * 1e3:.1f} ms"


def _rate(rates: Sequence[float]) -> str:
    return f"{median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


def _say(message: str) -> None:
    click.echo(message, err=True)


if __name__ == "__main__":
    main()
