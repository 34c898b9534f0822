"""Words and numbers of the bench's Markdown pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loadtest.stats import Distribution

MIB = 2**20


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pair(values: Distribution | None, high: str = "p99", unit: str = "") -> str:
    """The median and p99 (or max) of seconds, in ms."""
    if values is None or values.p50 is None:
        return "-"
    upper = values.max if high == "max" else values.p99
    return f"{values.p50 * 1000:,.1f} / {(upper or 0.0) * 1000:,.1f}{unit}"


def in_seconds(seconds: float | None) -> str:
    """Seconds, or a dash."""
    return "-" if seconds is None else f"{seconds:.1f} s"


def mib(num_bytes: int | None) -> str:
    """MiB, or a dash."""
    return "-" if num_bytes is None else f"{num_bytes / MIB:,.0f} MiB"


def plain(value: object) -> str:
    """A condition's value in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def in_ratio(value: float | None) -> str:
    """Two places, or a dash."""
    return "-" if value is None else f"{value:.2f}"
