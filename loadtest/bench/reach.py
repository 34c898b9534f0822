"""How far each server reaches with all adapters at once: its start, its memory, who has to wait."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reach:
    """Of the process that serves adapters, with all of them registered; None where unknown.

    start_seconds  from its start until all adapters can be asked for
    pss_bytes      after all rounds
    """

    start_seconds: float | None
    pss_bytes: int | None
