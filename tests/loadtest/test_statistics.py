import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.dialects import apportion
from loadtest.records import RequestRecord
from loadtest.stats import distribution, summarise, timeline, tokens_until


def record(
    times: list[float], tokens: list[int], *, due: float = 0.0, model: str = "base", **more: object
) -> RequestRecord:
    end = times[-1] if times else due
    return RequestRecord(
        0, model, due, due, finished=end, chunk_times=times, chunk_tokens=tokens, **more
    )


def test_percentiles_are_observed_values() -> None:
    figures = distribution(range(1, 101))
    assert (figures.p50, figures.p95, figures.p99, figures.max) == (50, 95, 99, 100)
    assert (figures.count, figures.mean) == (100, 50.5)
    assert distribution([3.0, 1.0]).p50 == 1.0
    assert distribution([3.0, 1.0]).p95 == 3.0


def test_no_values_give_no_figures() -> None:
    figures = distribution([])
    assert figures.count == 0
    assert (figures.mean, figures.p50, figures.p99, figures.max) == (None, None, None, None)


def test_a_chunk_of_many_tokens_counts_as_many_equal_gaps() -> None:
    one = record([1.0, 1.4, 1.5], [3, 4, 1])
    assert one.token_gaps() == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1])
    assert one.chunk_gaps() == pytest.approx([0.4, 0.1])
    assert one.num_tokens == 8


def test_grouping_changes_no_mean_time_between_tokens() -> None:
    steady = record([0.1 * step for step in range(1, 10)], [1] * 9)
    grouped = record([0.1, 0.5, 0.9], [1, 4, 4])
    assert sum(steady.token_gaps()) == pytest.approx(sum(grouped.token_gaps()))
    assert len(steady.token_gaps()) == len(grouped.token_gaps())
    assert max(grouped.chunk_gaps()) == pytest.approx(0.4)  # the stall stays visible


@given(st.lists(st.tuples(st.floats(0.001, 9), st.integers(1, 30)), min_size=1, max_size=40))
def test_gaps_sum_to_the_decode_time(steps: list[tuple[float, int]]) -> None:
    times, now = [], 0.0
    for gap, _ in steps:
        now += gap
        times.append(now)
    one = record(times, [tokens for _, tokens in steps])
    assert sum(one.token_gaps()) == pytest.approx(times[-1] - times[0], abs=1e-9)
    assert len(one.token_gaps()) == one.num_tokens - steps[0][1]


def test_latencies_count_from_the_due_time() -> None:
    late = RequestRecord(0, "base", due=2.0, sent=2.7, finished=4.0)
    late.chunk_times, late.chunk_tokens = [3.0], [1]
    assert late.ttft == pytest.approx(1.0)
    assert late.e2e == pytest.approx(2.0)
    assert late.send_lag == pytest.approx(0.7)


def test_rates_count_only_what_arrived_in_the_window() -> None:
    inside = record([1.0, 2.0], [1, 1], prompt_tokens=10)
    across = record([9.0, 11.0], [2, 2], prompt_tokens=20)
    summary = summarise([inside, across], 10.0)
    assert summary.output_tokens_per_second == pytest.approx(0.4)  # 1 + 1 + 2
    assert summary.total_tokens_per_second == pytest.approx(3.4)
    assert summary.requests_per_second == pytest.approx(0.1)
    assert summary.completed == 2
    assert tokens_until(across, 10.0) == 2


def test_failures_are_counted_by_kind_and_give_no_latency() -> None:
    good = record([1.0], [1])
    bad = [record([0.5], [1], error="http_429"), record([], [], error="http_429")]
    summary = summarise([good, *bad, record([], [], error="connect")], 2.0)
    assert summary.errors == {"http_429": 2, "connect": 1}
    assert (summary.requests, summary.completed, summary.ttft.count) == (4, 1, 1)
    assert summary.output_tokens_per_second == pytest.approx(0.5)


def test_nothing_but_failures_is_summarised_too() -> None:
    summary = summarise([record([], [], error="connect")], 0.0)
    assert summary.completed == 0
    assert summary.output_tokens_per_second == 0.0


def test_models_are_ranked_by_requests() -> None:
    records = [record([1.0], [1], model=model) for model in ("b", "a", "b", "c")]
    records[3].error = "timeout"
    figures = summarise(records, 1.0).models
    assert [(row.model, row.requests, row.errors) for row in figures] == [
        ("b", 2, 0),
        ("a", 1, 0),
        ("c", 1, 1),
    ]


def test_timeline_accounts_for_every_token_and_every_busy_second() -> None:
    records = [record([0.5, 1.5, 2.5], [1, 5, 2]), record([2.9], [4], due=1.0)]
    line = timeline(records, 3.0)
    assert sum(line.tokens_per_second) * line.bin_seconds == pytest.approx(12)
    assert sum(line.in_flight) * line.bin_seconds == pytest.approx(2.5 + 1.9)


@given(st.integers(0, 400), st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_apportioned_tokens_sum_up(total: int, weights: list[int]) -> None:
    shares = apportion(total, weights)
    assert len(shares) == len(weights)
    assert min(shares) >= 1
    assert sum(shares) == max(total, len(weights)) or sum(weights) == 0


def test_apportioned_tokens_follow_the_text() -> None:
    assert apportion(13, [2, 6, 2]) == [3, 7, 3]
