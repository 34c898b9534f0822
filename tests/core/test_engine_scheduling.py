"""Chunked prefill, preemption, limits and fairness: none of them changes a token."""

from pathlib import Path

import pytest
from engine_runs import Result, collect, greedy, request, run_all
from memory_factors import MemoryFactorSource, random_factors
from tiny_models import random_prompt, small_engine
from transformers_oracle import assert_same_greedy, reference_greedy

from core.engine import Engine
from core.engine_config import EngineConfig
from core.errors import EngineOverloadedError
from core.requests import FinishReason, SamplingParams


@pytest.fixture
def source(adapters) -> MemoryFactorSource:
    return MemoryFactorSource.of(*adapters.values())


# -- chunked prefill ---------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 40])
def test_no_step_exceeds_its_token_budget(budget: int, tiny_path: Path, reference) -> None:
    engine = small_engine(tiny_path, max_num_seqs=1, max_num_batched_tokens=budget)
    prompt = random_prompt(1, 20)
    result = run_all(engine, [request("a", prompt, greedy(6))])["a"]
    assert_same_greedy(result.token_ids, reference_greedy(reference, prompt, 6))
    assert engine.num_steps == -(-20 // budget) + 5


def test_the_default_of_a_step_on_the_cpu(tiny_path: Path) -> None:
    """512 tokens: two prompts of 200 and a part of the third; more where more sequences may run."""
    engine = small_engine(tiny_path, max_num_batched_tokens=None, num_pages=200)
    for n in range(3):
        engine.add(request(str(n), random_prompt(n, 200), greedy(2)))
    assert [output.request_id for output in engine.step()] == ["0", "1"]
    config = EngineConfig(max_num_seqs=600)
    assert config.tokens_per_step("cpu") == 600 and config.tokens_per_step("cuda") == 2048


def test_decodes_go_on_while_a_long_prompt_is_computed(tiny_path: Path) -> None:
    """Each step brings every running sequence its token; the prompt gets a quarter of it."""
    engine = small_engine(tiny_path, max_num_seqs=4, max_num_batched_tokens=16, num_pages=100)
    for n in range(3):
        engine.add(request(f"short{n}", random_prompt(n, 2), greedy(30)))
    engine.step()
    engine.add(request("long", random_prompt(9, 100), greedy(2)))
    for _ in range(24):
        names = {output.request_id for output in engine.step()}
        assert names == {"short0", "short1", "short2"}
    assert {output.request_id for output in engine.step()} >= {"long"}  # 100 tokens, 4 a step


@pytest.mark.parametrize(
    ("max_num_seqs", "budget", "num_decoding", "tokens_of_prompt"),
    [(4, 8, 0, 8), (4, 8, 1, 2), (8, 8, 6, 2), (8, 8, 7, 1), (2, 3, 1, 1), (2, 2, 1, 1)],
)
def test_prompts_take_a_quarter_of_a_step_while_others_decode(
    max_num_seqs: int, budget: int, num_decoding: int, tokens_of_prompt: int, tiny_path: Path
) -> None:
    """And what decodes always gets its token, of which so many may be more than three quarters."""
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget}
    engine = small_engine(tiny_path, **limits, num_pages=100)
    for n in range(num_decoding):
        engine.add(request(f"decoding{n}", random_prompt(n, 1), greedy(30)))
        engine.step()
    engine.add(request("prompt", random_prompt(9, 2 * tokens_of_prompt + 1), greedy(2)))
    names = {f"decoding{n}" for n in range(num_decoding)}
    for _ in range(2):
        assert {output.request_id for output in engine.step()} == names
    assert {output.request_id for output in engine.step()} == names | {"prompt"}


