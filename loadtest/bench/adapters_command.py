"""`make bench-adapters`: speed and memory by number of adapters, to ADAPTERS.md, .json and .png."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from loadtest.bench.adapters import COUNTS, SHORT_COUNTS, AdaptersBench
from loadtest.bench.adapters_page import adapters_page, write_adapters_chart
from loadtest.bench.console import (
    base_option,
    conditions_now,
    out_option,
    run,
    say,
    short_option,
)
from loadtest.bench.inputs import default_base, prepare, tiny_base
from loadtest.bench.plan import FULL, SHORT
from loadtest.distributions import POPULARITY_SYNTAX, parse_popularity
from loadtest.errors import BenchError


@click.command()
@short_option
@click.option("--counts", help="Numbers of adapters. [default: 0,1,4,16,64,1000,10000]")
@click.option("--popularity", default="uniform", show_default=True, help=POPULARITY_SYNTAX)
@click.option("--rounds", type=click.IntRange(min=1), help="[default: 3; short: 1]")
@base_option
@out_option
def main(**options: Any) -> None:
    """Spread requests over more and more registered adapters: ADAPTERS.md.

    Fails when something cannot run or an answer that was judged is not exact, never on a time.
    """
    run(bench_adapters, options)


def bench_adapters(
    *,
    short: bool,
    counts: str | None,
    popularity: str,
    rounds: int | None,
    base: Path | None,
    out: Path,
) -> None:
    """Run with the command's options. Raises LoadtestError."""
    numbers = parse_counts(counts) if counts else SHORT_COUNTS if short else COUNTS
    law, sizes, cache = parse_popularity(popularity), SHORT if short else FULL, out / "cache"
    inputs = prepare(base or (tiny_base(cache) if short else default_base()), sizes, cache)
    with ExitStack() as stack:
        bench = AdaptersBench(
            stack, inputs, sizes, numbers, popularity=(popularity, law), out=out, say=say
        )
        result = bench.run(rounds or (1 if short else 3))
    conditions = conditions_now()
    page = adapters_page(result, conditions)
    (out / "ADAPTERS.md").write_text(page)
    content = {"conditions": conditions, **asdict(result)}
    (out / "adapters.json").write_text(json.dumps(content, indent=1) + "\n")
    write_adapters_chart(out / "adapters.png", result, conditions)
    click.echo(page)
    if result.exactness is not None:
        result.exactness.refuse_inexact()


def parse_counts(text: str) -> tuple[int, ...]:
    """`0,1,16` → rising numbers, 0 always among them. Raises BenchError."""
    try:
        numbers = {int(word) for word in text.split(",")}
    except ValueError as error:
        raise BenchError(f"counts {text!r} are not numbers with commas between") from error
    if min(numbers) < 0:
        raise BenchError(f"counts {text!r} must not be negative")
    return tuple(sorted({0, *numbers}))


if __name__ == "__main__":
    main()
