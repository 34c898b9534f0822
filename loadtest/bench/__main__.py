"""The bench's command line: prepare, start contestants, take turns, judge, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from loadtest.bench.charts import write_chart
from loadtest.bench.console import (
    base_option,
    conditions_now,
    out_option,
    run,
    say,
    short_option,
)
from loadtest.bench.inputs import default_base, prepare, tiny_base
from loadtest.bench.limit import limits_of, measure_speed, read_shape
from loadtest.bench.markdown import markdown
from loadtest.bench.peers import PEERS, chosen_peers, hint, missing_peers, versions
from loadtest.bench.plan import FULL, SHORT, WORKLOADS, make_plan
from loadtest.bench.report import Report, refuse_inexact, write_json
from loadtest.bench.results import cells_of
from loadtest.bench.session import OWN_PARTS, Session

_SHORT_WORKLOADS = ("W2", "W3")


@click.command()
@short_option
@click.option("--rounds", type=click.IntRange(min=1), help="[default: 5; short: 1]")
@click.option("--workloads", help=f"Some of {','.join(WORKLOADS)}. [default: all; short: W2,W3]")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice([*OWN_PARTS, *(peer.part for peer in PEERS)]),
    help="Measure only this; may be repeated. PEFT judges in any case. "
    "[default: ours, PEFT and the peers that are installed; short: no peers]",
)
@base_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each contestant.")
@out_option
def main(**options: Any) -> None:
    """Compare this project's server and engine with plain PEFT and other servers: BENCH.md.

    Fails when something cannot run or an answer of ours is not exact, never on a time.
    """
    run(bench, options)


def bench(
    *,
    short: bool,
    rounds: int | None,
    workloads: str | None,
    parts: Sequence[str],
    base: Path | None,
    threads: int | None,
    out: Path,
) -> None:
    """Run the bench with the command's options. Raises LoadtestError."""
    sizes = SHORT if short else FULL
    names = workloads.split(",") if workloads else _SHORT_WORKLOADS if short else tuple(WORKLOADS)
    num_rounds = rounds or (1 if short else 5)
    cache, homes = out / "cache", out / "peers"
    peers = chosen_peers(parts, homes, is_short=short)
    missing = [] if parts or short else missing_peers(PEERS, homes)
    say("preparing base, adapters and prompts")
    inputs = prepare(base or (tiny_base(cache) if short else default_base()), sizes, cache)
    plan = make_plan(inputs.prompts, sizes, num_rounds, names)
    say("measuring what this machine can do at best")
    speed = measure_speed(threads, short=short)
    with ExitStack() as stack:
        session = Session(stack, plan, inputs, out, threads, say)
        contestants = session.start(parts or OWN_PARTS, peers)
        results = session.take_turns(contestants)
        results = session.judged(results)
        reach = session.reach()
    speed = speed.at_best(measure_speed(threads, short=short))
    report = Report(
        conditions={
            **conditions_now(),
            "threads": session.peft.ready["threads"],
            "versions": {**session.peft.ready["versions"], "vbserve": version("vbserve")},
            **({"peers": versions(peers, homes)} if peers else {}),
            **({"other servers": hint(missing)} if missing else {}),
        },
        sizes=sizes,
        num_rounds=num_rounds,
        cells=cells_of(results),
        rounds=results,
        lifecycle=session.lifecycle,
        reach=reach,
        speed=speed,
        limits=limits_of(read_shape(inputs.base), speed, sizes, plan.workloads),
    )
    _write(out, report)
    refuse_inexact(report)


def _write(out: Path, report: Report) -> None:
    page = markdown(report)
    (out / "BENCH.md").write_text(page)
    write_json(out / "bench.json", report)
    write_chart(out / "bench.png", report)
    click.echo(page)


if __name__ == "__main__":
    main()
