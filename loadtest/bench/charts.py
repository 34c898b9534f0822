"""The bench's figures on one PNG: throughput with every round shown, and the two latencies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from loadtest.bench.contestants import (
    LLAMA_F32,
    LLAMA_Q8,
    OPENVINO,
    OURS_ENGINE,
    OURS_HTTP,
    PEFT_MIXED,
    PEFT_SINGLE,
    VLLM,
)
from loadtest.bench.report import Report
from loadtest.bench.results import Cell
from loadtest.stats import Distribution

_COLOURS = {
    OURS_HTTP: "#2563a8",
    OURS_ENGINE: "#7fb2e5",
    PEFT_MIXED: "#d9822b",
    PEFT_SINGLE: "#f0c08c",
    VLLM: "#7a4fa3",
    LLAMA_F32: "#3f8f5b",
    LLAMA_Q8: "#9fd0a9",
    OPENVINO: "#b8434e",
}
_OTHER, _INK = "#9aa5b1", "#222222"
_GROUP_WIDTH = 0.82
_LEGEND_COLUMNS = 4


def write_chart(path: Path, report: Report) -> None:
    """Draw throughput above, times to first token and between tokens below."""
    figure = Figure(figsize=(13, 8.4), layout="constrained")
    figure.suptitle(_title(report), fontsize=12, color=_INK)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1))
    _throughput(figure.add_subplot(grid[0, :]), report)
    _latency(figure.add_subplot(grid[1, 0]), report, "Time to first token", first=True)
    _latency(figure.add_subplot(grid[1, 1]), report, "Time between tokens", first=False)
    figure.savefig(path, dpi=110, facecolor="white")


def _title(report: Report) -> str:
    sizes, conditions = report.sizes, report.conditions
    return (
        f"{sizes.num_adapters} VB-LoRA adapters of rank {sizes.rank}, "
        f"{sizes.prompt_tokens} + {sizes.max_tokens} tokens, {sizes.num_clients} clients\n"
        f"{conditions['cores']} cores of {conditions['cpu']}, {conditions['date']}, "
        f"{report.num_rounds} rounds"
    )


def _style(axes: Axes, report: Report, title: str, y_label: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", color=_INK)
    axes.set_ylabel(y_label)
    axes.set_xticks(range(len(report.workloads)), report.workloads)
    axes.grid(axis="y", color="#e3e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _places(report: Report) -> list[tuple[float, float, str, Cell]]:
    """x, width, contestant and cell of every bar; absent contestants leave no hole."""
    places = []
    for column, workload in enumerate(report.workloads):
        there = [name for name in report.contestants if (name, workload) in report.cells]
        width = _GROUP_WIDTH / max(1, len(there))
        for place, name in enumerate(there):
            x = column + (place - (len(there) - 1) / 2) * width
            places.append((x, width * 0.92, name, report.cells[name, workload]))
    return places


def _throughput(axes: Axes, report: Report) -> None:
    _style(axes, report, "Output tokens a second (bars: median; dots: rounds)", "tok/s")
    places = _places(report)
    for x, width, name, cell in places:
        axes.bar(x, cell.tokens_per_second, width, color=_COLOURS.get(name, _OTHER))
        axes.plot([x] * len(cell.rounds), cell.rounds, ".", color=_INK, markersize=4, alpha=0.6)
        top = max(cell.rounds)
        text = f"{cell.tokens_per_second:.0f}"
        axes.annotate(
            text,
            (x, top),
            (0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8 if len(places) < 25 else 6.5,
            color=_INK,
        )
    for name in report.contestants:
        axes.bar(0, 0, color=_COLOURS.get(name, _OTHER), label=name)
    axes.margins(y=0.12)
    axes.legend(loc="upper left", fontsize=8, frameon=False, ncols=_LEGEND_COLUMNS)
    axes.set_ylim(top=axes.get_ylim()[1] * (1.1 if len(report.contestants) <= 4 else 1.2))


def _latency(axes: Axes, report: Report, title: str, *, first: bool) -> None:
    _style(axes, report, f"{title} (dot: p50, bar: p99)", "ms, logarithmic")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    for x, _, name, cell in _places(report):
        values: Distribution = cell.ttft if first else cell.time_between_tokens
        if values.p50 is None or values.p99 is None:
            continue
        low, high = np.array([values.p50, values.p99]) * 1000
        colour = _COLOURS.get(name, _OTHER)
        axes.plot([x, x], [low, high], color=colour, linewidth=2)
        axes.plot(x, low, "o", color=colour, markersize=6)
        axes.plot(x, high, "_", color=colour, markersize=9, markeredgewidth=2)
    axes.set_xlim(-0.6, len(report.workloads) - 0.4)
