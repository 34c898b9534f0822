"""The figures by number of adapters, as Markdown and as one PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes

from loadtest.bench.adapters import AdaptersResult, CountFigures
from loadtest.bench.drawing import BLUE, GREY, INK, ORANGE, label, new_figure, save, style
from loadtest.bench.tables import MIB, mib, pair, plain, table
from loadtest.stats import distribution

_KIB = 1024
_LEAST_FOR_MEMORY = 64  # below it, a server's memory moves more than its adapters take


def adapters_page(result: AdaptersResult, conditions: Mapping[str, object]) -> str:
    """The whole page."""
    rows = [
        [
            f"{figures.num_adapters:,}" if figures.num_adapters else "0 (base)",
            _rate(figures),
            f"{result.share(figures):.2f}",
            pair(distribution(figures.ttft)),
            _per_adapter(figures),
        ]
        for figures in result.counts
    ]
    lines = [f"- {name}: {plain(value)}" for name, value in conditions.items()]
    busiest = max(result.foreign_cores, default=0.0)
    exact = result.exactness.words() if result.exactness else "not judged"
    headers = ["adapters", "output tok/s", "by the base's", "first token p50 / p99, ms"]
    parts = [
        "# Speed and memory by number of adapters",
        f"One server with {result.counts[-1].num_adapters:,} adapters registered; "
        f"{result.num_clients} clients, {result.num_requests} requests a wave, "
        f"{result.prompt_tokens} + {result.max_tokens} tokens, spread ({result.popularity}) over "
        "the first N adapters. Prefill included; factors that are not in the cache are rebuilt "
        f"within these times. Medians of {len(result.counts[0].rates)} rounds (lowest to highest), "
        "ratios within a round; first tokens over the requests of all rounds. Memory (PSS) was "
        "taken when N were registered and none used.",
        table([*headers, "memory per registered adapter"], rows),
        f"An adapter that is used takes {result.factor_bytes / MIB:.2f} MiB of factors, as LoRA of "
        f"its rank does in fp32. Memory of the server after all rounds: "
        f"{mib(result.pss_end_bytes)}.",
        f"Equal to PEFT's fp32 VB-LoRA: {exact}.",
        "\n".join([*lines, f"- other programs: at most {busiest:.2f} cores in a wave"]),
    ]
    return "\n\n".join(parts) + "\n"


def _rate(figures: CountFigures) -> str:
    rates = figures.rates
    return f"{median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


def _per_adapter(figures: CountFigures) -> str:
    share = _kib_per_adapter(figures)
    return "-" if share is None else f"{share:,.1f} KiB"


def _kib_per_adapter(figures: CountFigures) -> float | None:
    if figures.pss_bytes is None or figures.num_adapters < _LEAST_FOR_MEMORY:
        return None
    return figures.pss_bytes / figures.num_adapters / _KIB


def write_adapters_chart(
    path: Path, result: AdaptersResult, conditions: Mapping[str, object]
) -> None:
    """Draw throughput, times to first token, tax and memory."""
    title = (
        f"{result.num_clients} clients over the first N adapters ({result.popularity}), "
        f"{result.prompt_tokens} + {result.max_tokens} tokens"
    )
    figure, panels = new_figure(title, conditions, columns=2, rows=2)
    _throughput(panels[0], result)
    _first_token(panels[1], result)
    _tax(panels[2], result)
    _memory(panels[3], result)
    save(figure, path)


def _ticks(axes: Axes, result: AdaptersResult) -> range:
    places = range(len(result.counts))
    names = [f"{figures.num_adapters:,}" for figures in result.counts]
    axes.set_xticks(places, ["0\n(base)" if name == "0" else name for name in names])
    axes.set_xlim(-0.5, len(places) - 0.5)
    return places


def _throughput(axes: Axes, result: AdaptersResult) -> None:
    style(axes, "Throughput (line: median, dots: rounds)", "adapters", "output tok/s")
    places = _ticks(axes, result)
    medians = [median(figures.rates) for figures in result.counts]
    axes.plot(places, medians, "o-", color=BLUE)
    for place, figures in zip(places, result.counts, strict=True):
        axes.plot([place] * len(figures.rates), figures.rates, ".", color=INK, markersize=4)
        label(axes, place, max(figures.rates), f"{medians[place]:.0f}")
    axes.set_ylim(0, max(max(figures.rates) for figures in result.counts) * 1.15)


def _first_token(axes: Axes, result: AdaptersResult) -> None:
    style(axes, "Time to first token", "adapters", "ms")
    places = _ticks(axes, result)
    spread = [distribution(figures.ttft) for figures in result.counts]
    for name, values, colour in (
        ("p99", [(one.p99 or 0.0) * 1e3 for one in spread], ORANGE),
        ("p50", [(one.p50 or 0.0) * 1e3 for one in spread], BLUE),
    ):
        axes.plot(places, values, "o-", color=colour, label=name)
        for place, value in zip(places, values, strict=True):
            label(axes, place, value, f"{value:.0f}", below=name == "p50")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)


def _tax(axes: Axes, result: AdaptersResult) -> None:
    style(axes, "Tax: throughput lost beside the base", "adapters", "%")
    for place, figures in zip(_ticks(axes, result), result.counts, strict=True):
        tax = (1 - result.share(figures)) * 100
        axes.bar(place, tax, 0.6, color=BLUE)
        label(axes, place, max(tax, 0.0), f"{tax:.1f}")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.margins(y=0.15)


def _memory(axes: Axes, result: AdaptersResult) -> None:
    style(axes, "Memory per adapter", "adapters registered", "KiB, logarithmic")
    lora = result.factor_bytes / _KIB
    axes.set_yscale("log")
    for place, figures in zip(_ticks(axes, result), result.counts, strict=True):
        share = _kib_per_adapter(figures)
        if share is not None and share > 0:
            axes.bar(place, share, 0.6, color=BLUE)
            label(axes, place, share, f"{share:,.1f}")
    axes.axhline(lora, color=ORANGE, linestyle="--")
    axes.text(-0.4, lora * 1.15, f"one in use, as LoRA of its rank: {lora:,.0f}", fontsize=8)
    axes.set_ylim(min(1.0, axes.get_ylim()[0]), lora * 3)
