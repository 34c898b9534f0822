"""Tables and plots of what has been run. Knows nothing of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from deploy.ablations.variants import ABLATIONS, Ablation, name_of

_Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
_WIDTH, _HEIGHT = 8.4, 3.2


def write_page(results: _Results, file: Path) -> None:
    """RESULTS.md: a table and a plot of each ablation."""
    parts = ["# What was measured", _conditions(results)]
    for key, ablation in ABLATIONS.items():
        parts += [
            f"## {ablation.title}",
            _table(results, ablation),
            f"![{ablation.title}]({key}.png)",
        ]
    file.write_text("\n\n".join(parts) + "\n")


def _conditions(results: _Results) -> str:
    runs = [run for by_name in results.values() for run in by_name.values()]
    steps = sorted({run["num_steps"] for run in runs})
    seeds = sorted({run["seed"] for run in runs})
    made = f"{len(runs)} runs of {', '.join(map(str, steps))} steps"
    return (
        f"{made}, seeds {', '.join(map(str, seeds))}. "
        "Right answers of 64 held-out messages by task, their mean, the mean held-out loss in nats "
        "a token, and what an adapter takes in fp32 (in brackets what it adds to a shared bank)."
    )


def _table(results: _Results, ablation: Ablation) -> str:
    tasks = sorted(results)
    lines = [
        f"| {ablation.axis or ''} | {' | '.join(tasks)} | mean | held-out loss | bytes |",
        "|---" * (len(tasks) + 4) + "|",
    ]
    for label, variant in ablation.variants.items():
        runs = _runs(results, name_of(variant))
        if not runs:
            continue
        cells = [f"{runs[task]['accuracy']:.1%}" if task in runs else "-" for task in tasks]
        some = next(iter(runs.values()))
        size = f"{some['bytes']:,}"
        if some["own_bytes"] != some["bytes"]:
            size += f" ({some['own_bytes']:,})"
        both = f"{_mean(runs, 'accuracy'):.1%} | {_mean(runs, 'held_out_loss'):.4f}"
        if len(runs) < len(tasks):
            both = "- | -"  # a mean of other tasks than the other rows'
        lines.append(f"| {label} | {' | '.join(cells)} | {both} | {size} |")
    return "\n".join(lines)


def _runs(results: _Results, name: str) -> dict[str, Mapping[str, Any]]:
    return {task: by_name[name] for task, by_name in results.items() if name in by_name}


def _mean(runs: Mapping[str, Mapping[str, Any]], key: str) -> float:
    return mean(run[key] for run in runs.values())


def draw_all(results: _Results, out: Path) -> None:
    """A picture of each ablation of which anything has been run."""
    for key, ablation in ABLATIONS.items():
        labels = [label for label, v in ablation.variants.items() if _runs(results, name_of(v))]
        if labels:
            _draw(results, ablation, labels, out / f"{key}.png")


def _draw(results: _Results, ablation: Ablation, labels: Sequence[str], file: Path) -> None:
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"accuracy": "right answers", "held_out_loss": "held-out loss, nats a token"}
    for axes, (measure, title) in zip(panels, titles.items(), strict=True):
        for task in sorted(results):
            points = [
                (place, results[task][name][measure])
                for place, label in enumerate(labels)
                if (name := name_of(ablation.variants[label])) in results[task]
            ]
            style = "o-" if ablation.axis else "o"
            axes.plot(*zip(*points, strict=True), style, label=task, markersize=5, linewidth=1.2)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xticks(range(len(labels)), [label.replace(", ", ",\n") for label in labels])
        axes.tick_params(axis="x", labelsize=8)
        axes.margins(x=0.15)
        axes.grid(axis="y", color="#e3e7eb")
        axes.spines[["top", "right"]].set_visible(False)
        if ablation.axis:
            axes.set_xlabel(ablation.axis)
    panels[0].set_ylim(-0.03, 1.03)
    panels[0].yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    panels[1].set_yscale("log")
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=100)
