"""Who takes part: each runs a wave and hands back records of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import uvloop

from loadtest.bench.plan import Wave
from loadtest.bench.processes import ScriptPeer
from loadtest.bench.server import BASE_NAME, VbserveServer, adapter_id
from loadtest.client import ClientOptions, CompletionsClient
from loadtest.drivers import closed_loop
from loadtest.errors import BenchError
from loadtest.live import LiveCounts
from loadtest.records import RequestRecord
from loadtest.run import Stopwatch
from loadtest.workload import PlannedRequest

PEFT_MIXED, PEFT_SINGLE = "PEFT, mixed batch", "PEFT, one at a time"
OURS_HTTP, OURS_ENGINE = "vbserve over HTTP", "vbserve's engine alone"


ORDER = (OURS_HTTP, OURS_ENGINE, PEFT_MIXED, PEFT_SINGLE)


@dataclass(frozen=True)
class WaveResult:
    """Records in the order of the wave's requests, and seconds from first send to last token."""

    records: tuple[RequestRecord, ...]
    wall_seconds: float


class Contestant(Protocol):
    """One row of the tables. `workloads` are those that it takes part in."""

    @property
    def name(self) -> str:
        """As shown in the tables."""
        ...

    @property
    def workloads(self) -> frozenset[str]:
        """Names of workloads."""
        ...

    def run(self, wave: Wave, max_tokens: int) -> WaveResult:
        """Work off a wave. Raises BenchError when a request fails."""
        ...


@dataclass(frozen=True)
class ScriptContestant:
    """A peer script; `options` go with every wave."""

    name: str
    workloads: frozenset[str]
    peer: ScriptPeer
    options: dict[str, str]

    def run(self, wave: Wave, max_tokens: int) -> WaveResult:
        """Ask the script for a wave."""
        answer = self.peer.ask(
            do="wave",
            concurrency=wave.num_clients,
            max_tokens=max_tokens,
            requests=[asdict(request) for request in wave.requests],
            **self.options,
        )
        by_index = {row["index"]: row for row in answer["records"]}
        records = [_record(by_index[request.index], wave) for request in wave.requests]
        return WaveResult(tuple(records), answer["wall_seconds"])


def _record(row: dict[str, Any], wave: Wave) -> RequestRecord:
    times = row["times"]
    return RequestRecord(
        index=row["index"],
        model=wave.workload,
        due=row["sent"],
        sent=row["sent"],
        finished=times[-1],
        chunk_times=times,
        chunk_tokens=[1] * len(times),
        token_ids=row["token_ids"],
    )


@dataclass(frozen=True)
class HttpContestant:
    """The server, through the same client and closed loop as `vbserve loadtest`."""

    name: str
    workloads: frozenset[str]
    server: VbserveServer

    def run(self, wave: Wave, max_tokens: int) -> WaveResult:
        """Send the wave over HTTP."""
        planned = [
            PlannedRequest(
                request.index,
                BASE_NAME if request.adapter is None else adapter_id(request.adapter),
                request.prompt,
                max_tokens,
            )
            for request in wave.requests
        ]
        records = uvloop.run(self._send(planned, wave.num_clients))
        failed = next((record for record in records if record.error), None)
        if failed is not None:
            raise BenchError(f"{wave.workload}: {failed.error} for {failed.model}: {failed.detail}")
        wall_seconds = max(record.chunk_times[-1] for record in records)
        order = {request.index: place for place, request in enumerate(planned)}
        return WaveResult(tuple(sorted(records, key=lambda r: order[r.index])), wall_seconds)

    async def _send(
        self, planned: Sequence[PlannedRequest], num_clients: int
    ) -> list[RequestRecord]:
        clock = Stopwatch()
        options = ClientOptions(self.server.url)
        async with CompletionsClient(options, clock, LiveCounts()) as client:
            clock.restart()
            return await closed_loop(client.complete, planned, num_clients, lambda: False)
