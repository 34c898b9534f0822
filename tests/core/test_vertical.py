"""Vertical bases: both ways to run them against transformers over the expanded weights."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import greedy, request, run_all
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_factors import MemoryFactorSource, random_factors
from safetensors.torch import load_file, save_file
from test_model_parity import model_logits
from tiny_models import random_prompt, small_engine, write_tiny_llama
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers_oracle import (
    assert_close_logits,
    assert_same_greedy,
    load_reference,
    reference_greedy,
    reference_logits,
)
from vertical_models import write_expanded, write_vertical_llama

from core.engine_config import EngineConfig
from core.errors import InvalidRequestError, UnsupportedModelError
from core.int8 import dequantise, quantise
from core.loading import load_engine
from core.model import LlamaModel
from core.model_config import read_base_info, read_model_config
from core.tokenizer import load_tokenizer
from core.vertical import VerticalConfig

TOKENS = random_prompt(3, 50)
WAYS = ["factored", "expanded"]
KINDS = ["recursive", "base-relative"]


def load(path: Path, way: str = "factored", compiled: bool = True, **options: Any) -> LlamaModel:
    config = EngineConfig(
        device="cpu",
        kv_cache_bytes=1 << 16,
        vertical=way,
        compiled_kernels=compiled,
        **{"dtype": "float32", **options},
    )
    return load_engine(path, config).model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_the_plain_llama(kind: str, way: str, compiled: bool, tmp_path: Path) -> None:
    path = write_vertical_llama(tmp_path / "m", increments=kind)
    expected = reference_logits(load_reference(write_expanded(tmp_path / "plain", path)), TOKENS)
    own = model_logits(load(path, way, compiled), TOKENS, [30, 1, 19])
    assert_close_logits(own, expected, 1e-5)


def test_the_kinds_of_increments_differ(tmp_path: Path) -> None:
    """A kind that is read as the other would pass above only if it made no difference."""
    found = [
        model_logits(load(write_vertical_llama(tmp_path / kind, increments=kind)), TOKENS)
        for kind in KINDS
    ]
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    "targets",
    [["q_proj"], ["q_proj", "k_proj", "v_proj"], ["down_proj", "gate_proj"], ["up_proj", "o_proj"]],
    ids=",".join,
)
@pytest.mark.parametrize("way", WAYS)
def test_projections_without_increments_are_each_layers_own(
    targets: list[str], way: str, compiled: bool, tmp_path: Path
) -> None:
    path = write_vertical_llama(tmp_path / "m", target_modules=targets)
    expected = reference_logits(load_reference(write_expanded(tmp_path / "plain", path)), TOKENS)
    assert_close_logits(model_logits(load(path, way, compiled), TOKENS), expected, 1e-5)


@settings(deadline=None, max_examples=15)
@given(
    chunk_sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    rank=st.integers(1, 9),
    alpha=st.sampled_from([0.25, 1, 8.0]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_factored_equals_expanded(
    chunk_sizes: list[int],
    rank: int,
    alpha: float,
    kind: str,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = write_vertical_llama(
        tmp_path_factory.mktemp("m") / "m",
        chunk_sizes=chunk_sizes,
        rank=rank,
        alpha=alpha,
        increments=kind,
        seed=seed,
    )
    factored, expanded = (model_logits(load(path, way), TOKENS, [9, 1, 40]) for way in WAYS)
    assert_close_logits(factored, expanded, 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_adapters_and_base_in_one_batch(way: str, compiled: bool, tmp_path: Path) -> None:
    path = write_vertical_llama(tmp_path / "m", std=0.05)
    config = read_model_config(path)
    factors = {
        "all": random_factors(config, "all", rank=4, std=0.1),
        "wide": random_factors(config, "wide", rank=16, std=0.05),
        "some": random_factors(config, "some", rank=2, projections=("v_proj", "up_proj")),
    }
    source = MemoryFactorSource.of(*factors.values())
    reference = load_reference(write_expanded(tmp_path / "plain", path))
    engine = small_engine(path, source, vertical=way, compiled_kernels=compiled, num_pages=400)
    cases = {
        f"{digest}-{length}": (digest, random_prompt(length, length))
        for digest in (None, *factors)
        for length in (3, 21, 40)
    }
    results = run_all(
        engine, [request(name, prompt, digest=digest) for name, (digest, prompt) in cases.items()]
    )
    for name, (digest, prompt) in cases.items():
        expected = reference_greedy(reference, prompt, 8, factors.get(digest or ""))
        assert_same_greedy(results[name].token_ids, expected)


@pytest.mark.parametrize(("quantize", "relative"), [("int8", 0.15), ("int8-weights", 1e-3)])
def test_int8_rounds_the_chunks_matrices_alone(
    quantize: str, relative: float, compiled: bool, tmp_path: Path
) -> None:
    """The plain Llama with the first layers' matrices rounded, and increments as they are."""
    path = write_vertical_llama(tmp_path / "m", std=0.05)
    own = model_logits(load(path, compiled=compiled, quantize=quantize), TOKENS)
    tensors = load_file(path / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith(("_proj.weight", "lm_head.weight")):
            tensors[name] = dequantise(*quantise(weight))[:, : weight.shape[1]].contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    expected = reference_logits(load_reference(write_expanded(tmp_path / "plain", path)), TOKENS)
    assert_close_logits(own, expected, relative)


@pytest.mark.parametrize("way", WAYS)
def test_bf16(way: str, tmp_path: Path) -> None:
    path = write_vertical_llama(tmp_path / "m", dtype=torch.bfloat16)
    expected = reference_logits(load_reference(write_expanded(tmp_path / "plain", path)), TOKENS)
    assert_close_logits(model_logits(load(path, way), TOKENS), expected, 1e-5)
    own = model_logits(load(path, way, dtype="bfloat16"), TOKENS)
    assert_close_logits(own, expected, 0.08)


def test_factored_keeps_what_the_checkpoint_has(tmp_path: Path) -> None:
    """Resident bytes are the file's, to padded panels; expanded, those of the plain Llama."""
    path = write_vertical_llama(
        tmp_path / "m",
        chunk_sizes=(4, 4),
        rank=2,
        hidden_size=96,
        intermediate_size=192,
        head_dim=24,
        tie_word_embeddings=False,
    )
    stored = sum(t.nbytes for t in load_file(path / "model.safetensors").values())
    plain = write_expanded(tmp_path / "plain", path) / "model.safetensors"
    whole = sum(t.nbytes for t in load_file(plain).values())
    for compiled in (False, True):
        held = [load(path, way, compiled).weights.num_bytes for way in WAYS]
        assert stored <= held[0] <= 1.1 * stored and whole <= held[1] <= 1.1 * whole
        assert compiled or held == [stored, whole]
    assert stored < 0.45 * whole


def test_layers_of_a_chunk_share_their_matrices(compiled: bool, tmp_path: Path) -> None:
    path = write_vertical_llama(tmp_path / "m", chunk_sizes=(3, 2))
    layers = load(path, compiled=compiled).weights.layers
    for name in ("qkv", "o", "gate_up", "down"):
        matrices = [getattr(layer, name) for layer in layers]
        assert matrices[0] is matrices[1] is matrices[2] is not matrices[3] is matrices[4]
    assert not layers[0].increments and not layers[3].increments
    assert [len(layer.increments["q_proj"].a_RI) for layer in layers[1:3]] == [3, 6]


def test_transformers_refuses_a_vertical_base(tmp_path: Path) -> None:
    """It would otherwise fill what it does not find with random numbers."""
    path = write_vertical_llama(tmp_path / "m")
    with pytest.raises(ValueError, match="vertical_llama"):
        AutoModelForCausalLM.from_pretrained(path)


def test_fingerprints(tmp_path: Path) -> None:
    """One of a plain Llama is what it was before there were vertical bases."""
    path = write_vertical_llama(tmp_path / "m")
    first = read_base_info(path)
    assert first == read_base_info(path)
    edit(path, increments="base-relative")
    assert read_base_info(path).fingerprint != first.fingerprint
    assert "vertical" not in repr(read_model_config(write_tiny_llama(tmp_path / "plain")))


def edit(path: Path, **changes: Any) -> Path:
    content = json.loads((path / "config.json").read_text())
    content["vertical"] |= changes
    (path / "config.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_sizes": [3, 3]}, r"vertical.chunk_sizes is \[3, 3\].*whose sum is 5"),
        ({"chunk_sizes": [5, 0]}, "chunk_sizes"),
        ({"chunk_sizes": 5}, "chunk_sizes is 5"),
        ({"chunk_sizes": [2.5, 2.5]}, "chunk_sizes"),
        ({"chunk_sizes": [True, 4]}, "chunk_sizes"),
        ({"rank": 0}, "vertical.rank is 0"),
        ({"rank": "8"}, "vertical.rank is '8'"),
        ({"rank": True}, "vertical.rank is True"),
        ({"alpha": 0}, "vertical.alpha is 0"),
        ({"alpha": float("inf")}, "vertical.alpha is inf"),
        ({"alpha": float("nan")}, "vertical.alpha is nan"),
        ({"increments": "paper"}, "increments is 'paper', must be one of recursive, base-relative"),
        ({"increments": ["recursive"]}, "increments"),
        ({"target_modules": ["qkv"]}, "target_modules is 'qkv', must be one of q_proj"),
        ({"target_modules": ["q_proj", "q_proj"]}, "each once"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [["q_proj"]]}, "target_modules"),
        ({"ranks": 3}, r"unknown keys \['ranks'\]; its keys are chunk_sizes, rank"),
    ],
    ids=str,
)
def test_wrong_configurations_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = edit(write_vertical_llama(tmp_path / "m"), **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        read_model_config(path)


@pytest.mark.parametrize("content", [None, [], "recursive", {"rank": 3}])
def test_no_configuration_is_refused(content: Any, tmp_path: Path) -> None:
    path = write_vertical_llama(tmp_path / "m")
    config = json.loads((path / "config.json").read_text()) | {"vertical": content}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="vertical"):
        read_model_config(path)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "change",
    ["model.layers.1.mlp.up_proj.vertical_A", "model.layers.4.self_attn.q_proj.vertical_B"],
)
def test_increments_that_are_missing_or_misshapen(change: str, way: str, tmp_path: Path) -> None:
    path = write_vertical_llama(tmp_path / "m")
    file = path / "model.safetensors"
    tensors = load_file(file)
    for edited in (tensors[change][:-1, :-1].contiguous(), None):
        del tensors[change]
        save_file(tensors if edited is None else tensors | {change: edited}, file)
        with pytest.raises(UnsupportedModelError, match=change):
            load(path, way)
        tensors = load_file(file)


