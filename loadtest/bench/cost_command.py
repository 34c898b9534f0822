"""`make bench-cost`: how a decode step grows, written to COST.md, cost.json and cost.png."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from loadtest.bench.console import (
    base_option,
    conditions_now,
    out_option,
    run,
    say,
    short_option,
)
from loadtest.bench.cost import COST_SHORT, CostBench, CostSizes
from loadtest.bench.cost_page import cost_page, write_cost_chart, write_cost_json
from loadtest.bench.inputs import default_base, prepare, tiny_base
from loadtest.bench.limit import measure_speed
from loadtest.bench.plan import FULL, SHORT


@click.command()
@short_option
@click.option("--rounds", type=click.IntRange(min=1), help="[default: 3; short: 1]")
@base_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the engine.")
@out_option
def main(**options: Any) -> None:
    """Time decode steps by number of sequences, by context, by rank: COST.md.

    Fails when something cannot run or an answer that was judged is not exact, never on a time.
    """
    run(bench_cost, options)


def bench_cost(
    *, short: bool, rounds: int | None, base: Path | None, threads: int | None, out: Path
) -> None:
    """Run with the command's options. Raises LoadtestError."""
    bench_sizes, sizes = (SHORT, COST_SHORT) if short else (FULL, CostSizes())
    cache = out / "cache"
    inputs = prepare(base or (tiny_base(cache) if short else default_base()), bench_sizes, cache)
    speed = measure_speed(threads, short=short)
    with ExitStack() as stack:
        bench = CostBench(stack, inputs, bench_sizes, sizes, threads=threads, out=out, say=say)
        result = bench.run(rounds or (1 if short else 3), speed)
    conditions = conditions_now()
    page = cost_page(result, conditions)
    (out / "COST.md").write_text(page)
    write_cost_json(out / "cost.json", result, conditions)
    write_cost_chart(out / "cost.png", result, conditions)
    click.echo(page)
    if result.exactness is not None:
        result.exactness.refuse_inexact()


if __name__ == "__main__":
    main()
