"""The tensors of one PEFT file: the expected ones are taken, any other is refused by name.

Knows nothing of what the tensors mean; `vblora` and `lora` say which are expected.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from adapters.errors import MalformedAdapterError, UnsupportedAdapterError

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
_MODULE_PREFIX = "base_model.model."
_ADAPTED_MODULE = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.*\.layers\.\d+\..*_proj)\.(?:vb)?lora_.*", re.DOTALL
)

_UNSUPPORTED = (
    ("lora_magnitude_vector", "use_dora", "magnitudes are not served without use_dora"),
    (".lora_B.bias", "lora_bias", "biases are not served"),
    ("lora_embedding_", "embed_tokens", "adapted embeddings are not served"),
    ("token_adapter", "trainable_token_indices", "changed embeddings are not served"),
    ("trainable_tokens", "trainable_token_indices", "changed embeddings are not served"),
    ("modules_to_save", "modules_to_save", "full copies of base modules are not served"),
    ("lm_head", "lm_head", "an adapted or replaced lm_head is not served"),
    ("embed_tokens", "embed_tokens", "adapted or replaced embeddings are not served"),
    ("norm", "modules_to_save", "replaced norms are not served"),
    (".bias", "bias", "biases are not served"),
    ("base_layer", "base_layer", "replaced base weights are not served"),
    (".lora_", "peft_type", "LoRA tensors do not belong into this kind of adapter"),
    (".vblora_", "peft_type", "VB-LoRA tensors do not belong into this kind of adapter"),
)


def tensor_name(module_path: str, suffix: str) -> str:
    """The name that PEFT gives a module's tensor in the file."""
    return f"{_MODULE_PREFIX}{module_path}.{suffix}"


class PeftTensors:
    """A file's tensors: first `refuse_others`, then `take` every expected one."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, shape: Sequence[int], dtypes: Collection[torch.dtype]) -> Tensor:
        """Remove and return a tensor. Raises MalformedAdapterError if it is absent or different."""
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise MalformedAdapterError(f"tensor {name} is missing, though the config claims it")
        if tuple(tensor.shape) != tuple(shape):
            raise MalformedAdapterError(
                f"tensor {name} has shape {tuple(tensor.shape)}, must be {tuple(shape)}"
            )
        if tensor.dtype not in dtypes:
            allowed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise MalformedAdapterError(
                f"tensor {name} is {tensor.dtype}, must be one of {allowed}"
            )
        return tensor

    def refuse_others(self, expected: Collection[str], claimed_paths: Collection[str]) -> None:
        """Raise for the first tensor that is not `expected`: unsupported by name, or stray."""
        for name in sorted(self._tensors.keys() - expected):
            _refuse(name, claimed_paths)


def _refuse(name: str, claimed_paths: Collection[str]) -> None:
    shown = repr(name[:200])
    module = _ADAPTED_MODULE.fullmatch(name)
    if module is not None and module["path"] not in claimed_paths:
        raise MalformedAdapterError(f"tensor {shown} is of a module that the config does not claim")
    for part, feature, reason in _UNSUPPORTED:
        if part in name:
            raise UnsupportedAdapterError(f"tensor {shown}: {reason}", feature=feature)
    raise MalformedAdapterError(f"tensor {shown} is not part of an adapter")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise MalformedAdapterError if any value is NaN or infinite."""
    if not torch.isfinite(tensor).all():
        raise MalformedAdapterError(f"tensor {name} has values that are not finite")
