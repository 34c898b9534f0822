"""Rounds → figures. Throughput is the median of rounds, a ratio the median of the rounds' ratios.

Latencies pool the requests of all rounds: a p99 of 16 requests would be their maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from loadtest.bench.contestants import WaveResult
from loadtest.bench.exactness import Verdict
from loadtest.bench.machine import CpuLoad
from loadtest.stats import Distribution, distribution


@dataclass(frozen=True)
class RoundResult:
    """One wave of one contestant. `verdicts` are those of its requests, once judged."""

    contestant: str
    workload: str
    round: int
    result: WaveResult
    load: CpuLoad
    verdicts: tuple[Verdict, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of the wave by its wall time, prefill included."""
        num_tokens = sum(record.num_tokens for record in self.result.records)
        return num_tokens / self.result.wall_seconds


@dataclass(frozen=True)
class Cell:
    """One contestant on one workload. `exact` is a share of the requests without a tie."""

    contestant: str
    workload: str
    tokens_per_second: float
    rounds: tuple[float, ...]
    ttft: Distribution
    time_between_tokens: Distribution
    e2e: Distribution
    exact: float | None
    num_ties: int
    num_judged: int
    foreign_cores: float | None


Cells = dict[tuple[str, str], Cell]


def cells_of(rounds: Sequence[RoundResult]) -> Cells:
    """One cell per contestant and workload that occur."""
    groups: dict[tuple[str, str], list[RoundResult]] = {}
    for one in rounds:
        groups.setdefault((one.contestant, one.workload), []).append(one)
    return {key: _cell(group) for key, group in groups.items()}


def _cell(group: Sequence[RoundResult]) -> Cell:
    records = [record for one in group for record in one.result.records]
    verdicts = [verdict for one in group for verdict in one.verdicts]
    decided = [verdict for verdict in verdicts if verdict != "tie"]
    foreign = [one.load.foreign_cores for one in group if one.load.foreign_cores is not None]
    return Cell(
        contestant=group[0].contestant,
        workload=group[0].workload,
        tokens_per_second=median(one.tokens_per_second for one in group),
        rounds=tuple(one.tokens_per_second for one in group),
        ttft=distribution(record.ttft for record in records),
        time_between_tokens=distribution(gap for r in records for gap in r.token_gaps()),
        e2e=distribution(record.e2e for record in records),
        exact=decided.count("equal") / len(decided) if decided else None,
        num_ties=len(verdicts) - len(decided),
        num_judged=len(verdicts),
        foreign_cores=max(foreign, default=None),
    )


def ratio(cells: Cells, over: tuple[str, str], under: tuple[str, str]) -> float | None:
    """Throughput of one (contestant, workload) by another's, round by round; None without both."""
    if over not in cells or under not in cells:
        return None
    pairs = zip(cells[over].rounds, cells[under].rounds, strict=True)
    return median(upper / lower for upper, lower in pairs)
