"""The forward against transformers in fp32, and in bf16 within bf16's tolerance."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_runs import greedy, request, run_all
from memory_factors import random_factors
from tiny_models import random_prompt, small_engine, write_tiny_llama
from torch import Tensor
from transformers_oracle import (
    assert_close_logits,
    assert_same_greedy,
    load_reference,
    reference_greedy,
    reference_logits,
)

from core.batch import AdapterRows, build_batch
from core.engine_config import EngineConfig
from core.factors import AdapterFactors
from core.kv_storage import KVStorage
from core.loading import load_engine
from core.model import LlamaModel
from core.model_config import read_model_config
from core.requests import GenerationRequest, SamplingParams
from core.sequence import Chunk
from core.sequence import Sequence as EngineSequence

PAGE_SIZE = 4

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn_tuned": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
        "original_max_position_embeddings": 64,
    },
}


def load_model(path: Path, dtype: str = "float32", *, compiled: bool = True) -> LlamaModel:
    config = EngineConfig(
        device="cpu", dtype=dtype, kv_cache_bytes=1 << 16, compiled_kernels=compiled
    )
    return load_engine(path, config).model


def model_logits(
    model: LlamaModel,
    token_ids: Sequence[int],
    chunk_sizes: Sequence[int] | None = None,
    factors: AdapterFactors | None = None,
) -> Tensor:
    """Logits of every token, computed in chunks over scattered pages."""
    num_pages = -(-len(token_ids) // PAGE_SIZE)
    cpu = torch.device("cpu")
    kv = KVStorage(model.config, 2 * num_pages, PAGE_SIZE, cpu, model.dtype)
    seq = EngineSequence.start(
        GenerationRequest("x", tuple(token_ids), SamplingParams(prompt_logprobs=0)), 0.0
    )
    seq.pages = torch.randperm(2 * num_pages)[:num_pages].tolist()
    parts, start = [], 0
    for size in chunk_sizes or [len(token_ids)]:
        chunk = Chunk(seq, start, size)
        batch = build_batch([chunk], PAGE_SIZE, cpu, with_lengths=model.rotary.depends_on_length)
        if factors is not None:
            batch = replace(batch, adapter_rows=(AdapterRows(Held(factors), 0, size),))
        parts.append(model.head.logits(model.forward(batch, kv)))
        start += size
    assert start == len(token_ids)
    return torch.cat(parts)


class Held:
    """A lease on factors that nobody takes away."""

    def __init__(self, factors: AdapterFactors) -> None:
        self.factors = factors

    def release(self) -> None: ...


def check_parity(path: Path, *, compiled: bool = True) -> None:
    """Three chunks: a prompt's, a single token's (decode attention), and more of the prompt."""
    tokens = random_prompt(3, 50)
    own = model_logits(load_model(path, compiled=compiled), tokens, [30, 1, 19])
    assert_close_logits(own, reference_logits(load_reference(path), tokens), 1e-4)


@pytest.mark.parametrize("kind", ROPE)
def test_rope_variants_equal_transformers(kind: str, compiled: bool, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m", rope_parameters=ROPE[kind], max_position_embeddings=128)
    tokens = random_prompt(5, 100)
    own = model_logits(load_model(path, compiled=compiled), tokens, [50, 1, 49])
    assert_close_logits(own, reference_logits(load_reference(path), tokens), 1e-4)


def test_rope_variants_differ_from_each_other(tmp_path: Path) -> None:
    """A variant that is read as another would pass above only if it made no difference."""
    tokens, last = random_prompt(5, 100), {}
    for kind, rope in ROPE.items():
        path = write_tiny_llama(tmp_path / kind, rope_parameters=rope, max_position_embeddings=64)
        last[kind] = model_logits(load_model(path), tokens)[-1]
    kinds = list(last)
    for index, kind in enumerate(kinds):
        for other in kinds[index + 1 :]:
            assert (last[kind] - last[other]).abs().max() > 0.01, (kind, other)


@pytest.mark.parametrize("prompt_length", [10, 16, 17, 40])
def test_dynamic_rope_beyond_the_original_length(prompt_length: int, tmp_path: Path) -> None:
    """Prompts that fit and that do not, generation that crosses the border, small chunks."""
    path = write_tiny_llama(
        tmp_path / "m", rope_parameters=ROPE["dynamic"], max_position_embeddings=16
    )
    prompt = random_prompt(7, prompt_length)
    engine = small_engine(
        path, max_model_len=128, max_num_batched_tokens=6, max_num_seqs=2, num_pages=64
    )
    result = run_all(engine, [request("a", prompt, greedy(24))])["a"]
    assert_same_greedy(result.token_ids, reference_greedy(load_reference(path), prompt, 24))
    whole = model_logits(load_model(path), prompt)
    assert_close_logits(whole, reference_logits(load_reference(path), prompt), 1e-4)


@pytest.mark.parametrize("shape", [(4, 4), (4, 2), (4, 1), (8, 2)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_grouped_query_heads_tied_and_untied(
    shape: tuple[int, int], tied: bool, compiled: bool, tmp_path: Path
) -> None:
    num_heads, num_kv_heads = shape
    check_parity(
        write_tiny_llama(
            tmp_path / "m",
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            tie_word_embeddings=tied,
        ),
        compiled=compiled,
    )


@pytest.mark.parametrize("head_dim", [2, 8, 24, 30, 32])
def test_head_dim_that_is_not_hidden_over_heads(
    head_dim: int, compiled: bool, tmp_path: Path
) -> None:
    check_parity(write_tiny_llama(tmp_path / "m", head_dim=head_dim), compiled=compiled)


def test_other_norm_epsilon_and_sizes(tmp_path: Path) -> None:
    check_parity(
        write_tiny_llama(
            tmp_path / "m",
            rms_norm_eps=0.1,
            hidden_size=48,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
        )
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_files_of_any_float_dtype_load_as_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    check_parity(write_tiny_llama(tmp_path / "m", dtype=dtype))


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_files(tied: bool, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m", max_shard_size="100KB", tie_word_embeddings=tied)
    assert len(list(path.glob("model-*.safetensors"))) > 2
    check_parity(path)


def test_bf16_model_is_as_near_as_transformers_in_bf16(tmp_path: Path) -> None:
    """No further from the fp32 oracle than twice what transformers' own bf16 is."""
    path = write_tiny_llama(tmp_path / "m", dtype=torch.bfloat16)
    tokens = random_prompt(3, 60)
    exact = reference_logits(load_reference(path), tokens)
    theirs = reference_logits(load_reference(path, torch.bfloat16), tokens).float()
    own = model_logits(load_model(path, "bfloat16"), tokens, [20, 1, 1, 38])
    assert own.dtype == torch.bfloat16
    assert (own.float() - exact).norm() <= 2 * (theirs - exact).norm()
    assert_close_logits(own, exact, 0.05)


