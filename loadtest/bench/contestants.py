"""Who takes part: each runs a wave and hands back records of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import uvloop

from loadtest.bench.plan import BenchRequest, Wave
from loadtest.bench.processes import ScriptPeer
from loadtest.bench.server import BASE_NAME, adapter_id
from loadtest.client import ClientOptions, CompletionsClient
from loadtest.dialects import OPENAI, Dialect
from loadtest.drivers import closed_loop
from loadtest.errors import BenchError
from loadtest.live import LiveCounts
from loadtest.records import RequestRecord
from loadtest.run import Stopwatch
from loadtest.workload import PlannedRequest

PEFT_MIXED, PEFT_SINGLE = "PEFT, mixed batch", "PEFT, one at a time"
OURS_HTTP, OURS_ENGINE = "vbserve over HTTP", "vbserve's engine alone"
VLLM, LLAMA_F32, LLAMA_Q8 = "vLLM, fp32", "llama.cpp, F32", "llama.cpp, Q8_0"
OPENVINO = "OpenVINO GenAI, fp32"

OURS = (OURS_HTTP, OURS_ENGINE)
EXACT = (*OURS, PEFT_MIXED, PEFT_SINGLE)
PEER_NAMES = (VLLM, LLAMA_F32, LLAMA_Q8, OPENVINO)
ORDER = (*EXACT, *PEER_NAMES)


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
    """A server at `url`, through the same client and closed loop as `vbserve loadtest`."""

    name: str
    workloads: frozenset[str]
    url: str
    dialect: Dialect = OPENAI

    def run(self, wave: Wave, max_tokens: int) -> WaveResult:
        """Send the wave over HTTP."""
        planned = [
            PlannedRequest(request.index, model_of(request), request.prompt, max_tokens)
            for request in wave.requests
        ]
        records = self._exchange(planned, wave)
        wall_seconds = max(record.chunk_times[-1] for record in records)
        if not self.dialect.streams_all_ids:
            self._complete_ids(records, planned, wave)
        return WaveResult(tuple(records), wall_seconds)

    def _complete_ids(
        self, records: list[RequestRecord], planned: list[PlannedRequest], wave: Wave
    ) -> None:
        """Ask again without streaming, after the time was taken, where ids were not streamed."""
        lacking = [n for n, r in enumerate(records) if len(r.token_ids) < r.num_tokens]
        if lacking:
            again = self._exchange([planned[n] for n in lacking], wave, stream=False)
            for number, whole in zip(lacking, again, strict=True):
                records[number].token_ids = whole.token_ids

    def _exchange(
        self, planned: Sequence[PlannedRequest], wave: Wave, *, stream: bool = True
    ) -> list[RequestRecord]:
        """Records in the order of `planned`. Raises BenchError when a request fails."""
        records = uvloop.run(self._send(planned, wave.num_clients, stream))
        failed = next((record for record in records if record.error), None)
        if failed is not None:
            raise BenchError(
                f"{self.name}, {wave.workload}: {failed.error} for {failed.model}: {failed.detail}"
            )
        order = {request.index: place for place, request in enumerate(planned)}
        return sorted(records, key=lambda record: order[record.index])

    async def _send(
        self, planned: Sequence[PlannedRequest], num_clients: int, stream: bool
    ) -> list[RequestRecord]:
        clock = Stopwatch()
        options = ClientOptions(self.url, stream=stream)
        async with CompletionsClient(options, clock, LiveCounts(), self.dialect) as client:
            clock.restart()
            return await closed_loop(client.complete, planned, num_clients, lambda: False)


@dataclass(frozen=True)
class SplitContestant:
    """A peer in two processes: `base` was started without adapters, which makes it faster."""

    name: str
    workloads: frozenset[str]
    base: Contestant
    adapters: Contestant

    def run(self, wave: Wave, max_tokens: int) -> WaveResult:
        """Hand the wave to the process that is made for it."""
        with_adapters = any(request.adapter is not None for request in wave.requests)
        return (self.adapters if with_adapters else self.base).run(wave, max_tokens)


def model_of(request: BenchRequest) -> str:
    """The name under which every HTTP server knows what a request asks for."""
    return BASE_NAME if request.adapter is None else adapter_id(request.adapter)


@dataclass(frozen=True)
class Started:
    """A contestant that runs; the other two are of the process that serves its adapters."""

    contestant: Contestant
    start_seconds: float
    pss_bytes: Callable[[], int | None]
