"""Prometheus instruments: of an engine replica's requests and state, of an ingress's HTTP answers.

Each process has its own registry; nothing is global. How pages of many processes become one is
`metrics_pages`' matter. Times are seconds, sizes bytes; every name begins with `vbserve_`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from core.requests import GenerationRequest, RequestOutput, RequestTimings
from serving.metrics_pages import Page, snapshot

OTHER_ADAPTERS = "other"

_LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class AdapterLabels:
    """The metrics' `adapter` label: the first `cap` adapters by name, later ones as "other".

    An adapter keeps the name under which it was first asked for.
    """

    def __init__(self, base_name: str, cap: int) -> None:
        self._labels: dict[str | None, str] = {None: base_name}
        self._cap = cap + 1

    def label(self, request: GenerationRequest) -> str:
        """The label of a request's adapter, or of the base."""
        digest = request.adapter_digest
        if digest is not None and digest not in self._labels and len(self._labels) < self._cap:
            self._labels[digest] = request.model or digest[:12]
        return self._labels.get(digest, OTHER_ADAPTERS)


@dataclass
class _Live:
    """What is remembered of a request between its outputs."""

    label: str
    num_prompt_tokens: int
    last_token_time: float | None = None
    started: bool = False  # its first timings were observed


class RequestMetrics:
    """Latencies and counts of the requests of one engine replica.

    `submitted` may be called from any thread, `observe` from one at a time (the engine's).
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        labels: AdapterLabels,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._labels, self._clock = labels, clock
        self._live: dict[str, _Live] = {}

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(
                f"vbserve_{name}", text, ["adapter"], registry=registry, buckets=buckets
            )

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vbserve_{name}", text, ["adapter", *labels], registry=registry)

        self._first_token = histogram(
            "time_to_first_token_seconds",
            "From a request's arrival in the engine to its first token.",
            _LATENCY_BUCKETS,
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds",
            "Between consecutive tokens of one request.",
            _STEP_BUCKETS,
        )
        self._latency = histogram(
            "e2e_request_latency_seconds",
            "From a request's arrival in the engine to its last token.",
            _LATENCY_BUCKETS,
        )
        self._queue_time = histogram(
            "queue_time_seconds",
            "From a request's arrival in the engine to its first step.",
            _LATENCY_BUCKETS,
        )
        self._requests = counter("requests_total", "Requests by how they ended.", "outcome")
        self._prompt_tokens = counter("prompt_tokens_total", "Tokens of prompts that were served.")
        self._generated = counter("generation_tokens_total", "Tokens generated.")

    def submitted(self, request: GenerationRequest) -> None:
        """Call before the engine gets the request."""
        label = self._labels.label(request)
        self._live[request.request_id] = _Live(label, len(request.prompt_token_ids))

    def rejected(self, request: GenerationRequest) -> None:
        """Call when the engine did not take the request."""
        live = self._live.pop(request.request_id, None)
        if live is not None:
            self._requests.labels(live.label, "rejected").inc()

    def observe(self, outputs: Iterable[RequestOutput]) -> None:
        """Call with what a step brought."""
        now = self._clock()
        for output in outputs:
            live = self._live.get(output.request_id)
            if live is None:
                continue
            if output.token_ids:
                self._observe_tokens(live, len(output.token_ids), now)
            if output.timings is not None and not live.started:
                self._observe_start(live, output.timings)
            if output.finish_reason is not None:
                self._observe_end(live, output)
                del self._live[output.request_id]

    def _observe_tokens(self, live: _Live, num_tokens: int, now: float) -> None:
        self._generated.labels(live.label).inc(num_tokens)
        is_first = live.last_token_time is None
        since = now if live.last_token_time is None else live.last_token_time
        live.last_token_time = now
        num_gaps = num_tokens - 1 if is_first else num_tokens
        for _ in range(num_gaps):
            self._inter_token.labels(live.label).observe((now - since) / num_gaps)

    def _observe_start(self, live: _Live, timings: RequestTimings) -> None:
        if timings.scheduled is None:
            return
        live.started = True
        self._queue_time.labels(live.label).observe(timings.scheduled - timings.arrived)
        self._prompt_tokens.labels(live.label).inc(live.num_prompt_tokens)
        if timings.first_token is not None:
            self._first_token.labels(live.label).observe(timings.first_token - timings.arrived)

    def _observe_end(self, live: _Live, output: RequestOutput) -> None:
        assert output.finish_reason is not None
        self._requests.labels(live.label, output.finish_reason.value).inc()
        timings = output.timings
        if timings is not None and timings.finished is not None:
            self._latency.labels(live.label).observe(timings.finished - timings.arrived)


@dataclass(frozen=True)
class EngineState:
    """Figures of one engine replica at one moment; totals count from its start."""

    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    num_prefix_hit_tokens: int = 0
    base_bytes: int = 0
    kv_bytes_used: int = 0
    kv_bytes_total: int = 0
    adapter_slot_bytes: int = 0
    device_bytes: int = 0
    compact_bytes: int = 0
    factor_bytes_used: int = 0
    factor_bytes_budget: int = 0
    num_factor_hits: int = 0
    num_factor_misses: int = 0
    num_factor_evictions: int = 0
    num_rebuilds: int = 0
    rebuild_seconds: float = 0.0


_GAUGES = (
    ("requests_running", "num_running", "Requests in the batch."),
    ("requests_waiting", "num_waiting", "Requests in the queue."),
    ("base_weights_bytes", "base_bytes", "Size of the base's weights."),
    ("kv_cache_used_bytes", "kv_bytes_used", "KV cache in use or kept for reuse."),
    ("kv_cache_size_bytes", "kv_bytes_total", "Size of the KV cache."),
    ("adapter_slots_bytes", "adapter_slot_bytes", "Factors stacked for the active batch."),
    ("device_memory_bytes", "device_bytes", "Accelerator memory in use; 0 on the CPU."),
    ("compact_adapters_bytes", "compact_bytes", "Compact forms held in memory."),
    ("factor_cache_used_bytes", "factor_bytes_used", "Rebuilt factors held in memory."),
    ("factor_cache_budget_bytes", "factor_bytes_budget", "Most that the factor cache may hold."),
)
_COUNTERS = (
    ("preemptions", "num_preemptions", "Requests taken out of the batch for want of KV cache."),
    ("prefix_cache_hit_tokens", "num_prefix_hit_tokens", "Prompt tokens not computed again."),
    ("factor_cache_hits", "num_factor_hits", "Leases of factors that were there."),
    ("factor_cache_misses", "num_factor_misses", "Leases of factors that had to be rebuilt."),
    ("factor_cache_evictions", "num_factor_evictions", "Factors dropped for want of room."),
)


class EngineStateCollector(Collector):
    """Turns what `read` returns at each scrape into gauges and counters."""

    def __init__(self, read: Callable[[], EngineState]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read an engine that is still being built."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """One family per figure."""
        state = self._read()
        for name, attribute, text in _GAUGES:
            yield GaugeMetricFamily(f"vbserve_{name}", text, value=getattr(state, attribute))
        for name, attribute, text in _COUNTERS:
            yield CounterMetricFamily(f"vbserve_{name}", text, value=getattr(state, attribute))
        yield SummaryMetricFamily(
            "vbserve_factor_rebuild_seconds",
            "Time to rebuild one adapter's factors from its compact form.",
            count_value=state.num_rebuilds,
            sum_value=state.rebuild_seconds,
        )


class EngineMetrics:
    """All instruments of one engine replica, in a registry of their own."""

    def __init__(self, labels: AdapterLabels, read_state: Callable[[], EngineState]) -> None:
        self._registry = CollectorRegistry()
        self.requests = RequestMetrics(self._registry, labels)
        self._registry.register(EngineStateCollector(read_state))
        ProcessCollector(namespace="vbserve", registry=self._registry)

    def page(self) -> Page:
        """Everything as of now, as plain data."""
        return snapshot(self._registry)


class HttpMetrics:
    """All instruments of one ingress."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "vbserve_http_requests_total",
            "HTTP requests by route, method and status.",
            ["route", "method", "status"],
            registry=self._registry,
        )
        ProcessCollector(namespace="vbserve", registry=self._registry)

    def answered(self, route: str, method: str, status: int) -> None:
        """`route` is the route's template, so that the label's values are few."""
        self._answers.labels(route, method, str(status)).inc()

    def page(self) -> Page:
        """Everything as of now, as plain data."""
        return snapshot(self._registry)
