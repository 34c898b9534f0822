"""Many adapters in one batch: every request gets exactly its own weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import greedy, request, run_all
from memory_factors import MemoryFactorSource, random_factors
from tiny_models import random_prompt, small_engine
from transformers_oracle import assert_same_greedy, reference_greedy

from core.adapter_slots import StackBinding
from core.errors import AdapterUnavailableError
from core.requests import FinishReason
from core.torch_layers import TorchLayers


@pytest.fixture
def source(adapters) -> MemoryFactorSource:
    return MemoryFactorSource.of(*adapters.values())


class Oracle:
    """Reference tokens, computed once per question."""

    def __init__(self, model: Any, adapters: Any) -> None:
        self._model, self._adapters, self._known = model, adapters, {}

    def __call__(self, prompt: tuple[int, ...], num_tokens: int, digest: str | None = None) -> Any:
        key = (prompt, num_tokens, digest)
        if key not in self._known:
            factors = None if digest is None else self._adapters[digest]
            self._known[key] = reference_greedy(self._model, prompt, num_tokens, factors)
        return self._known[key]


@pytest.fixture(scope="module")
def oracle(reference, adapters) -> Oracle:
    return Oracle(reference, adapters)


@pytest.mark.parametrize("budget", [16, 17, 64, 512])
def test_base_and_adapters_of_mixed_ranks_and_targets_in_one_batch(
    budget: int, compiled: bool, tiny_path: Path, source, oracle, adapters
) -> None:
    """Ragged prompts, skewed popularity; small budgets cut the prompts in chunks."""
    engine = small_engine(
        tiny_path, source, num_pages=200, compiled_kernels=compiled, max_num_batched_tokens=budget
    )
    digests = [None, *adapters, None, "all-4", "all-4", "all-4", "one-1", None, "mixed"]
    wanted = {
        f"r{n}": (random_prompt(n, 1 + (7 * n) % 29), digest) for n, digest in enumerate(digests)
    }
    results = run_all(engine, [request(n, p, greedy(10), d) for n, (p, d) in wanted.items()])
    for name, (prompt, digest) in wanted.items():
        assert_same_greedy(results[name].token_ids, oracle(prompt, 10, digest))
        assert results[name].finish_reason is FinishReason.LENGTH
    assert source.num_open_leases == 0


def test_the_same_prompt_under_each_adapter_gives_each_its_own_answer(
    compiled: bool, tiny_path: Path, source, oracle, adapters
) -> None:
    prompt = random_prompt(50, 12)
    digests = [None, *adapters]
    engine = small_engine(tiny_path, source, compiled_kernels=compiled)
    results = run_all(engine, [request(str(d), prompt, greedy(8), d) for d in digests])
    for digest in digests:
        assert_same_greedy(results[str(digest)].token_ids, oracle(prompt, 8, digest))
    assert len({result.token_ids for result in results.values()}) == len(digests)


def test_adapters_come_and_go_while_others_run(
    compiled: bool, tiny_path: Path, source, oracle, adapters
) -> None:
    """One long request per adapter while short ones of all others pass by, a few at a time."""
    engine = small_engine(
        tiny_path, source, num_pages=200, max_num_seqs=4, compiled_kernels=compiled
    )
    wanted: dict[str, tuple[tuple[int, ...], int, str | None]] = {}
    for n, digest in enumerate(["wide-16", *list(adapters) * 3, None]):
        wanted[f"r{n}"] = (random_prompt(100 + n, 3 + n), 40 if n == 0 else 3, digest)
    results = run_all(
        engine, [request(name, p, greedy(k), d) for name, (p, k, d) in wanted.items()]
    )
    for name, (prompt, num_tokens, digest) in wanted.items():
        assert_same_greedy(results[name].token_ids, oracle(prompt, num_tokens, digest))


def test_a_base_only_batch_touches_no_adapter(
    tiny_path: Path, source, oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 5, with every door to adapter code watched: none is opened."""
    for compiled in (True, False):
        engine = small_engine(tiny_path, source, compiled_kernels=compiled)
        bindings: list[object] = []
        layers: Any = engine.model.layers
        owner, door = (layers._tables, "segments") if compiled else (layers.slots, "bind")
        plain = getattr(owner, door)

        def bind(rows: Any, run: Any = plain, seen: list[object] = bindings) -> Any:
            seen.append(run(rows))
            return seen[-1]

        monkeypatch.setattr(owner, door, bind)
        prompts = [random_prompt(n, 4 + n) for n in range(4)]
        results = run_all(engine, [request(str(n), p) for n, p in enumerate(prompts)])
        for n, prompt in enumerate(prompts):
            assert_same_greedy(results[str(n)].token_ids, oracle(prompt, 8))
        assert bindings
        assert set(bindings) == {None}
        assert engine.stats().adapter_slot_bytes == 0
    assert source.num_acquire_calls == 0
    assert source.prefetched == []


