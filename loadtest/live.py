"""Counts of a run while it runs, for whoever draws progress. One owner writes: the client."""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.records import RequestRecord


@dataclass(slots=True)
class LiveCounts:
    """Running totals since the start."""

    in_flight: int = 0
    finished: int = 0
    failed: int = 0
    tokens: int = 0

    def count(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self.finished += 1
        self.failed += record.error is not None