# -- preemption --------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("num_pages", [10, 16])
def test_preemption_loses_and_changes_no_token(
    num_pages: int, prefix_caching: bool, compiled: bool, tiny_path: Path, source, reference,
    adapters,
) -> None:  # fmt: skip
    engine = small_engine(
        tiny_path,
        source,
        num_pages=num_pages,
        enable_prefix_caching=prefix_caching,
        compiled_kernels=compiled,
        max_num_batched_tokens=24,
    )
    digests = [None, "all-4", "one-1", None, "wide-16", "all-4"]
    wanted = [(random_prompt(n, 4 + 2 * n), digest) for n, digest in enumerate(digests)]
    results = run_all(
        engine, [request(str(n), prompt, greedy(18), d) for n, (prompt, d) in enumerate(wanted)]
    )
    for n, (prompt, digest) in enumerate(wanted):
        factors = None if digest is None else adapters[digest]
        assert_same_greedy(
            results[str(n)].token_ids, reference_greedy(reference, prompt, 18, factors)
        )
    assert engine.stats().num_preemptions > 0
    assert source.num_open_leases == 0


def test_the_youngest_is_preempted_and_the_oldest_ends_first(tiny_path: Path) -> None:
    engine = small_engine(tiny_path, num_pages=10, max_num_batched_tokens=24)
    order = []
    for n in range(4):
        engine.add(request(str(n), random_prompt(n, 6), greedy(20)))
    while engine.has_work:
        order += [out.request_id for out in engine.step() if out.finish_reason is not None]
    assert order == ["0", "1", "2", "3"]
    assert engine.stats().num_preemptions > 0


def test_seeded_sampling_survives_preemption(tiny_path: Path) -> None:
    def tokens(num_pages: int) -> dict[str, tuple[int, ...]]:
        engine = small_engine(tiny_path, num_pages=num_pages)
        results = run_all(
            engine,
            [
                request(
                    str(n),
                    random_prompt(n, 6),
                    SamplingParams(
                        seed=n, max_tokens=20, ignore_eos=True, presence_penalty=0.5, top_p=0.9
                    ),
                )
                for n in range(4)
            ],
        )
        assert (engine.stats().num_preemptions > 0) == (num_pages == 10)
        return {name: result.token_ids for name, result in results.items()}

    assert tokens(10) == tokens(100)


def test_a_preempted_sequence_keeps_its_lease(tiny_path: Path, source) -> None:
    """Pinned from admission to the last token, even while it waits again."""
    engine = small_engine(tiny_path, source, num_pages=8, max_num_batched_tokens=24)
    engine.add(request("old", random_prompt(1, 6), greedy(20)))
    engine.add(request("young", random_prompt(2, 6), greedy(20), "all-4"))
    while engine.stats().num_preemptions == 0:
        engine.step()
    assert engine.stats().num_waiting == 1
    assert source.num_leases["all-4"] == 1
    del source.known["all-4"]
    assert run_all(engine)["young"].finish_reason is FinishReason.LENGTH
    assert source.num_open_leases == 0


# -- limits and fairness -----------------------------------------------------------------------


def test_the_queue_is_bounded_in_all(tiny_path: Path) -> None:
    engine = small_engine(tiny_path, max_num_seqs=2, max_waiting=5)
    for n in range(5):
        engine.add(request(str(n), random_prompt(n, 4)))
    with pytest.raises(EngineOverloadedError, match="limit is 5") as caught:
        engine.add(request("more", random_prompt(9, 4)))
    assert caught.value.retry_after_seconds > 0
    engine.step()  # two run now
    for n in range(2):
        engine.add(request(f"late{n}", random_prompt(n, 4)))
    with pytest.raises(EngineOverloadedError):
        engine.add(request("more", random_prompt(9, 4)))
    assert len(run_all(engine)) == 7


def test_the_queue_is_bounded_per_adapter(tiny_path: Path, source) -> None:
    engine = small_engine(tiny_path, source, max_waiting_per_adapter=3)
    for n in range(3):
        engine.add(request(f"a{n}", random_prompt(n, 4), None, "all-4"))
        engine.add(request(f"b{n}", random_prompt(n, 4)))
    for digest in ("all-4", None):
        with pytest.raises(EngineOverloadedError, match="limit is 3"):
            engine.add(request("more", random_prompt(9, 4), None, digest))
    engine.add(request("other", random_prompt(9, 4), None, "one-1"))
    assert len(run_all(engine)) == 7


