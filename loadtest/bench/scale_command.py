"""`make bench-scale`: thousands of adapters in one server, written to SCALE.md and scale.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
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
from loadtest.bench.inputs import default_base, prepare, tiny_base
from loadtest.bench.plan import FULL, SHORT
from loadtest.bench.scale import SCALE_SHORT, ScaleBench, ScaleResult, ScaleSizes
from loadtest.bench.tables import plain, table
from loadtest.stats import Distribution

_MIB = 2**20


@click.command()
@short_option
@click.option("--adapters", type=click.IntRange(min=1), help="[default: 10,000; short: 8]")
@click.option("--shared-bank", is_flag=True, help="All over one bank, not a bank each.")
@click.option("--rounds", type=click.IntRange(min=1), help="[default: 3; short: 1]")
@base_option
@out_option
def main(**options: Any) -> None:
    """Register thousands of adapters in one server and measure what they cost: SCALE.md.

    Fails when something cannot run or an answer that was judged is not exact, never on a time.
    """
    run(bench_scale, options)


def bench_scale(
    *,
    short: bool,
    adapters: int | None,
    shared_bank: bool,
    rounds: int | None,
    base: Path | None,
    out: Path,
) -> None:
    """Run with the command's options. Raises LoadtestError."""
    sizes, scale = (SHORT, SCALE_SHORT) if short else (FULL, ScaleSizes())
    if adapters:
        scale = replace(scale, num_adapters=adapters)
    cache = out / "cache"
    inputs = prepare(base or (tiny_base(cache) if short else default_base()), sizes, cache)
    with ExitStack() as stack:
        bench = ScaleBench(stack, inputs, sizes, scale, shared_bank=shared_bank, out=out, say=say)
        result = bench.run(rounds or (1 if short else 3))
    page = scale_page(result, conditions_now())
    name = "scale-shared" if shared_bank else "scale"
    (out / f"{name.upper()}.md").write_text(page)
    (out / f"{name}.json").write_text(json.dumps(asdict(result), indent=1))
    click.echo(page)
    if result.exactness is not None:
        result.exactness.refuse_inexact()


def scale_page(result: ScaleResult, conditions: dict[str, object]) -> str:
    """The figures as Markdown."""
    num = result.first_registrations.count
    bank = "one shared bank" if result.shared_bank else "a bank each"
    rows = [
        ["memory (PSS) per registered adapter, none used yet", _share(result.pss_bytes, result)],
        ["the same as LoRA of that rank, fp32, by that memory", _times(result)],
        ["disk per registered adapter", _share(result.store_bytes, result)],
        [f"POST /v1/adapters, the first {num}, p50 / max", _pair(result.first_registrations)],
        [f"the last {num}", _pair(result.last_registrations)],
        [f"{num} beside running streams", _pair(result.registrations_under_load)],
    ]
    rates = [
        ("base alone, no adapter registered", result.base_without, None),
        ("base alone, all registered", result.base_with, result.base_without),
        (f"Zipf's law over {result.num_few}", result.zipf_few, None),
        ("Zipf's law over all", result.zipf_all, result.zipf_few),
        ("streams of the base", result.quiet, None),
        (f"the same while {num} are registered", result.registering, result.quiet),
    ]
    lines = [f"- {name}: {plain(value)}" for name, value in conditions.items()]
    exact = result.exactness.words() if result.exactness else "not judged"
    busiest = max(result.foreign_cores, default=0.0)
    return (
        "\n\n".join(
            [
                f"# {result.num_adapters:,} adapters in one server, {bank}",
                table(["", ""], rows),
                f"Output tokens a second of {result.num_clients} clients, prefill included; "
                f"medians of {len(result.quiet)} rounds (lowest to highest); ratios to the line "
                "above, medians of each round's.",
                table(
                    ["", "tok/s", "ratio"],
                    [
                        [name, _rate(own), f"{result.ratio(own, other):.2f}" if other else ""]
                        for name, own, other in rates
                    ],
                ),
                f"Equal to PEFT's fp32 VB-LoRA: {exact}.",
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


if __name__ == "__main__":
    main()
