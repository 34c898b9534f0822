"""A run's plots on one PNG: what a reader asks first, each panel answering one question.

Draws on figures of its own without pyplot, so importing it sets no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.records import RequestRecord
from loadtest.run import RunResult
from loadtest.stats import Summary, timeline

_INK, _BLUE, _ORANGE, _RED, _GREY = "#222222", "#2563a8", "#d9822b", "#c23030", "#9aa5b1"
_MODELS_SHOWN = 24
_LEGEND: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.9}
_MILLI = 1000.0


def write_png(path: Path, result: RunResult, summary: Summary, title: str) -> None:
    """Draw six panels: three latency curves, throughput, latency over time, TTFT per model."""
    good = [record for record in result.records if record.error is None]
    figure = Figure(figsize=(15, 8.6), layout="constrained")
    figure.suptitle(f"{title}\n{_headline(summary)}", fontsize=12, color=_INK)
    panels = figure.subplots(2, 3)
    _cdf(panels[0][0], "Time to first token", {"TTFT": [r.ttft for r in good]})
    gaps = {
        "per token": [gap for record in good for gap in record.token_gaps()],
        "between chunks": [gap for record in good for gap in record.chunk_gaps()],
    }
    _cdf(panels[0][1], "Time between tokens", gaps)
    _cdf(panels[0][2], "End to end", {"e2e": [r.e2e for r in good]})
    _throughput(panels[1][0], result)
    _over_time(panels[1][1], result)
    _per_model(panels[1][2], good, result.base_model)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white")


def _headline(summary: Summary) -> str:
    errors = sum(summary.errors.values())
    return (
        f"{summary.completed} requests in {summary.window_seconds:.1f} s · "
        f"{summary.output_tokens_per_second:.1f} output tok/s · "
        f"{summary.requests_per_second:.2f} requests/s · {errors} errors"
    )


def _style(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", color=_INK)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="#e3e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _cdf(axes: Axes, title: str, curves: dict[str, list[float]]) -> None:
    """Share of values at or below x, with the percentiles of the first curve marked."""
    _style(axes, title, "ms", "share at or below")
    for (label, values), colour in zip(curves.items(), (_BLUE, _GREY), strict=False):
        if not values:
            axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=_GREY)
            return
        ordered = np.sort(np.asarray(values)) * _MILLI
        shares = np.arange(1, ordered.size + 1) / ordered.size
        style = "-" if colour == _BLUE else "--"
        axes.step(ordered, shares, style, where="post", color=colour, linewidth=1.8, label=label)
    first = np.asarray(next(iter(curves.values()))) * _MILLI
    marks = np.percentile(first, (50, 95, 99), method="inverted_cdf")
    for share, value, colour in zip((50, 95, 99), marks, (_INK, _ORANGE, _RED), strict=True):
        axes.axvline(value, color=colour, linewidth=0.9, linestyle=":")
        axes.plot([], [], ":", color=colour, label=f"p{share} {value:,.1f} ms")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0, right=_right_edge(first, float(marks[2])))
    axes.legend(loc="lower right", fontsize=8, **_LEGEND)


def _right_edge(values: np.ndarray, p99: float) -> float:
    """Past p99, but not so far that one outlier flattens the curve."""
    return max(min(float(values.max()), p99 * 1.6) * 1.05, 1e-3)


def _throughput(axes: Axes, result: RunResult) -> None:
    line = timeline(result.records, result.window_seconds)
    _style(axes, "Throughput and load over time", "seconds", "output tok/s")
    at = (np.arange(len(line.tokens_per_second)) + 0.5) * line.bin_seconds
    axes.fill_between(at, line.tokens_per_second, color=_BLUE, alpha=0.15, linewidth=0)
    axes.plot(at, line.tokens_per_second, color=_BLUE, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.yaxis.label.set_color(_BLUE)
    other = axes.twinx()
    other.plot(at, line.in_flight, color=_ORANGE, linewidth=1.3, linestyle="--")
    other.set_ylabel("requests in flight", color=_ORANGE)
    other.set_ylim(0, max(line.in_flight, default=0.0) * 1.15 + 1)
    other.spines[["top"]].set_visible(False)


def _over_time(axes: Axes, result: RunResult) -> None:
    """One dot per request where it was due; failures as crosses on the floor."""
    _style(axes, "Time to first token by the time a request was due", "seconds", "ms")
    kinds = {
        "base": (
            _GREY,
            [r for r in result.records if not r.error and r.model == result.base_model],
        ),
        "adapters": (
            _BLUE,
            [r for r in result.records if not r.error and r.model != result.base_model],
        ),
    }
    for label, (colour, records) in kinds.items():
        if records:
            due, ttft = [r.due for r in records], [r.ttft * _MILLI for r in records]
            axes.scatter(due, ttft, s=14, color=colour, alpha=0.7, linewidths=0, label=label)
    failed = [record.due for record in result.records if record.error]
    if failed:
        axes.scatter(failed, [0.0] * len(failed), marker="x", s=24, color=_RED, label="failed")
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=8, **_LEGEND)


def _per_model(axes: Axes, good: Sequence[RequestRecord], base_model: str) -> None:
    """Median and p99 of TTFT for the most requested models, most requested first."""
    groups: dict[str, list[float]] = {}
    for record in good:
        groups.setdefault(record.model, []).append(record.ttft * _MILLI)
    ranked = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:_MODELS_SHOWN]
    more = f" ({len(ranked)} busiest of {len(groups)})" if len(groups) > len(ranked) else ""
    _style(axes, f"Time to first token per model{more}", "ms", "")
    for row, (model, values) in enumerate(ranked):
        middle, high = np.percentile(values, (50, 99), method="inverted_cdf")
        colour = _GREY if model == base_model else _BLUE
        axes.plot([min(values), high], [row, row], color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(middle, row, "o", color=colour, markersize=5)
        axes.plot(high, row, "|", color=_RED, markersize=8)
    labels = [f"{_short(model)} x{len(values)}" for model, values in ranked]
    axes.set_yticks(range(len(ranked)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.plot([], [], "o", color=_BLUE, label="median")
    axes.plot([], [], "|", color=_RED, label="p99")
    axes.legend(loc="best", fontsize=8, **_LEGEND)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"…{name[-23:]}"
