import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from statistics import mean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.distributions import (
    Lengths,
    Popularity,
    parse_lengths,
    parse_popularity,
    poisson_arrivals,
)
from loadtest.errors import InvalidWorkloadError
from loadtest.prompts import TextPrompts, help_topics
from loadtest.workload import WorkloadSpec, planned_requests, read_workload_file

PROMPTS = TextPrompts(help_topics())


def requests(num: int, **spec: object) -> list:
    return list(islice(planned_requests(WorkloadSpec("base", **spec), PROMPTS), num))


def test_zipf_frequencies_follow_the_law() -> None:
    rng, picker = Random(3), Popularity(1.0).picker(64)
    counts = Counter(picker.pick(rng) for _ in range(100_000))
    harmonic = sum(1 / (k + 1) for k in range(64))
    for rank in (0, 1, 3, 9, 31, 63):
        expected = 100_000 / (rank + 1) / harmonic
        assert counts[rank] == pytest.approx(expected, abs=5 * expected**0.5)


def test_uniform_popularity_is_flat() -> None:
    rng, picker = Random(3), parse_popularity("uniform").picker(10)
    counts = Counter(picker.pick(rng) for _ in range(50_000))
    assert set(counts) == set(range(10))
    assert all(count == pytest.approx(5_000, rel=0.1) for count in counts.values())


def test_equal_seeds_give_equal_requests_and_other_seeds_others() -> None:
    spec = {"adapters": ("a", "b", "c"), "rate": 5.0, "prompt_lengths": Lengths(4, 60)}
    assert requests(50, seed=7, **spec) == requests(50, seed=7, **spec)
    assert requests(50, seed=7, **spec) != requests(50, seed=8, **spec)


def test_other_lengths_leave_models_and_arrivals_alone() -> None:
    spec = {"adapters": ("a", "b", "c"), "rate": 5.0, "base_share": 0.3}
    one = requests(80, output_lengths=Lengths(8, 8), **spec)
    two = requests(80, output_lengths=Lengths(8, 99), prompt_lengths=Lengths(1, 9), **spec)
    assert [(r.model, r.due) for r in one] == [(r.model, r.due) for r in two]


def test_base_share_and_models() -> None:
    models = Counter(r.model for r in requests(4000, adapters=("a", "b"), base_share=0.25))
    assert models["base"] == pytest.approx(1000, rel=0.12)
    assert set(models) == {"base", "a", "b"}
    assert {r.model for r in requests(20)} == {"base"}


def test_popularity_is_not_tied_to_the_order_of_names() -> None:
    adapters = tuple(f"a{n:03d}" for n in range(50))
    tops = set()
    for seed in range(6):
        chosen = requests(300, adapters=adapters, popularity=Popularity(1.2), seed=seed)
        tops.add(Counter(r.model for r in chosen).most_common(1)[0][0])
    assert len(tops) > 1


def test_poisson_arrivals_have_exponential_gaps() -> None:
    times = list(islice(poisson_arrivals(20.0, Random(5)), 20_000))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert mean(gaps) == pytest.approx(1 / 20, rel=0.03)
    assert median(gaps) == pytest.approx(0.6931 / 20, rel=0.05)  # ln 2 / rate
    assert all(gap > 0 for gap in gaps)


def test_closed_loops_have_no_due_times() -> None:
    assert all(request.due is None for request in requests(5))


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("128", 128, 128), ("uniform:10:20", 10, 20), ("lognormal:100:0.8:250", 1, 250)],
)
def test_lengths_stay_in_their_bounds(text: str, low: int, high: int) -> None:
    rng, lengths = Random(1), parse_lengths(text)
    drawn = [lengths.draw(rng) for _ in range(4000)]
    assert low <= min(drawn) and max(drawn) <= high
    assert (len(set(drawn)) == 1) == (low == high)


def test_lognormal_has_its_median() -> None:
    rng, lengths = Random(1), parse_lengths("lognormal:100:0.5")
    assert median(lengths.draw(rng) for _ in range(20_000)) == pytest.approx(100, rel=0.03)


@pytest.mark.parametrize(
    "text",
    ["", "x", "0", "-3", "uniform:5", "uniform:9:4", "lognormal:9:0", "lognormal:0:1", "1.5"],
)
def test_bad_lengths_are_named(text: str) -> None:
    with pytest.raises(InvalidWorkloadError, match="lengths"):
        parse_lengths(text)


@pytest.mark.parametrize("text", ["zipf", "zipf:0", "zipf:-1", "zipf:inf", "zipf:nan", "flat", ""])
def test_bad_popularities_are_named(text: str) -> None:
    with pytest.raises(InvalidWorkloadError, match="popularity"):
        parse_popularity(text)


@given(st.integers(1, 4000), st.integers(0, 2**32))
def test_prompts_have_the_wanted_number_of_characters(num_tokens: int, seed: int) -> None:
    prompt = TextPrompts("lorem ipsum dolor sit amet ", 3.0).cut(num_tokens, Random(seed))
    assert len(prompt) == num_tokens * 3


def test_prompts_differ_and_begin_with_a_word() -> None:
    rng = Random(2)
    prompts = [PROMPTS.cut(64, rng) for _ in range(300)]
    assert len(set(prompts)) > 290  # how many begin at one word depends on the text of this Python
    text = help_topics()
    assert all(text[text.index(prompt) - 1] == " " for prompt in prompts if prompt in text[1:])


def test_calibration_uses_the_servers_own_counts() -> None:
    assert PROMPTS.calibrated([(500, 100), (300, 100)]).chars_per_token == 4.0
    assert PROMPTS.calibrated([]) == PROMPTS


def test_workload_file_keeps_order_ids_and_times(tmp_path: Path) -> None:
    rows = [
        {"model": "b", "prompt": "text", "max_tokens": 2, "at": 1.5},
        {"model": "a", "prompt": [1, 2, 3], "max_tokens": 4, "at": 0.5},
    ]
    path = tmp_path / "workload.json"
    path.write_text(json.dumps(rows))
    first, second = read_workload_file(path)
    assert (first.index, first.model, first.prompt, first.due) == (0, "a", (1, 2, 3), 0.5)
    assert (second.model, second.prompt, second.max_tokens) == ("b", "text", 2)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '[{"model": "a", "prompt": "x"}]',
        '[{"model": "a", "prompt": "x", "max_tokens": 1, "temprature": 1}]',
        '[{"model": "a", "prompt": "x", "max_tokens": 1, "at": 1},'
        ' {"model": "a", "prompt": "x", "max_tokens": 1}]',
    ],
)
def test_bad_workload_files_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "workload.json"
    path.write_text(content)
    with pytest.raises(InvalidWorkloadError, match=r"workload\.json"):
        read_workload_file(path)