@pytest.mark.parametrize(
    "sizes", [[50], [1] * 50, [4] * 12 + [2], [17, 1, 1, 30, 1], [1, 49]], ids=len
)
def test_chunks_make_no_difference(
    sizes: list[int], compiled: bool, tiny_path: Path, reference
) -> None:
    tokens = random_prompt(11, 50)
    own = model_logits(load_model(tiny_path, compiled=compiled), tokens, sizes)
    assert_close_logits(own, reference_logits(reference, tokens), 1e-4)


@pytest.mark.parametrize("digest", ["all-4", "one-1", "mlp-2", "wide-16", "last-8", "mixed"])
def test_logits_with_an_adapter(
    digest: str, compiled: bool, tiny_path: Path, reference, adapters
) -> None:
    tokens, factors = random_prompt(13, 40), adapters[digest]
    base = reference_logits(reference, tokens)
    expected = reference_logits(reference, tokens, factors)
    assert (expected - base).abs().max() > 0.05 * base.abs().max(), "the adapter changes nothing"
    own = model_logits(load_model(tiny_path, compiled=compiled), tokens, [30, 1, 9], factors)
    assert_close_logits(own, expected, 1e-4)


def test_bf16_model_with_an_adapter(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m", dtype=torch.bfloat16)
    factors = random_factors(read_model_config(path), "x", rank=4, scale=1.5, dtype=torch.bfloat16)
    tokens = random_prompt(3, 60)
    expected = reference_logits(load_reference(path), tokens, factors)
    own = model_logits(load_model(path, "bfloat16"), tokens, None, factors)
    assert_close_logits(own, expected, 0.05)


def test_the_merge_of_the_oracle_is_taken_back(reference, adapters) -> None:
    tokens = random_prompt(1, 5)
    before = reference_logits(reference, tokens)
    reference_logits(reference, tokens, adapters["all-4"])
    assert torch.equal(reference_logits(reference, tokens), before)


def test_bytes_of_the_base_are_what_the_weights_take(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m")
    num_parameters = sum(p.numel() for p in load_reference(path).parameters())
    plain, packed = (
        load_engine(
            path, EngineConfig(device="cpu", kv_cache_bytes=1 << 16, compiled_kernels=compiled)
        )
        for compiled in (False, True)
    )
    assert plain.stats().base_bytes == 4 * num_parameters
    linears = [packed.model.weights.head]
    for layer in packed.model.weights.layers:
        linears += [layer.qkv, layer.o, layer.gate_up, layer.down]
    assert packed.stats().base_bytes >= sum(linear.num_bytes for linear in linears)
    assert packed.stats().base_bytes >= 4 * num_parameters  # outputs are padded to whole panels
