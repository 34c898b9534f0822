"""A run's figures as JSON and as tables on the terminal."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.records import RequestRecord
from loadtest.run import RunResult
from loadtest.stats import Distribution, ModelFigures, Summary, timeline

_MODELS_SHOWN = 20
_MILLI = 1000.0

NOTES = {
    "latencies": "seconds from the moment a request was due; failed requests are left out",
    "rates": "what arrived between the start and window_seconds, divided by window_seconds",
    "time_between_tokens": "a chunk of n tokens counts as n equal parts of the gap before it; "
    "tokens that arrive with the first one belong to ttft",
    "chunk_gap": "pauses between arrivals as they were",
    "percentiles": "nearest rank: values that were observed",
}


def write_json(
    path: Path, result: RunResult, summary: Summary, settings: Mapping[str, object], *, rows: bool
) -> None:
    """Write settings, conditions, figures and timeline; `rows` adds one row per request."""
    report = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "conditions": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "client_cpu_seconds": round(result.client_cpu_seconds, 3),
            "chars_per_token": round(result.chars_per_token, 3),
            "base_model": result.base_model,
            "num_adapters": len(result.adapters),
        },
        "notes": NOTES,
        "summary": summary,
        "timeline": timeline(result.records, result.window_seconds),
        "failures": _failures(result.records),
    }
    if rows:
        report["requests"] = [_row(record) for record in result.records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def _failures(records: Sequence[RequestRecord]) -> dict[str, str]:
    """One example per kind of failure."""
    return {record.error: record.detail for record in reversed(records) if record.error}


def _row(record: RequestRecord) -> dict[str, object]:
    has_tokens = bool(record.chunk_times)
    return {
        "index": record.index,
        "model": record.model,
        "due": round(record.due, 6),
        "send_lag": round(record.send_lag, 6),
        "ttft": round(record.ttft, 6) if has_tokens else None,
        "e2e": round(record.e2e, 6),
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.num_tokens,
        "error": record.error,
    }


def print_summary(console: Console, summary: Summary) -> None:
    """Print throughput, latencies, the busiest models and the errors."""
    rates = (
        f"[bold]{summary.requests_per_second:.2f}[/bold] requests/s   "
        f"[bold]{summary.output_tokens_per_second:.1f}[/bold] output tok/s   "
        f"[bold]{summary.total_tokens_per_second:.1f}[/bold] total tok/s   "
        f"over {summary.window_seconds:.1f} s"
    )
    console.print(rates, highlight=False)
    if summary.completed:
        console.print(_latency_table(summary))
    if len(summary.models) > 1:
        console.print(_model_table(summary.models))
    for kind, count in summary.errors.items():
        console.print(f"[red]{count} x {kind}[/red]", highlight=False)
    if summary.tokens_estimated:
        console.print("tokens per chunk are apportioned by text: the server sent no token ids")


def _latency_table(summary: Summary) -> Table:
    table = Table(title=f"{summary.completed} of {summary.requests} requests completed, ms")
    table.add_column("")
    for name in ("mean", "p50", "p95", "p99", "max"):
        table.add_column(name, justify="right")
    rows = {
        "time to first token": summary.ttft,
        "time between tokens": summary.time_between_tokens,
        "pause between chunks": summary.chunk_gap,
        "end to end": summary.e2e,
        "client's own lag": summary.send_lag,
    }
    for name, values in rows.items():
        table.add_row(name, *(_ms(value) for value in _figures(values)))
    return table


def _model_table(models: Sequence[ModelFigures]) -> Table:
    shown = models[:_MODELS_SHOWN]
    title = (
        f"{len(shown)} busiest of {len(models)} models, ms" if len(models) > len(shown) else "ms"
    )
    table = Table(title=title)
    table.add_column("model")
    for name in ("requests", "errors", "TTFT p50", "TTFT p99", "between tokens p50", "e2e p50"):
        table.add_column(name, justify="right")
    for row in shown:
        latencies = (row.ttft.p50, row.ttft.p99, row.time_between_tokens.p50, row.e2e.p50)
        errors = f"[red]{row.errors}[/red]" if row.errors else "0"
        table.add_row(row.model, str(row.requests), errors, *(_ms(value) for value in latencies))
    return table


def _figures(values: Distribution) -> tuple[float | None, ...]:
    return values.mean, values.p50, values.p95, values.p99, values.max


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * _MILLI:,.1f}"
