"""A server's life around the rounds: start, registration, restart, cold adapters, memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from loadtest.bench.contestants import OURS_HTTP, HttpContestant
from loadtest.bench.plan import WORKLOADS, BenchRequest, Plan, Wave
from loadtest.bench.server import VbserveServer
from loadtest.stats import Distribution, distribution


@dataclass
class Lifecycle:
    """Seconds and bytes; None where it was not measured.

    pss_base_bytes         after the warm-up, without adapters
    pss_registered_bytes   with all adapters registered, none used yet
    pss_end_bytes          after all rounds
    cold_ttft, warm_ttft   first and second request of adapters that were in no cache
    """

    num_adapters: int
    first_ready_seconds: float
    registration: Distribution
    again_ready_seconds: float | None = None
    cold_ttft: Distribution | None = None
    warm_ttft: Distribution | None = None
    pss_base_bytes: int | None = None
    pss_registered_bytes: int | None = None
    pss_end_bytes: int | None = None


def open_server(
    stack: ExitStack, make_server: Callable[[], VbserveServer], plan: Plan, vblora: Path
) -> tuple[VbserveServer, HttpContestant, Lifecycle]:
    """A warm server with all adapters registered, which `stack` will stop.

    With `sizes.restart` it is a second one on the same registry: then no cache has any adapter.
    """
    sizes = plan.sizes
    with ExitStack() as first:
        server = first.enter_context(make_server())
        contestant = _contestant(server)
        contestant.run(plan.warmup, sizes.max_tokens)
        base_bytes = server.pss_bytes()
        seconds = server.register(range(sizes.num_adapters), vblora)
        life = Lifecycle(sizes.num_adapters, server.ready_seconds, distribution(seconds))
        life.pss_base_bytes, life.pss_registered_bytes = base_bytes, server.pss_bytes()
        if not sizes.restart:
            stack.enter_context(first.pop_all())
    if sizes.restart:
        server = stack.enter_context(make_server())
        contestant = _contestant(server)
        contestant.run(plan.warmup, sizes.max_tokens)
        life.again_ready_seconds = server.ready_seconds
    _measure_cold(contestant, plan, life)
    return server, contestant, life


def _contestant(server: VbserveServer) -> HttpContestant:
    return HttpContestant(OURS_HTTP, frozenset(WORKLOADS), server.url)


def _measure_cold(contestant: HttpContestant, plan: Plan, life: Lifecycle) -> None:
    def ttft(request: BenchRequest) -> float:
        result = contestant.run(Wave("cold", 1, (request,)), plan.sizes.max_tokens)
        return result.records[0].ttft

    pairs = [(ttft(first), ttft(second)) for first, second in plan.cold]
    life.cold_ttft = distribution(first for first, _ in pairs)
    life.warm_ttft = distribution(second for _, second in pairs)
