"""Records of requests → figures. Percentiles are observed values, never interpolated.

Times in seconds. Only requests without error give latencies; errors are counted by kind.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from loadtest.records import RequestRecord

_MAX_TIMELINE_BINS = 120


@dataclass(frozen=True)
class Distribution:
    """Mean, percentiles and extremes of `count` values; None where there are no values."""

    count: int
    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None
    max: float | None


def distribution(values: Iterable[float]) -> Distribution:
    """Summarise values; a percentile is the smallest value with that share at or below it."""
    array = np.fromiter(values, dtype=np.float64)
    if array.size == 0:
        return Distribution(0, None, None, None, None, None)
    p50, p95, p99 = np.percentile(array, (50, 95, 99), method="inverted_cdf")
    mean, top = float(array.mean()), float(array.max())
    return Distribution(array.size, mean, float(p50), float(p95), float(p99), top)


@dataclass(frozen=True)
class ModelFigures:
    """Figures of the requests to one model (the base or an adapter)."""

    model: str
    requests: int
    errors: int
    output_tokens: int
    ttft: Distribution
    time_between_tokens: Distribution
    e2e: Distribution


@dataclass(frozen=True)
class Summary:
    """All figures of a run.

    window_seconds   from the start to the end of sending (by duration) or to the last response
    rates            what arrived within the window, divided by it
    chunk_gap        pauses between chunks as they were, see RequestRecord.chunk_gaps
    send_lag         how late the client sent; near 0, or the client is the bottleneck
    """

    requests: int
    completed: int
    errors: dict[str, int]
    window_seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    output_tokens: int
    prompt_tokens: Distribution
    completion_tokens: Distribution
    tokens_estimated: bool
    ttft: Distribution
    time_between_tokens: Distribution
    chunk_gap: Distribution
    e2e: Distribution
    send_lag: Distribution
    models: tuple[ModelFigures, ...]


def summarise(records: Sequence[RequestRecord], window_seconds: float) -> Summary:
    """Figures of all `records`; rates count what arrived in [0, window_seconds]."""
    good = [record for record in records if record.error is None]
    inside = [record for record in good if record.finished <= window_seconds]
    started = [record for record in good if record.chunk_times[0] <= window_seconds]
    output = sum(tokens_until(record, window_seconds) for record in good)
    prompt = sum(record.prompt_tokens or 0 for record in started)
    return Summary(
        requests=len(records),
        completed=len(good),
        errors=dict(Counter(record.error for record in records if record.error).most_common()),
        window_seconds=window_seconds,
        requests_per_second=_rate(len(inside), window_seconds),
        output_tokens_per_second=_rate(output, window_seconds),
        total_tokens_per_second=_rate(output + prompt, window_seconds),
        output_tokens=sum(record.num_tokens for record in good),
        prompt_tokens=distribution(r.prompt_tokens for r in good if r.prompt_tokens is not None),
        completion_tokens=distribution(record.num_tokens for record in good),
        tokens_estimated=any(record.estimated for record in good),
        ttft=distribution(record.ttft for record in good),
        time_between_tokens=distribution(_chain(record.token_gaps() for record in good)),
        chunk_gap=distribution(_chain(record.chunk_gaps() for record in good)),
        e2e=distribution(record.e2e for record in good),
        send_lag=distribution(record.send_lag for record in records),
        models=_by_model(records),
    )


def tokens_until(record: RequestRecord, seconds: float) -> int:
    """Output tokens of `record` that had arrived `seconds` after the start."""
    pairs = zip(record.chunk_times, record.chunk_tokens, strict=True)
    return sum(tokens for at, tokens in pairs if at <= seconds)


def _by_model(records: Sequence[RequestRecord]) -> tuple[ModelFigures, ...]:
    groups = defaultdict[str, list[RequestRecord]](list)
    for record in records:
        groups[record.model].append(record)
    ranked = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(_model_figures(model, group) for model, group in ranked)


def _model_figures(model: str, records: Sequence[RequestRecord]) -> ModelFigures:
    good = [record for record in records if record.error is None]
    return ModelFigures(
        model=model,
        requests=len(records),
        errors=len(records) - len(good),
        output_tokens=sum(record.num_tokens for record in good),
        ttft=distribution(record.ttft for record in good),
        time_between_tokens=distribution(_chain(record.token_gaps() for record in good)),
        e2e=distribution(record.e2e for record in good),
    )


@dataclass(frozen=True)
class Timeline:
    """Output tokens a second and mean requests in flight, per bin of `bin_seconds`."""

    bin_seconds: float
    tokens_per_second: tuple[float, ...]
    in_flight: tuple[float, ...]


def timeline(records: Sequence[RequestRecord], end_seconds: float) -> Timeline:
    """Bins of at least a second (or a 30th of a short run) from 0 to `end_seconds`."""
    bin_seconds = max(min(1.0, end_seconds / 30), end_seconds / _MAX_TIMELINE_BINS) or 1.0
    num_bins = max(1, int(np.ceil(end_seconds / bin_seconds)))
    edges = np.arange(num_bins + 1) * bin_seconds
    times = np.fromiter(_chain(r.chunk_times for r in records), dtype=np.float64)
    tokens = np.fromiter(_chain(r.chunk_tokens for r in records), dtype=np.float64)
    counts, _ = np.histogram(times, bins=edges, weights=tokens)
    busy = np.zeros(num_bins)
    for record in records:
        overlap = np.minimum(record.finished, edges[1:]) - np.maximum(record.sent, edges[:-1])
        busy += np.clip(overlap, 0.0, None)
    return Timeline(
        bin_seconds, tuple((counts / bin_seconds).tolist()), tuple((busy / bin_seconds).tolist())
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _chain(parts: Iterable[Iterable[float]]) -> Iterable[float]:
    return chain.from_iterable(parts)