def test_an_all_one_adapter_batch_uses_no_mask(
    tiny_path: Path, source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 5's other half, and its counter-example: two adapters' decodes do share one."""
    engine = small_engine(tiny_path, source, compiled_kernels=False)
    layers = engine.model.layers
    assert isinstance(layers, TorchLayers)
    masked: list[bool] = []
    plain_bind = layers.slots.bind

    def bind(rows: Any) -> Any:
        binding = plain_bind(rows)
        assert isinstance(binding, StackBinding)
        masked.append(binding._others_TC1 is not None)
        return binding

    monkeypatch.setattr(layers.slots, "bind", bind)
    prompts = [random_prompt(n, 6) for n in range(4)]
    run_all(engine, [request(str(n), p, None, "all-4") for n, p in enumerate(prompts)])
    assert masked
    assert not any(masked)
    run_all(
        engine,
        [request(str(n), p, None, ("all-4", "one-1")[n % 2]) for n, p in enumerate(prompts)],
    )
    assert any(masked)


def test_a_replaced_adapter_never_meets_its_predecessor(
    compiled: bool, tiny_path: Path, tiny_config, source, reference, adapters
) -> None:
    """A name that moves to another digest: same prompts, no page and no factor in common."""
    new = random_factors(tiny_config, "all-4-new", rank=4, seed=9)
    source.known["all-4-new"] = new
    engine = small_engine(tiny_path, source, compiled_kernels=compiled)
    prompt = random_prompt(60, 17)
    engine.add(request("old", prompt, greedy(20), "all-4"))
    for _ in range(5):
        engine.step()
    del source.known["all-4"]  # unregistered while it runs: the lease holds
    results = run_all(engine, [request("new", prompt, greedy(20), "all-4-new")])
    assert engine.stats().num_prefix_hit_tokens == 0
    expected = reference_greedy(reference, prompt, 20, new)
    assert_same_greedy(results["new"].token_ids, expected)
    tail = reference_greedy(reference, prompt, 20, adapters["all-4"]).token_ids[-15:]
    assert results["old"].token_ids == tail


def test_rebuilt_factors_at_another_address_are_read_where_they_are(
    compiled: bool, tiny_path: Path, tiny_config, reference
) -> None:
    """Evicted and rebuilt between two requests: the old storage may be anyone's by now."""
    prompt, fresh = random_prompt(61, 6), random_factors(tiny_config, "again")
    expected = reference_greedy(reference, prompt, 6, fresh)
    source = MemoryFactorSource.of(random_factors(tiny_config, "again"))
    engine = small_engine(tiny_path, source, compiled_kernels=compiled)
    for n in range(3):
        result = run_all(engine, [request(f"r{n}", prompt, greedy(6), "again")])[f"r{n}"]
        assert_same_greedy(result.token_ids, expected)
        for pair in source.known["again"].pairs.values():  # poison what was let go
            pair.a_RI.fill_(torch.nan)
            pair.b_RO.fill_(torch.nan)
        source.known["again"] = random_factors(tiny_config, "again")


# -- loading -----------------------------------------------------------------------------------


def test_slow_factors_delay_only_their_own_requests(tiny_path: Path, source, oracle) -> None:
    engine = small_engine(tiny_path, source)
    source.hold("one-1")
    prompts = [random_prompt(n, 5) for n in range(4)]
    for n in range(2):
        engine.add(request(f"slow{n}", prompts[n], greedy(5), "one-1"))
    engine.add(request("base", prompts[2], greedy(5)))
    engine.add(request("fast", prompts[3], greedy(5), "all-4"))
    assert source.prefetched == ["one-1", "one-1", "all-4"]
    done: dict[str, int] = {}
    for step in range(12):
        for output in engine.step():
            assert not output.request_id.startswith("slow")
            if output.finish_reason is not None:
                done[output.request_id] = step
        engine.check_integrity()
    assert done == {"base": 4, "fast": 4}
    assert engine.stats().num_waiting == 2
    assert engine.num_steps == 5, "steps without a batch are not counted"
    source.let_go("one-1")
    results = run_all(engine)
    for n in range(2):
        assert_same_greedy(results[f"slow{n}"].token_ids, oracle(prompts[n], 5, "one-1"))
    assert source.num_open_leases == 0


def test_failing_factors_end_their_requests_with_the_reason(
    tiny_path: Path, source, oracle
) -> None:
    """All that wait for this load, in one step; nobody else, and later requests try again."""
    engine = small_engine(tiny_path, source)
    source.failures["one-1"] = "bank file is truncated"
    source.polls_left["one-1"] = 2
    prompt = random_prompt(1, 5)
    results = {}
    for n in range(3):
        engine.add(request(f"bad{n}", prompt, greedy(5), "one-1"))
    engine.add(request("good", prompt, greedy(5), "all-4"))
    ended_at = {}
    for step in range(4):
        for output in engine.step():
            if output.finish_reason is not None:
                ended_at[output.request_id] = step
                results[output.request_id] = output
        engine.check_integrity()
    assert ended_at == {"bad0": 2, "bad1": 2, "bad2": 2}
    for n in range(3):
        assert results[f"bad{n}"].finish_reason is FinishReason.ERROR
        assert results[f"bad{n}"].error == "bank file is truncated"
        assert results[f"bad{n}"].token_ids == ()
    assert source.num_acquire_calls == 4, "one failed load answers all who waited for it"
    good = run_all(engine)
    assert good["good"].finish_reason is FinishReason.LENGTH
    del source.failures["one-1"]
    again = run_all(engine, [request("bad0", prompt, greedy(5), "one-1")])["bad0"]
    assert_same_greedy(again.token_ids, oracle(prompt, 5, "one-1"))
    assert source.num_open_leases == 0


def test_a_digest_that_nobody_knows_is_an_error_never_the_base(tiny_path: Path, source) -> None:
    engine = small_engine(tiny_path, source)
    result = run_all(engine, [request("a", random_prompt(1, 5), None, "f00")])["a"]
    assert result.finish_reason is FinishReason.ERROR
    assert "f00" in result.error
    assert result.token_ids == ()


def test_an_engine_without_a_source_refuses_digests(tiny_path: Path) -> None:
    engine = small_engine(tiny_path)
    with pytest.raises(AdapterUnavailableError):
        engine.add(request("a", random_prompt(1, 5), None, "all-4"))
    assert not engine.has_work


@pytest.mark.parametrize("when", ["waiting", "loading", "prefilling", "running"])
def test_an_abort_frees_everything_at_once(when: str, tiny_path: Path, source, oracle) -> None:
    engine = small_engine(tiny_path, source, max_num_seqs=2, max_num_batched_tokens=8)
    prompts = [random_prompt(n, 20) for n in range(3)]
    if when == "loading":
        source.hold("one-1")
    if when == "waiting":
        for n in range(2):
            engine.add(request(f"other{n}", prompts[n], greedy(12)))
    engine.add(request("victim", prompts[2], greedy(12), "one-1"))
    for _ in range({"waiting": 1, "loading": 3, "prefilling": 1, "running": 5}[when]):
        engine.step()
    output = engine.abort("victim")
    assert output is not None
    assert output.finish_reason is FinishReason.ABORT
    assert engine.abort("victim") is None
    assert engine.abort("nobody") is None
    engine.check_integrity()
    assert source.num_open_leases == 0
    if when != "waiting":
        assert not engine.has_work
        assert engine.stats().kv_bytes_used == 0
    source.let_go("one-1")
    after = run_all(engine, [request("victim", prompts[2], greedy(12), "one-1")])["victim"]
    assert_same_greedy(after.token_ids, oracle(prompts[2], 12, "one-1"))


def test_bytes_for_adapters_do_not_grow_with_adapters_that_have_passed(
    compiled: bool, tiny_path: Path, tiny_config
) -> None:
    """One request at a time over many adapters needs room for one (and tables, for kernels)."""
    many = [random_factors(tiny_config, f"d{n}", rank=4, seed=n) for n in range(12)]
    engine = small_engine(tiny_path, MemoryFactorSource.of(*many), compiled_kernels=compiled)
    for factors in many:
        run_all(engine, [request("x", random_prompt(1, 4), greedy(2), factors.digest)])
    assert engine.stats().adapter_slot_bytes < 2 * many[0].num_bytes
