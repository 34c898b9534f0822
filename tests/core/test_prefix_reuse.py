"""Pages of equal beginnings are computed once, and never change a token."""

from pathlib import Path
from typing import Any

import pytest
from engine_runs import Result, collect, greedy, request, run_all
from memory_factors import MemoryFactorSource
from tiny_models import random_prompt, small_engine, write_tiny_llama
from transformers_oracle import assert_same_greedy, load_reference, reference_greedy

from core.engine import Engine


@pytest.fixture
def source(adapters) -> MemoryFactorSource:
    return MemoryFactorSource.of(*adapters.values())


def one_by_one(engine: Engine, *requests: Any) -> dict[str, Result]:
    results = {}
    for each in requests:
        results |= run_all(engine, [each])
    return results


def hits(result: Result) -> int:
    return result.outputs[-1].num_cached_tokens


@pytest.mark.parametrize(
    ("length", "expected"), [(16, 12), (17, 16), (18, 16), (19, 16), (3, 0), (4, 0), (5, 4)]
)
def test_full_pages_are_reused_but_for_the_last_token(
    length: int, expected: int, tiny_path: Path, reference
) -> None:
    """With pages of 4: a part of a page is not shared, and one token is always computed."""
    engine = small_engine(tiny_path)
    prompt = random_prompt(1, length)
    results = one_by_one(engine, request("a", prompt), request("b", prompt))
    assert (hits(results["a"]), hits(results["b"])) == (0, expected)
    assert engine.stats().num_prefix_hit_tokens == expected
    for result in results.values():
        assert_same_greedy(result.token_ids, reference_greedy(reference, prompt, 8))


def test_generated_tokens_are_reused_as_a_prompt(tiny_path: Path, reference) -> None:
    """The next turn of a chat begins with the last turn's prompt and answer."""
    engine = small_engine(tiny_path)
    prompt = random_prompt(2, 9)
    answer = run_all(engine, [request("a", prompt, greedy(12))])["a"].token_ids
    turn = (*prompt, *answer, *random_prompt(3, 5))
    result = run_all(engine, [request("b", turn)])["b"]
    assert hits(result) == 20  # of 21; the last generated token was never computed
    assert_same_greedy(result.token_ids, reference_greedy(reference, turn, 8))


def test_a_common_beginning_is_shared_while_the_first_still_runs(
    tiny_path: Path, reference
) -> None:
    engine = small_engine(tiny_path)
    common = random_prompt(4, 12)
    engine.add(request("a", (*common, 5, 6), greedy(20)))
    engine.step()
    used = engine.stats().kv_bytes_used
    engine.add(request("b", (*common, 7, 8), greedy(20)))
    results: dict[str, Result] = {}
    collect(results, engine.step())
    assert engine.stats().kv_bytes_used < 2 * used
    while engine.has_work:
        collect(results, engine.step())
    assert hits(results["b"]) == 12
    expected = reference_greedy(reference, (*common, 7, 8), 20)
    assert_same_greedy(results["b"].token_ids, expected)


def test_digests_never_share(tiny_path: Path, source, reference, adapters) -> None:
    """The base, two adapters, and an adapter whose digest reads "base"."""
    source.known["base"] = adapters["mlp-2"]
    engine = small_engine(tiny_path, source)
    prompt = random_prompt(5, 18)
    digests = [None, "all-4", "one-1", "base"]
    first = one_by_one(engine, *[request(f"a{d}", prompt, None, d) for d in digests])
    assert engine.stats().num_prefix_hit_tokens == 0
    second = one_by_one(engine, *[request(f"b{d}", prompt, None, d) for d in digests])
    assert engine.stats().num_prefix_hit_tokens == 4 * 16
    for digest in digests:
        factors = None if digest is None else source.known[digest]
        expected = reference_greedy(reference, prompt, 8, factors)
        assert_same_greedy(first[f"a{digest}"].token_ids, expected)
        assert_same_greedy(second[f"b{digest}"].token_ids, expected)


def test_a_later_page_is_no_hit_without_the_pages_before_it(tiny_path: Path, reference) -> None:
    engine = small_engine(tiny_path)
    body = random_prompt(6, 12)
    run_all(engine, [request("a", body)])
    shifted = (9, 9, 9, 9, *body)
    result = run_all(engine, [request("b", shifted)])["b"]
    assert hits(result) == 0
    assert_same_greedy(result.token_ids, reference_greedy(reference, shifted, 8))


def test_results_do_not_depend_on_prefix_caching(tiny_path: Path, source, adapters) -> None:
    common = random_prompt(7, 21)
    asked = [
        request(f"{digest}-{cut}", (*common[:cut], 40 + cut), greedy(6), digest)
        for digest in (None, "all-4")
        for cut in (0, 3, 4, 5, 8, 15, 16, 21)
    ]
    with_cache = small_engine(tiny_path, source)
    without = small_engine(tiny_path, source, enable_prefix_caching=False)
    own, plain = one_by_one(with_cache, *asked), one_by_one(without, *asked)
    assert {n: r.token_ids for n, r in own.items()} == {n: r.token_ids for n, r in plain.items()}
    assert with_cache.stats().num_prefix_hit_tokens > 0
    assert without.stats().num_prefix_hit_tokens == 0


def test_eviction_of_old_pages_keeps_answers_right(tiny_path: Path, reference) -> None:
    """Many prompts through few pages: hits come and go, tokens stay."""
    engine = small_engine(tiny_path, num_pages=9)
    prompts = [random_prompt(n, 9 + n % 3) for n in range(6)]
    for turn in range(3):
        for n, prompt in enumerate(prompts):
            again = prompt if (turn + n) % 2 else prompts[0]
            result = run_all(engine, [request("a", again)])["a"]
            assert_same_greedy(result.token_ids, reference_greedy(reference, again, 8))
    assert 0 < engine.stats().num_prefix_hit_tokens < 17 * 8


def test_dynamic_rope_shares_no_page_beyond_the_original_length(tmp_path: Path) -> None:
    """Keys of a long prompt are rotated by its own length: another length has other keys."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    path = write_tiny_llama(tmp_path / "m", rope_parameters=rope, max_position_embeddings=16)
    reference = load_reference(path)
    engine = small_engine(path, max_model_len=128)
    common = random_prompt(8, 40)
    for number, length in enumerate((30, 40, 30, 22, 17)):
        prompt = common[:length]
        result = run_all(engine, [request(str(number), prompt)])[str(number)]
        assert hits(result) == 0
        assert_same_greedy(result.token_ids, reference_greedy(reference, prompt, 8))
    for number, length in enumerate((12, 13, 16)):  # short enough to share, and to grow beyond
        prompt = common[:length]
        result = run_all(engine, [request(f"s{number}", prompt, greedy(12))])[f"s{number}"]
        assert hits(result) == (0, 12, 12)[number]
        assert_same_greedy(result.token_ids, reference_greedy(reference, prompt, 12))
