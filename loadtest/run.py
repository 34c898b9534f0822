"""A whole load test: ask the server what it serves, warm up, calibrate, run, hand back records.

Knows nothing of terminals and files; `watch` is told when the measured part begins and ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice

from loadtest.client import LOCAL_SERVER, ClientOptions, CompletionsClient
from loadtest.distributions import (
    OUTPUT_LENGTHS,
    PROMPT_LENGTHS,
    UNIFORM,
    Lengths,
    Popularity,
)
from loadtest.drivers import closed_loop, open_loop
from loadtest.errors import InvalidWorkloadError, ServerUnreachableError
from loadtest.live import LiveCounts
from loadtest.prompts import TextPrompts, help_topics
from loadtest.protocol import Model
from loadtest.records import RequestRecord
from loadtest.workload import PlannedRequest, WorkloadSpec, planned_requests

_OPEN_LOOP_WARMUP_CLIENTS = 4

Watch = Callable[[LiveCounts, Callable[[], float]], AbstractContextManager[None]]


@dataclass(frozen=True)
class RunSettings:
    """One load test. Either `num_clients` (closed loop) or `rate` (open loop).

    It ends after `num_requests` or `duration_seconds`, whichever comes first; one of them is
    needed unless `file_requests` are given, which are then all that is sent. `adapters` are ids;
    without any, the first `num_adapters` that the server lists are taken (0: the base alone).
    """

    client: ClientOptions = LOCAL_SERVER
    num_clients: int | None = None
    rate: float | None = None
    num_requests: int | None = None
    duration_seconds: float | None = None
    warmup_requests: int = 0
    adapters: tuple[str, ...] = ()
    num_adapters: int = 0
    popularity: Popularity = UNIFORM
    base_share: float = 0.0
    prompt_lengths: Lengths = PROMPT_LENGTHS
    output_lengths: Lengths = OUTPUT_LENGTHS
    seed: int = 0
    file_requests: tuple[PlannedRequest, ...] = ()

    def __post_init__(self) -> None:
        timed_file = bool(self.file_requests) and self.file_requests[0].due is not None
        num_loops = (self.num_clients is not None) + (self.rate is not None) + timed_file
        if num_loops != 1:
            raise InvalidWorkloadError(
                "give either clients (closed loop) or a rate or times in the file (open loop), "
                f"got {num_loops} of them"
            )
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise InvalidWorkloadError(f"rate is {self.rate}, must be positive requests a second")
        if self.num_clients is not None and self.num_clients < 1:
            raise InvalidWorkloadError(f"clients is {self.num_clients}, must be at least 1")
        if not (self.num_requests or self.duration_seconds or self.file_requests):
            raise InvalidWorkloadError("give a number of requests, a duration, or a workload file")


@dataclass(frozen=True)
class RunResult:
    """What came of a run. `models` are the base and the adapters that were asked for."""

    records: tuple[RequestRecord, ...]
    window_seconds: float
    base_model: str
    adapters: tuple[str, ...]
    chars_per_token: float
    client_cpu_seconds: float


class Stopwatch:
    """Seconds since the last restart, on a clock that only goes forward."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Now is 0."""
        self._start = time.perf_counter()

    def __call__(self) -> float:
        """Seconds since the last restart."""
        return time.perf_counter() - self._start


async def run(settings: RunSettings, watch: Watch) -> RunResult:
    """Run the load test; raises ServerUnreachableError or InvalidWorkloadError before it begins."""
    clock, live = Stopwatch(), LiveCounts()
    async with CompletionsClient(settings.client, clock, live) as client:
        spec = _spec(settings, await client.models())
        prompts = await _warm_up(client, settings, spec)
        requests = _requests(settings, spec, prompts)
        live.finished = live.failed = live.tokens = 0
        cpu = time.process_time()
        clock.restart()
        with watch(live, clock):
            records = await _drive(client, settings, requests, clock)
        cpu = time.process_time() - cpu
    last = max((record.finished for record in records), default=0.0)
    window = min(last, settings.duration_seconds or last)
    ordered = tuple(sorted(records, key=lambda record: record.index))
    return RunResult(ordered, window, spec.base_model, spec.adapters, prompts.chars_per_token, cpu)


async def _drive(
    client: CompletionsClient,
    settings: RunSettings,
    requests: Iterable[PlannedRequest],
    clock: Callable[[], float],
) -> list[RequestRecord]:
    ends_at = settings.duration_seconds or float("inf")
    if settings.num_clients is None:
        return await open_loop(client.complete, requests, clock, ends_at)
    return await closed_loop(
        client.complete, requests, settings.num_clients, lambda: clock() >= ends_at
    )


def _requests(
    settings: RunSettings, spec: WorkloadSpec, prompts: TextPrompts
) -> Iterable[PlannedRequest]:
    endless = settings.file_requests or planned_requests(spec, prompts)
    return islice(endless, settings.num_requests) if settings.num_requests else endless


def _spec(settings: RunSettings, models: list[Model]) -> WorkloadSpec:
    bases = [model.id for model in models if model.parent is None]
    if not bases:
        raise ServerUnreachableError("GET /v1/models lists no base (an entry without parent)")
    return WorkloadSpec(
        base_model=bases[0],
        adapters=_adapters(settings, models),
        popularity=settings.popularity,
        base_share=settings.base_share,
        prompt_lengths=settings.prompt_lengths,
        output_lengths=settings.output_lengths,
        rate=settings.rate,
        seed=settings.seed,
    )


def _adapters(settings: RunSettings, models: list[Model]) -> tuple[str, ...]:
    if settings.file_requests:
        return tuple(sorted({request.model for request in settings.file_requests}))
    listed = [model.id for model in models if model.parent is not None]
    unknown = sorted(set(settings.adapters) - set(listed))
    if unknown:
        raise InvalidWorkloadError(
            f"the server does not list {', '.join(unknown)}; it lists {', '.join(listed) or 'none'}"
        )
    if len(listed) < settings.num_adapters:
        raise InvalidWorkloadError(
            f"{settings.num_adapters} adapters wanted, the server lists {len(listed)}"
        )
    return settings.adapters or tuple(listed[: settings.num_adapters])


async def _warm_up(
    client: CompletionsClient, settings: RunSettings, spec: WorkloadSpec
) -> TextPrompts:
    """Send the warm-up requests, and learn from them how many characters a token has."""
    prompts = TextPrompts(help_topics())
    other = replace(spec, seed=spec.seed + 1_000_003, rate=None)
    requests = islice(planned_requests(other, prompts), settings.warmup_requests)
    num_clients = settings.num_clients or _OPEN_LOOP_WARMUP_CLIENTS
    records = await closed_loop(client.complete, requests, num_clients, lambda: False)
    return prompts.calibrated(
        [(r.prompt_chars, r.prompt_tokens) for r in records if r.prompt_chars and r.prompt_tokens]
    )