def test_a_way_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="vertical is 'both', must be one of factored"):
        EngineConfig(vertical="both")  # type: ignore[arg-type]


def test_ranks_of_a_layer() -> None:
    recursive = VerticalConfig((3, 1, 2), 4, 4.0, "recursive")
    relative = VerticalConfig((3, 1, 2), 4, 4.0, "base-relative")
    assert [recursive.ranks_of(layer).stop for layer in range(6)] == [0, 4, 8, 0, 0, 4]
    assert [relative.ranks_of(layer).start for layer in range(6)] == [0, 0, 4, 0, 0, 0]
    assert [relative.ranks_of(layer).stop for layer in range(6)] == [0, 4, 8, 0, 0, 4]
    assert recursive.chunk_of(2) == range(3) and recursive.chunk_of(3) == range(3, 4)
    with pytest.raises(IndexError, match="layer 6"):
        recursive.chunk_of(6)


def test_greedy_tokens_are_the_plain_llamas(tmp_path: Path) -> None:
    path = write_vertical_llama(tmp_path / "m")
    reference = load_reference(write_expanded(tmp_path / "plain", path))
    prompts = [random_prompt(seed, 5 + 7 * seed) for seed in range(4)]
    engine = small_engine(path, num_pages=400)
    results = run_all(engine, [request(str(n), p, greedy(20)) for n, p in enumerate(prompts)])
    for number, prompt in enumerate(prompts):
        expected = reference_greedy(reference, prompt, 20)
        assert_same_greedy(results[str(number)].token_ids, expected)


def test_its_tokenizer_loads_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_vertical_llama(tmp_path / "m")
    vocabulary = {f"t{number}": number for number in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(path)("t7").input_ids == [7]
    assert "vertical_llama" not in caplog.text
