"""What every peer is given to start with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from loadtest.bench.inputs import Inputs
from loadtest.bench.plan import Plan


@dataclass(frozen=True)
class PeerRoom:
    """`out` is the bench's folder: environments in peers/, things made once in cache/, logs."""

    inputs: Inputs
    plan: Plan
    out: Path
    threads: int | None

    @property
    def num_threads(self) -> int:
        """As asked for, or one for each core that this process may use."""
        return self.threads or len(os.sched_getaffinity(0))

    def home(self, name: str) -> Path:
        """The environment of a peer."""
        return (self.out / "peers" / name).resolve()

    def cached(self, kind: str) -> Path:
        """Where what is made of this base and these adapters is kept."""
        return (self.out / "cache" / f"{kind}-{self.inputs.context}").resolve()

    def log(self, name: str) -> Path:
        """An empty log."""
        path = self.out / f"{name}.log"
        path.unlink(missing_ok=True)
        return path
