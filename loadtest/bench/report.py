"""All that a bench found, in one value, and its ratios. Shown by `markdown` and `charts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from loadtest.bench.contestants import (
    EXACT,
    ORDER,
    OURS,
    OURS_ENGINE,
    OURS_HTTP,
    PEER_NAMES,
    PEFT_MIXED,
    PEFT_SINGLE,
)
from loadtest.bench.lifecycle import Lifecycle
from loadtest.bench.limit import MachineSpeed
from loadtest.bench.plan import WORKLOADS, BenchSizes
from loadtest.bench.reach import Reach
from loadtest.bench.results import Cells, RoundResult, ratio
from loadtest.errors import BenchError


@dataclass(frozen=True)
class Report:
    """All that the page, the plots and the JSON show.

    limits   output tokens a second that `speed` allows at most, by workload
    """

    conditions: Mapping[str, object]
    sizes: BenchSizes
    num_rounds: int
    cells: Cells
    rounds: Sequence[RoundResult]
    lifecycle: Lifecycle | None
    reach: Mapping[str, Reach] = field(default_factory=dict)
    speed: MachineSpeed | None = None
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def contestants(self) -> list[str]:
        """Names of those that took part, ours first."""
        there = {contestant for contestant, _ in self.cells}
        return [name for name in ORDER if name in there]

    @property
    def peers(self) -> list[str]:
        """Names of the other servers that took part."""
        return [name for name in self.contestants if name in PEER_NAMES]

    @property
    def workloads(self) -> list[str]:
        """Names of the workloads that were run."""
        ran = {workload for _, workload in self.cells}
        return [name for name in WORKLOADS if name in ran]


def peft_of(cells: Cells, workload: str) -> tuple[str, str] | None:
    """The faster of PEFT's two ways on a workload."""
    keys = [(name, workload) for name in (PEFT_MIXED, PEFT_SINGLE)]
    there = [key for key in keys if key in cells]
    return max(there, key=lambda key: cells[key].tokens_per_second, default=None)


def ratios(cells: Cells) -> dict[str, float]:
    """All ratios of throughput by a readable name."""
    found: dict[str, float | None] = {}
    for ours in OURS:
        for workload in WORKLOADS:
            peft = peft_of(cells, workload)
            if peft is not None:
                found[f"{ours} / PEFT, {workload}"] = ratio(cells, (ours, workload), peft)
    for name in dict.fromkeys(contestant for contestant, _ in cells):
        for adapters, base in (("W3", "W2"), ("W4", "W4b")):
            found[f"{name}, {adapters} / {base}"] = ratio(cells, (name, adapters), (name, base))
    for workload in WORKLOADS:
        over, under = (OURS_HTTP, workload), (OURS_ENGINE, workload)
        found[f"HTTP / engine alone, {workload}"] = ratio(cells, over, under)
    return {name: value for name, value in found.items() if value is not None}


def peer_ratios(cells: Cells) -> dict[tuple[str, str], dict[str, float]]:
    """Throughput of ours by each other server's: (ours, peer) → workload → ratio."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for ours in OURS:
        for peer in PEER_NAMES:
            for workload in WORKLOADS:
                value = ratio(cells, (ours, workload), (peer, workload))
                if value is not None:
                    found.setdefault((ours, peer), {})[workload] = value
    return found


def limit_shares(report: Report) -> dict[tuple[str, str], float]:
    """Our throughput by the limit: (ours, workload) → share."""
    return {
        (ours, workload): report.cells[ours, workload].tokens_per_second / limit
        for workload, limit in report.limits.items()
        for ours in OURS
        if (ours, workload) in report.cells
    }


def write_json(path: Path, report: Report) -> None:
    """Write conditions, sizes, figures, and every round with its load and verdicts."""
    content = {
        "conditions": report.conditions,
        "sizes": asdict(report.sizes),
        "cells": list(report.cells.values()),
        "ratios": ratios(report.cells),
        "peer_ratios": {
            f"{ours} / {peer}": row for (ours, peer), row in peer_ratios(report.cells).items()
        },
        "speed": report.speed,
        "limits": report.limits,
        "limit_shares": {
            f"{ours}, {workload}": share for (ours, workload), share in limit_shares(report).items()
        },
        "lifecycle": report.lifecycle,
        "reach": report.reach,
        "rounds": [_row(one) for one in report.rounds],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def _row(one: RoundResult) -> dict[str, object]:
    return {
        "contestant": one.contestant,
        "workload": one.workload,
        "round": one.round,
        "tokens_per_second": one.tokens_per_second,
        "wall_seconds": one.result.wall_seconds,
        "verdicts": one.verdicts,
        "load": one.load,
    }


def refuse_inexact(report: Report) -> None:
    """Raise BenchError if our answers differ from PEFT's; other servers' may, and are reported.

    PEFT's own included: where it disagrees with its own judgement, the judge is broken.
    """
    bad = [
        f"{cell.contestant} on {cell.workload}: {cell.exact:.3f} exact"
        for cell in report.cells.values()
        if cell.contestant in EXACT and cell.exact is not None and cell.exact < 1.0
    ]
    if bad:
        raise BenchError("answers differ from PEFT's: " + "; ".join(bad))
