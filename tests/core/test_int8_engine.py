"""Engines over an int8 base, adapters among them, against transformers over the same matrices."""

from pathlib import Path

import pytest
import torch
from engine_runs import greedy, request, run_all
from int8_reference import int8_reference, int8_weights_reference
from memory_factors import MemoryFactorSource, random_factors
from tiny_models import random_prompt, small_engine, write_tiny_llama
from transformers_oracle import TIE_GAP, assert_same_greedy, reference_greedy

from core.engine_config import EngineConfig
from core.errors import InvalidRequestError
from core.factors import AdapterFactors, LowRankPair
from core.int8 import TorchInt8Linear
from core.kernels.int8_linear import Int8Linear
from core.loading import load_engine
from core.model_config import read_model_config
from core.requests import FinishReason

ROUNDED_TIE_GAP = 0.02
"""An input that is rounded to the other side moves a logit by more than fp32's sums do."""


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are no whole blocks or panels."""
    path = tmp_path_factory.mktemp("int8") / "wide"
    return write_tiny_llama(path, hidden_size=72, intermediate_size=90, head_dim=16)


@pytest.fixture
def source(wide_path: Path) -> MemoryFactorSource:
    config = read_model_config(wide_path)
    return MemoryFactorSource.of(
        random_factors(config, "all-4", rank=4),
        random_factors(config, "one-1", rank=1, projections=("v_proj",), std=0.5),
    )


@pytest.mark.parametrize(
    ("quantize", "tie_gap"), [("int8", ROUNDED_TIE_GAP), ("int8-weights", TIE_GAP)]
)
def test_base_and_adapters_in_one_batch(
    quantize: str, tie_gap: float, compiled: bool, wide_path: Path, source: MemoryFactorSource
) -> None:
    engine = small_engine(
        wide_path,
        source,
        quantize=quantize,
        num_pages=200,
        compiled_kernels=compiled,
        max_num_batched_tokens=23,
    )
    by_digest = {None: None, **source.known}
    references = {digest: int8_reference(wide_path, f) for digest, f in by_digest.items()}
    weights_alone = int8_weights_reference(wide_path)
    wanted = {
        f"r{n}": (random_prompt(n, 1 + (7 * n) % 29), digest)
        for n, digest in enumerate([*by_digest] * 3)
    }
    results = run_all(engine, [request(n, p, greedy(10), d) for n, (p, d) in wanted.items()])
    for name, (prompt, digest) in wanted.items():
        if quantize == "int8":
            expected = reference_greedy(references[digest], prompt, 10)
        else:
            expected = reference_greedy(weights_alone, prompt, 10, by_digest[digest])
        assert_same_greedy(results[name].token_ids, expected, tie_gap)
    assert source.num_open_leases == 0


def test_rounding_is_seen(compiled: bool, wide_path: Path) -> None:
    """A head or layer that was left in fp32 would go unseen otherwise."""
    engines = [
        small_engine(wide_path, quantize=quantize, compiled_kernels=compiled)
        for quantize in ("none", "int8")
    ]
    prompt = random_prompt(1, 20)
    logprobs = [
        run_all(engine, [request("x", prompt, greedy(1, logprobs=0))])["x"].logprobs[0].logprob
        for engine in engines
    ]
    assert 1e-5 < abs(logprobs[0] - logprobs[1]) < 0.5
    weights = [engine.model.weights for engine in engines]
    assert weights[1].num_bytes < 0.6 * weights[0].num_bytes
    layer = weights[1].layers[0]
    for quantised in (weights[1].head.linear, layer.qkv, layer.o, layer.gate_up, layer.down):
        assert isinstance(quantised, Int8Linear if compiled else TorchInt8Linear)


def test_an_adapter_that_overflows_disturbs_nobody(compiled: bool, wide_path: Path) -> None:
    settings = {"num_pages": 100, "compiled_kernels": compiled, "quantize": "int8"}
    factors = random_factors(small_engine(wide_path).model.config, "broken", rank=2)
    broken = {
        key: LowRankPair(torch.full_like(pair.a_RI, 3e38), pair.b_RO * 1e30, 1.0)
        for key, pair in factors.pairs.items()
    }
    source = MemoryFactorSource.of(AdapterFactors("broken", broken, factors.num_bytes))
    prompt = random_prompt(5, 9)
    alone = run_all(small_engine(wide_path, **settings), [request("base", prompt)])["base"]
    engine = small_engine(wide_path, source, **settings)
    results = run_all(engine, [request("x", prompt, None, "broken"), request("base", prompt)])
    assert results["x"].finish_reason is FinishReason.ERROR
    assert results["base"].token_ids == alone.token_ids


def test_refusals_are_typed(wide_path: Path) -> None:
    assert EngineConfig().quantize == "none"
    with pytest.raises(InvalidRequestError, match="quantize is 'int4', must be one of none, "):
        EngineConfig(quantize="int4")  # type: ignore[arg-type]
    half = EngineConfig(device="cpu", dtype="bfloat16", quantize="int8")
    with pytest.raises(InvalidRequestError, match=r"on the CPU in float32; .* cpu in bfloat16"):
        load_engine(wide_path, half)
