"""Which keys of a PEFT config change the maths: those that are served, and the rest by reason.

A key is read by `vblora` or `lora`, known to have no effect on inference, or refused when it is
set. Keys of later PEFT versions are unknown here and refused when set. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.errors import MalformedAdapterError, UnsupportedAdapterError

TARGET_KEYS = frozenset(
    {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
)

# no effect on a Linear layer's output once the weights are trained
_NEUTRAL = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
        "eva_config", "inference_mode", "init_logits_std", "init_vector_bank_bound",
        "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type",
        "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
        "vblora_dropout",
        "save_only_topk_weights",  # what the file holds decides, tensor by tensor
        "fan_in_fan_out",  # PEFT itself turns it off for torch.nn.Linear
    }
)  # fmt: skip

_REFUSED = {
    "alora_invocation_tokens": "aLoRA switches the adapter on in the middle of a prompt",
    "arrow_config": "Arrow routes each token through several adapters",
    "kasa_config": "KaSA changes the base's weights and adds singular values",
    "layer_replication": "it changes the base's layers",
    "lora_bias": "biases are not served",
    "megatron_config": "Megatron's parallel layers are not served",
    "modules_to_save": "full copies of base modules are not served",
    "monteclora_config": "Monte Carlo sampling over weights is not served",
    "target_parameters": "only torch.nn.Linear modules are served",
    "trainable_token_indices": "changed embeddings are not served",
    "use_bdlora": "block-diagonal factors are not served",
    "use_dora": "magnitudes are served of LoRA alone",
    "use_qalora": "QA-LoRA pools the inputs of quantised layers",
    "velora_config": "VeLoRA is not served",
}

_MAX_NUMBER = 1e30  # far from overflow in float32

_SERVED_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def check_features(config: Mapping[str, Any], served: frozenset[str]) -> None:
    """Raise UnsupportedAdapterError for the first key that is set and not among `served`.

    A key counts as set when its value is truthy (PEFT's own test for its variants).
    """
    for key, value in config.items():
        if key in served or key in TARGET_KEYS or key in _NEUTRAL or not value:
            continue
        if key == "bias":
            _check_bias(value)
        elif key == "init_lora_weights":
            _check_init(value)
        else:
            reason = _REFUSED.get(key, "this key is not known here and may change the output")
            raise UnsupportedAdapterError(f"{key}={_short(value)}: {reason}", feature=key)


def _check_bias(value: Any) -> None:
    if value != "none":
        raise UnsupportedAdapterError(
            f"bias={_short(value)}: trained biases are not served, only 'none'", feature="bias"
        )


def _check_init(value: Any) -> None:
    if not any(value is init or value == init for init in _SERVED_INITS):
        raise UnsupportedAdapterError(
            f"init_lora_weights={_short(value)}: such an adapter belongs to a base whose weights "
            "were changed with it; save it with path_initial_model_for_weight_conversion, or let "
            "'pissa' be undone by `vbserve convert pissa`",
            feature="init_lora_weights",
        )


def positive_int(config: Mapping[str, Any], key: str) -> int:
    """`config[key]` as an int of at least 1; MalformedAdapterError otherwise."""
    return as_positive_int(config.get(key), key)


def as_positive_int(value: Any, key: str) -> int:
    """`value` as an int of at least 1; MalformedAdapterError names `key` otherwise."""
    if type(value) is not int or not 1 <= value < 2**31:
        raise MalformedAdapterError(f"{key} is {_short(value)}, must be a positive integer")
    return value


def as_finite(value: Any, key: str) -> float:
    """`value` as a finite float; MalformedAdapterError names `key` otherwise."""
    if type(value) not in (int, float) or not abs(value) <= _MAX_NUMBER:  # not: NaN compares false
        raise MalformedAdapterError(f"{key} is {_short(value)}, must be a finite number")
    return float(value)


def as_patterns(value: Any, key: str) -> dict[str, Any]:
    """`value` as a dict of patterns, None being empty; MalformedAdapterError names `key`."""
    if not isinstance(value, dict | None):
        raise MalformedAdapterError(f"{key} is {_short(value)}, must be an object")
    return value or {}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
