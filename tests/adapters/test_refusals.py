"""What cannot be served exactly is refused, and the message says what and why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import (
    TinyLlama,
    edit_config,
    read_tensors,
    save_lora,
    save_vblora,
    write_tensors,
)
from torch import Tensor

from adapters import (
    MalformedAdapterError,
    UnsupportedAdapterError,
    read_peft_adapter,
)
from adapters.peft_targets import PatternMatcher
from core.model_config import BaseInfo

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
INDICES, WEIGHTS = f"{Q0}.vblora_logits_A_topk_indices", f"{Q0}.vblora_logits_A_topk_weights"
BANK = "base_model.vblora_vector_bank"
LOGITS = f"{Q0}.vblora_logits_B"
LORA_A = f"{Q0}.lora_A.weight"

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def logits_dir(llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refusals") / "logits"
    save_vblora(llama, path, save_only_topk_weights=False)
    return path


@pytest.fixture
def logits(logits_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(logits_dir, tmp_path / "logits"))


@pytest.fixture
def lora(lora_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lora_dir, tmp_path / "lora"))


# config


COMMON_UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "other_method": ({"peft_type": "LOKR"}, "peft_type 'LOKR' is not served"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save.*full copies"),
    "bias_all": ({"bias": "all"}, "bias='all': trained biases"),
    "unknown_key": ({"use_marvel": {"x": 1}}, "use_marvel=.*not known here"),
    "lm_head": ({"target_modules": ["q_proj", "lm_head"]}, "includes lm_head"),
    "embeddings": ({"target_modules": "model\\.embed_tokens|.*q_proj"}, "includes model.embed_tok"),
}

LORA_UNSUPPORTED: dict[str, Any] = {
    "lora_bias": True,
    "target_parameters": ["mlp.weight"],
    "layer_replication": [[0, 2], [1, 2]],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "use_bdlora": {"nblocks": 2},
    "monteclora_config": {"num_samples": 8},
    "kasa_config": {"alpha": 1},
    "velora_config": {"x": 1},
    "megatron_config": {"x": 1},
    "trainable_token_indices": [3, 4],
    "bias": "lora_only",
}


@pytest.mark.parametrize("name", COMMON_UNSUPPORTED)
@pytest.mark.parametrize("kind", ["vblora", "lora"])
def test_config_features_that_are_not_served(
    name: str, kind: str, base: BaseInfo, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(kind)
    changes, message = COMMON_UNSUPPORTED[name]
    edit_config(path, **changes)
    with pytest.raises(UnsupportedAdapterError, match=message):
        read_peft_adapter(path, base)


@pytest.mark.parametrize("key", LORA_UNSUPPORTED)
def test_lora_variants_that_are_not_served(key: str, lora: Path, base: BaseInfo) -> None:
    edit_config(lora, **{key: LORA_UNSUPPORTED[key]})
    with pytest.raises(UnsupportedAdapterError, match=f"^{key}=") as caught:
        read_peft_adapter(lora, base)
    assert caught.value.feature == key


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_initialisations_that_changed_the_base(init: str, lora: Path, base: BaseInfo) -> None:
    edit_config(lora, init_lora_weights=init)
    with pytest.raises(UnsupportedAdapterError, match="weights were changed with it"):
        read_peft_adapter(lora, base)


@pytest.mark.parametrize("unset", [None, False, [], {}, "", 0])
def test_unknown_keys_that_are_not_set_do_no_harm(unset: Any, lora: Path, base: BaseInfo) -> None:
    before = read_peft_adapter(lora, base).digest
    edit_config(lora, use_marvel=unset)
    assert read_peft_adapter(lora, base).digest == before


VBLORA_MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no_type": ({"peft_type": None}, "peft_type is None"),
    "rank_0": ({"r": 0}, "r is 0, must be a positive integer"),
    "rank_bool": ({"r": True}, "r is True"),
    "rank_float": ({"r": 4.0}, r"r is 4\.0"),
    "other_rank": ({"r": 5}, r"has shape \(4, 4, 2\), must be \(5, 4, 2\)"),
    "topk_0": ({"topk": 0}, "topk is 0"),
    "topk_over_bank": ({"topk": 33}, "topk=33 is more than num_vectors=32"),
    "other_topk": ({"topk": 3}, r"must be \(4, 4, 3\)"),
    "other_bank": ({"num_vectors": 64}, r"vector_bank has shape \(32, 16\), must be \(64, 16\)"),
    "not_divisible": ({"vector_length": 24}, "in_features 64 .* not divisible by vector_length 24"),
    "kv_not_divisible": ({"vector_length": 64}, "k_proj: out_features 32"),
    "fewer_modules": ({"target_modules": ["q_proj"]}, "a module that the config does not claim"),
    "fewer_layers": ({"layers_to_transform": [1]}, r"layers\.0\..*does not claim"),
    "no_module": ({"target_modules": ["query"]}, "matches no linear layer"),
    "no_layer": ({"layers_to_transform": [7]}, "matches no linear layer"),
    "a_block": ({"target_modules": ".*layers.0.*"}, "model.layers.0, which is not a linear layer"),
    "targets_type": ({"target_modules": {"q_proj": 1}}, "must be a string or list of strings"),
    "layers_type": ({"layers_to_transform": ["1"]}, "must be integers"),
    "bad_pattern": ({"target_modules": "(q_proj"}, "not a regular expression"),
    "long_pattern": ({"target_modules": "q" * 70_000}, "too long"),
}


@pytest.mark.parametrize("name", VBLORA_MALFORMED)
def test_config_that_contradicts_files_or_base(name: str, vblora: Path, base: BaseInfo) -> None:
    changes, message = VBLORA_MALFORMED[name]
    edit_config(vblora, **changes)
    with pytest.raises(MalformedAdapterError, match=message):
        read_peft_adapter(vblora, base)


LORA_MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "alpha_nan": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "alpha_text": ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    "alpha_huge": ({"lora_alpha": 10**400}, "lora_alpha is"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, r"q_proj.lora_A.weight has shape \(4, 64\)"),
    "rank_pattern_0": ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
    "rank_pattern_type": ({"rank_pattern": ["q_proj"]}, "must be an object"),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern\['q_proj'\] is None"),
    "regex_and_layers": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        "cannot be used when target_modules is a pattern",
    ),
}


@pytest.mark.parametrize("name", LORA_MALFORMED)
def test_lora_config_that_is_wrong(name: str, lora: Path, base: BaseInfo) -> None:
    changes, message = LORA_MALFORMED[name]
    edit_config(lora, **changes)
    with pytest.raises(MalformedAdapterError, match=message):
        read_peft_adapter(lora, base)


def test_a_module_that_is_claimed_but_missing(vblora: Path, base: BaseInfo) -> None:
    tensors = read_tensors(vblora)
    write_tensors(vblora, {name: t for name, t in tensors.items() if not name.startswith(Q0)})
    with pytest.raises(MalformedAdapterError, match=r"q_proj.*is missing, though the config"):
        read_peft_adapter(vblora, base)


def test_a_pattern_of_exponential_cost_is_cut_short() -> None:
    matcher = PatternMatcher(deadline_seconds=0.05)
    with pytest.raises(MalformedAdapterError, match="takes too long"):
        matcher.fullmatch(r"(?:.|.)*[!?]", "model.layers.0.self_attn.q_proj")


# tensors


def _put(name: str, value: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def _set(name: str, value: float, at: tuple[int, ...] = (0, 0, 0)) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][at] = value

    return change


def _negative_index(tensors: Tensors) -> None:
    tensors[INDICES] = tensors[INDICES].to(torch.int16)
    tensors[INDICES][1, 2, 0] = -1


def _same_index_twice(tensors: Tensors) -> None:
    tensors[INDICES][1, 2] = tensors[INDICES][1, 2, 0]


def _minus_infinity_only(tensors: Tensors) -> None:
    tensors[LOGITS][0, 0] = float("-inf")


TOPK_TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "index_high": (_set(INDICES, 32), f"{INDICES} has the index 32, must be in 0..31"),
    "index_negative": (_negative_index, "has the index -1"),
    "index_twice": (_same_index_twice, "names a bank vector twice"),
    "index_dtype": (_put(INDICES, torch.zeros(4, 4, 2)), "is torch.float32, must be one of int16"),
    "index_shape": (_put(INDICES, torch.zeros(16, 2).int()), r"has shape \(16, 2\), must be"),
    "weight_nan": (_set(WEIGHTS, float("nan")), f"{WEIGHTS} has values that are not finite"),
    "weight_inf": (_set(WEIGHTS, float("inf")), "not finite"),
    "weight_negative": (_set(WEIGHTS, -0.25), r"no softmax: it has the weights \[-0\.25\]"),
    "weight_over_1": (_set(WEIGHTS, 1.5), r"no softmax: it has the weights \[1\.5\]"),
    "weight_dtype": (
        _put(WEIGHTS, torch.zeros(4, 4, 1).double()),
        "must be one of bfloat16, float16",
    ),
    "weight_missing": (lambda tensors: tensors.pop(WEIGHTS), f"{WEIGHTS} is missing"),
    "index_missing": (lambda tensors: tensors.pop(INDICES), f"{INDICES} is missing"),
    "bank_missing": (lambda tensors: tensors.pop(BANK), f"{BANK} is missing"),
    "bank_nan": (_set(BANK, float("nan"), (31, 15)), f"{BANK} has values that are not finite"),
    "bank_minus_inf": (_set(BANK, float("-inf"), (0, 0)), f"{BANK} has values that are not finite"),
    "bank_dtype": (_put(BANK, torch.zeros(32, 16).int()), "is torch.int32"),
    "bank_flat": (_put(BANK, torch.zeros(512)), r"has shape \(512,\), must be \(32, 16\)"),
    "twice": (
        _put(f"{Q0}.vblora_logits_A", torch.zeros(4, 4, 32)),
        "is there twice: as full logits and as top-k",
    ),
    "stray": (_put("surprise", torch.zeros(1)), "'surprise' is not part of an adapter"),
    "layer_beyond_base": (
        _put(f"{Q0.replace('.0.', '.2.')}.vblora_logits_A", torch.zeros(4, 4, 32)),
        r"layers\.2\..* does not claim",
    ),
    "without_head": (
        _put("base_model.model.layers.0.self_attn.q_proj.vblora_logits_A", torch.zeros(1)),
        "does not claim",
    ),
}

LOGITS_TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "nan": (_set(LOGITS, float("nan")), f"{LOGITS} has values that are not finite"),
    "inf": (_set(LOGITS, float("inf")), "not finite"),
    "minus_inf_only": (_minus_infinity_only, "not finite"),
    "shape": (_put(LOGITS, torch.zeros(4, 4, 31)), r"must be \(4, 4, 32\)"),
    "dtype": (_put(LOGITS, torch.zeros(4, 4, 32).double()), "is torch.float64"),
}

UNSUPPORTED_TENSORS: dict[str, tuple[str, str]] = {
    "bias": (f"{Q0}.base_layer.bias", "bias"),
    "lm_head": ("base_model.model.lm_head.weight", "lm_head"),
    "embeddings": ("base_model.model.model.embed_tokens.weight", "embed_tokens"),
    "norm": ("base_model.model.model.norm.weight", "modules_to_save"),
    "dora": (f"{Q0}.lora_magnitude_vector", "use_dora"),
    "lora_bias": (f"{Q0}.lora_B.bias", "lora_bias"),
    "base_layer": (f"{Q0}.base_layer.weight", "base_layer"),
    "tokens": ("base_model.model.model.x.token_adapter.trainable_tokens_delta", "trainable_token"),
}


@pytest.mark.parametrize("name", TOPK_TENSORS)
def test_topk_tensors_that_are_wrong(name: str, vblora: Path, base: BaseInfo) -> None:
    _check_tensors(vblora, base, *TOPK_TENSORS[name])


@pytest.mark.parametrize("name", LOGITS_TENSORS)
def test_logits_that_are_wrong(name: str, logits: Path, base: BaseInfo) -> None:
    _check_tensors(logits, base, *LOGITS_TENSORS[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_lora_tensors_that_are_wrong(value: float, lora: Path, base: BaseInfo) -> None:
    _check_tensors(lora, base, _set(LORA_A, value, (0, 0)), f"{LORA_A} has values that are not")


def _check_tensors(
    path: Path, base: BaseInfo, change: Callable[[Tensors], None], message: str
) -> None:
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)
    with pytest.raises(MalformedAdapterError, match=message):
        read_peft_adapter(path, base)


@pytest.mark.parametrize("name", UNSUPPORTED_TENSORS)
@pytest.mark.parametrize("kind", ["vblora", "lora"])
def test_tensors_of_features_that_are_not_served(
    name: str, kind: str, base: BaseInfo, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(kind)
    tensor_name, feature = UNSUPPORTED_TENSORS[name]
    write_tensors(path, {**read_tensors(path), tensor_name: torch.zeros(1)})
    with pytest.raises(UnsupportedAdapterError, match=r"is not served|are not served") as caught:
        read_peft_adapter(path, base)
    assert caught.value.feature.startswith(feature)


def test_a_sum_of_weights_just_over_1_is_rounding(vblora: Path, base: BaseInfo) -> None:
    tensors = read_tensors(vblora)
    tensors[WEIGHTS] = tensors[WEIGHTS].to(torch.bfloat16)
    tensors[WEIGHTS][0, 0, 0] = 1.0078125
    write_tensors(vblora, tensors)
    read_peft_adapter(vblora, base)


REAL_UNSUPPORTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora_bias": (save_lora, {"lora_bias": True}),
    "pissa": (save_lora, {"init_lora_weights": "pissa"}),
    "tokens": (save_lora, {"trainable_token_indices": [1, 2]}),
    "lora_lm_head": (save_lora, {"target_modules": ["q_proj", "lm_head"]}),
    "lora_modules_to_save": (save_lora, {"modules_to_save": ["lm_head"]}),
    "vblora_lm_head": (save_vblora, {"target_modules": ["q_proj", "lm_head"]}),
    "vblora_modules_to_save": (save_vblora, {"modules_to_save": ["embed_tokens"]}),
    "vblora_bias": (save_vblora, {"bias": "vblora_only"}),
}


@pytest.mark.parametrize("name", REAL_UNSUPPORTED)
def test_what_peft_really_writes_for_them(
    name: str, llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    save, settings = REAL_UNSUPPORTED[name]
    save(llama, tmp_path, **settings)
    with pytest.raises(UnsupportedAdapterError):
        read_peft_adapter(tmp_path, base)
