"""The look of the bench's plots by one variable: colours, axes, and a title with the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

INK, BLUE, ORANGE, GREY = "#222222", "#2563a8", "#d9822b", "#9aa5b1"


def new_figure(
    title: str, conditions: Mapping[str, object], columns: int, rows: int = 1
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with its machine and date above, and its panels in reading order."""
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.7), layout="constrained")
    machine = f"{conditions['cores']} cores of {conditions['cpu']}, {conditions['date']}"
    figure.suptitle(f"{title}\n{machine}", fontsize=11, color=INK)
    panels = figure.subplots(rows, columns, squeeze=False)
    return figure, [axes for row in panels for axes in row]


def style(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Labels, a light grid, no box."""
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#e3e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def powers_of_two(axes: Axes, values: Sequence[int]) -> None:
    """A logarithmic x axis with exactly these ticks."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(values, [f"{value:,}" for value in values])


def label(axes: Axes, x: float, y: float, text: str, *, below: bool = False) -> None:
    """A small number above (or below) a point."""
    offset = (0, -12 if below else 5)
    axes.annotate(
        text, (x, y), offset, textcoords="offset points", ha="center", fontsize=8, color=INK
    )


def save(figure: Figure, path: Path) -> None:
    """Write the PNG."""
    figure.savefig(path, dpi=100, facecolor="white")
