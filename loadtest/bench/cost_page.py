"""The cost of a decode step as Markdown, JSON and one PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes

from loadtest.bench.cost import CostResult, Point
from loadtest.bench.drawing import BLUE, GREY, ORANGE, label, new_figure, powers_of_two, save, style
from loadtest.bench.tables import plain, table


def cost_page(result: CostResult, conditions: Mapping[str, object]) -> str:
    """The whole page."""
    sizes, speed = result.sizes, result.speed
    lines = [f"- {name}: {plain(value)}" for name, value in conditions.items()]
    busiest = max(result.foreign_cores, default=0.0)
    exact = result.exactness.words() if result.exactness else "not judged"
    parts = [
        "# What a decode step costs",
        f"The bare engine, ms of one step: medians of {sizes.num_steps} steps, of these the median "
        f"of {len(next(iter(result.seconds.values())))} rounds. Adapters are of rank "
        f"{result.rank}, one for each sequence. Limit: the base's step at this machine's "
        f"{speed.flops_per_second / 1e9:.0f} GFLOP/s and {speed.bytes_per_second / 1e9:.0f} GB/s.",
        f"## By number of sequences, {sizes.context} tokens of context",
        _both("sequences", [(num, num, sizes.context) for num in sizes.sequences], result),
        f"## By context, {sizes.num_sequences} sequences",
        _both("context", [(c, sizes.num_sequences, c) for c in sizes.contexts], result),
        f"## By rank, {sizes.num_sequences} sequences, {sizes.context} tokens of context",
        _by_rank(result),
        f"Equal to PEFT's fp32 VB-LoRA: {exact}.",
        "\n".join([*lines, f"- other programs: at most {busiest:.2f} cores at a point"]),
    ]
    return "\n\n".join(parts) + "\n"


def _both(name: str, places: Sequence[tuple[int, int, int]], result: CostResult) -> str:
    rows = []
    for value, num, context in places:
        base, own = result.at(num, context, None), result.at(num, context, result.rank)
        limit = result.limits[Point(num, context, None)]
        cells = [f"{limit * 1e3:.1f}", f"{base * 1e3:.1f}", f"{own * 1e3:.1f}"]
        rows.append([f"{value:,}", *cells, f"{own / base:.2f}", f"{num / own:,.0f}"])
    headers = [name, "limit", "base", "with adapters", "by the base's", "tok/s with adapters"]
    return table(headers, rows)


def _by_rank(result: CostResult) -> str:
    sizes = result.sizes
    base = result.at(sizes.num_sequences, sizes.context, None)
    rows = [["none", f"{base * 1e3:.1f}", "1.00"]]
    for rank in sizes.ranks:
        own = result.at(sizes.num_sequences, sizes.context, rank)
        rows.append([str(rank), f"{own * 1e3:.1f}", f"{own / base:.2f}"])
    return table(["rank", "ms", "by the base's"], rows)


def write_cost_json(path: Path, result: CostResult, conditions: Mapping[str, object]) -> None:
    """Write conditions, and every point with its rounds."""
    content = {
        "conditions": conditions,
        "sizes": asdict(result.sizes),
        "speed": asdict(result.speed),
        "points": [
            {**asdict(point), "seconds": seconds, "limit_seconds": result.limits[point]}
            for point, seconds in result.seconds.items()
        ],
        "foreign_cores": result.foreign_cores,
        "exactness": asdict(result.exactness) if result.exactness else None,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_cost_chart(path: Path, result: CostResult, conditions: Mapping[str, object]) -> None:
    """Draw the three curves side by side."""
    sizes = result.sizes
    figure, panels = new_figure("Time of a decode step, bare engine", conditions, columns=3)
    title = f"By sequences ({sizes.context} tokens of context)"
    style(panels[0], title, "sequences, an adapter each", "ms")
    _curves(panels[0], [(num, num, sizes.context) for num in sizes.sequences], result)
    style(panels[1], f"By context ({sizes.num_sequences} sequences)", "tokens of context", "ms")
    _curves(panels[1], [(c, sizes.num_sequences, c) for c in sizes.contexts], result)
    style(panels[2], f"By rank ({sizes.num_sequences} sequences)", "rank of all adapters", "ms")
    _rank_curve(panels[2], result)
    save(figure, path)


def _curves(axes: Axes, places: Sequence[tuple[int, int, int]], result: CostResult) -> None:
    values = [value for value, _, _ in places]
    for name, rank, colour in (
        (f"adapters of rank {result.rank}", result.rank, BLUE),
        ("base", None, ORANGE),
    ):
        steps = [result.at(num, context, rank) * 1e3 for _, num, context in places]
        axes.plot(values, steps, "o-", color=colour, markersize=4, label=name)
        if rank is not None:
            for value, step in zip(values, steps, strict=True):
                label(axes, value, step, f"{step:.0f}")
    limits = [result.limits[Point(num, context, None)] * 1e3 for _, num, context in places]
    axes.plot(values, limits, "--", color=GREY, label="limit of the base")
    powers_of_two(axes, values)
    _from_zero(axes)


def _rank_curve(axes: Axes, result: CostResult) -> None:
    sizes = result.sizes
    steps = [result.at(sizes.num_sequences, sizes.context, rank) * 1e3 for rank in sizes.ranks]
    axes.plot(sizes.ranks, steps, "o-", color=BLUE, markersize=4, label="adapters")
    for rank, step in zip(sizes.ranks, steps, strict=True):
        label(axes, rank, step, f"{step:.1f}")
    base = result.at(sizes.num_sequences, sizes.context, None) * 1e3
    axes.axhline(base, color=ORANGE, label=f"base, {base:.1f}")
    powers_of_two(axes, sizes.ranks)
    _from_zero(axes)


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, axes.get_ylim()[1] * 1.3)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