def finish_order(engine: Engine) -> list[str]:
    results: dict[str, Result] = {}
    order = []
    while engine.has_work:
        outputs = engine.step()
        engine.check_integrity()
        collect(results, outputs)
        order += [out.request_id for out in outputs if out.finish_reason is not None]
    return order


def test_many_requests_of_one_adapter_do_not_starve_another(tiny_path: Path, source) -> None:
    engine = small_engine(tiny_path, source, max_num_seqs=2)
    for n in range(50):
        engine.add(request(f"many{n}", random_prompt(n, 6), greedy(4), "all-4"))
    engine.step()
    engine.add(request("single", random_prompt(99, 6), greedy(4), "one-1"))
    engine.add(request("base", random_prompt(98, 6), greedy(4)))
    order = finish_order(engine)
    assert len(order) == 52
    assert set(order[2:4]) == {"single", "base"}  # right after the two that ran already


def test_two_busy_adapters_are_served_the_same_number_of_tokens(tiny_path: Path, source) -> None:
    """One asks in long requests, the other in short ones: fairness counts tokens."""
    engine = small_engine(tiny_path, source, max_num_seqs=2, num_pages=200)
    for n in range(10):
        engine.add(request(f"long{n}", random_prompt(n, 30), greedy(10), "all-4"))
    for n in range(40):
        engine.add(request(f"short{n}", random_prompt(n, 6), greedy(4), "one-1"))
    served = {"long": 0, "short": 0}
    for name in finish_order(engine):
        kind = name.rstrip("0123456789")
        served[kind] += {"long": 40, "short": 10}[kind]
        if max(served.values()) == 400:
            break
        assert abs(served["long"] - served["short"]) <= 3 * 40


def test_idle_time_saves_up_nothing(tiny_path: Path, source) -> None:
    """Who was idle while another was served 50 requests gets its share, not a backlog."""
    engine = small_engine(tiny_path, source, max_num_seqs=1, num_pages=200)
    run_all(engine, [request("early", random_prompt(1, 6), greedy(4), "one-1")])
    for n in range(20):
        engine.add(request(f"busy{n}", random_prompt(n, 6), greedy(4), "all-4"))
    order: list[str] = []
    while len(order) < 8:
        order += [out.request_id for out in engine.step() if out.finish_reason is not None]
    for n in range(12):
        engine.add(request(f"back{n}", random_prompt(n, 6), greedy(4), "one-1"))
    order = finish_order(engine)[:12]
    kinds = [name.rstrip("0123456789") for name in order]
    assert 5 <= kinds.count("back") <= 7, kinds


def test_counters_of_the_idle_are_forgotten(tiny_path: Path, tiny_config) -> None:
    many = [random_factors(tiny_config, f"d{n}", rank=1, seed=n) for n in range(20)]
    engine = small_engine(tiny_path, MemoryFactorSource.of(*many))
    run_all(engine, [request(f.digest, random_prompt(1, 4), greedy(2), f.digest) for f in many])
    assert engine.scheduler.waiting._served == {}
    assert engine.scheduler.waiting._queues == {}


def test_a_request_that_needs_the_whole_cache_runs_alone_in_its_turn(tiny_path: Path) -> None:
    """Small ones that keep coming do not pass it for ever."""
    engine = small_engine(tiny_path, num_pages=12, max_num_batched_tokens=48)
    engine.add(request("small0", random_prompt(0, 8), greedy(8)))
    engine.step()
    engine.add(request("big", random_prompt(1, 40), greedy(8)))
    order: list[str] = []
    for n in range(1, 40):
        engine.add(request(f"small{n}", random_prompt(n, 8), greedy(8)))
        order += [out.request_id for out in engine.step() if out.finish_reason is not None]
        engine.check_integrity()
    order += finish_order(engine)
    assert order.index("big") <= 3
