"""How speed and memory grow, without servers: figures, pages, plots, samples of answers."""

import struct
from pathlib import Path

import pytest

from loadtest.bench.adapters import COUNTS, AdaptersResult, CountFigures, turns_of
from loadtest.bench.adapters_command import parse_counts
from loadtest.bench.adapters_page import adapters_page, write_adapters_chart
from loadtest.bench.cost import CostResult, CostSizes, Point, points_of
from loadtest.bench.cost_page import cost_page, write_cost_chart
from loadtest.bench.limit import MachineSpeed
from loadtest.bench.plan import BenchRequest
from loadtest.bench.sampled_exactness import Sample, SampledExactness
from loadtest.errors import BenchError

CONDITIONS = {"date": "2026-01-02", "cores": 2, "cpu": "some"}


def adapters_result() -> AdaptersResult:
    counts = [
        CountFigures(num, num * 4096, [200.0 - n, 250.0 - n], [0.1, 0.2, 0.1 * n])
        for n, num in enumerate(COUNTS)
    ]
    return AdaptersResult(counts, 16, 64, 128, 64, "uniform", 5 << 20, 3 << 30, [0.1])


def cost_result(sizes: CostSizes) -> CostResult:
    seconds = {
        point: [(10 + point.num_sequences + (point.rank or 0)) / 1000] * 2
        for point in points_of(sizes, 4)
    }
    limits = dict.fromkeys(seconds, 0.005)
    return CostResult(sizes, 4, seconds, limits, MachineSpeed(480e9, 80e9))


def test_counts_rise_from_the_base() -> None:
    assert parse_counts("16,1") == (0, 1, 16)
    for text, message in (("1,x", "not numbers"), ("-1,2", "negative")):
        with pytest.raises(BenchError, match=message):
            parse_counts(text)


def test_no_wave_has_the_same_place_in_two_rounds_that_follow() -> None:
    rounds = [turns_of(7, number) for number in range(4)]
    assert all(sorted(places) == list(range(7)) for places in rounds)
    assert [places.index(0) for places in rounds] == [0, 6, 4, 2]


def test_the_page_by_number_of_adapters() -> None:
    page = adapters_page(adapters_result(), CONDITIONS)
    assert "One server with 10,000 adapters registered; 16 clients, 64 requests a wave" in page
    assert "| 0 (base) | 225.0 (200.0 to 250.0) | 1.00 | 100.0 / 200.0 | - |" in page
    assert "| 10,000 | 219.0 (194.0 to 244.0) | 0.97 | 200.0 / 600.0 | 4.0 KiB |" in page
    assert "takes 5.00 MiB of factors" in page


def test_every_state_of_the_engine_is_measured_once() -> None:
    points = points_of(CostSizes(), 4)
    assert len(points) == len(set(points)) == 14 + 8 + 5
    assert points.count(Point(8, 128, None)) == 1


def test_the_page_of_costs() -> None:
    page = cost_page(cost_result(CostSizes()), CONDITIONS)
    assert "480 GFLOP/s and 80 GB/s" in page
    assert "| 64 | 5.0 | 74.0 | 78.0 | 1.05 | 821 |" in page
    assert "| 2,048 | 5.0 | 18.0 | 22.0 | 1.22 | 364 |" in page
    assert "| 64 | 82.0 | 4.56 |" in page


def test_plots_are_drawn(tmp_path: Path) -> None:
    for name, draw in (
        ("a.png", lambda path: write_adapters_chart(path, adapters_result(), CONDITIONS)),
        ("c.png", lambda path: write_cost_chart(path, cost_result(CostSizes()), CONDITIONS)),
    ):
        draw(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        assert struct.unpack(">II", data[16:24]) > (900, 400)
        assert 20_000 < len(data) < 150_000


def test_a_sample_is_of_as_many_adapters_as_there_are() -> None:
    requests = [BenchRequest(n, (n,), n % 3 or None) for n in range(30)]
    sample = Sample(4, seed=1)
    sample.take(requests, [[n, n] for n in range(30)])
    assert sample.adapters == [1, 2]
    assert len({output.request.adapter for output in sample.outputs}) == 3
    assert [output.token_ids[0] for output in sample.outputs] == [
        output.request.index for output in sample.outputs
    ]
    assert (sample.num_answers, len(sample.outputs)) == (30, 4)


def test_a_difference_fails_and_ties_are_set_aside() -> None:
    SampledExactness(100, 10, 9, 1, 3).refuse_inexact()
    SampledExactness(100, 1, 0, 1, 1).refuse_inexact()
    with pytest.raises(BenchError, match=r"exact 0\.900 of 10 answers"):
        SampledExactness(100, 10, 9, 0, 3).refuse_inexact()
