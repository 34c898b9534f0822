"""PEFT as the slow, trusted twin: it writes the adapters and computes what they must do."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from peft import LoraConfig, PeftModel, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from core.factors import ModuleKey

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_peft_warnings(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """PEFT uses what transformers has deprecated, and warns of what some cases do on purpose."""

    @wraps(function)
    def quiet(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)

    return quiet


class TinyLlama:
    """Hidden 64, two layers, grouped queries (4 over 2 heads of 16), MLP 128, vocabulary 128."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            max_position_embeddings=256,
        )
        LlamaForCausalLM(config).save_pretrained(path)
        self.path = path

    def model(self) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(self.path)


class LlamaOnDisk(TinyLlama):
    """One that is in a directory already, in the shape that the savers take."""

    def __init__(self, path: Path) -> None:
        self.path = path


@without_peft_warnings
def save_vblora(
    llama: TinyLlama,
    path: Path,
    *,
    seed: int = 0,
    bank_seed: int | None = None,
    bank_limit: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> None:
    """Let PEFT save a VB-LoRA adapter with random, well spread logits.

    `bank_limit`: over a deep base, banks of 1 make some adapters so sensitive that PEFT in fp32
    strays from PEFT in fp64 by more than many a gap between the two best logits.
    """
    settings: dict[str, Any] = {
        "r": 4,
        "num_vectors": 32,
        "vector_length": 16,
        "topk": 2,
        "target_modules": ALL,
        "save_only_topk_weights": True,
        "task_type": "CAUSAL_LM",
        **overrides,
    }
    model = get_peft_model(llama.model(), VBLoRAConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    bank_generator = torch.Generator().manual_seed(seed if bank_seed is None else bank_seed)
    for name, parameter in model.named_parameters():
        if "vblora_logits" in name:
            parameter.data.normal_(0, 2, generator=generator)
        elif "vector_bank" in name:
            parameter.data.uniform_(-bank_limit, bank_limit, generator=bank_generator)
    model.to(dtype).save_pretrained(path)


@without_peft_warnings
def save_lora(
    llama: TinyLlama,
    path: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> None:
    """Let PEFT save a LoRA adapter whose A and B are both random."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM"}
    model = get_peft_model(llama.model(), LoraConfig(**{**settings, **overrides}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            parameter.data.normal_(0, 0.1, generator=generator)
        elif "lora_magnitude_vector" in name:
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter.data.mul_(0.5 + drawn)
    model.to(dtype).save_pretrained(path)


def save_lora_xs(llama: TinyLlama, path: Path, *, seed: int = 0, **settings: Any) -> None:
    """A LoRA-XS adapter as its authors' code saves it: a small matrix between A and B."""
    save_lora(llama, path, seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = read_tensors(path)
    for name, a_RI in list(tensors.items()):
        if name.endswith("lora_A.weight"):
            inner = name.replace("lora_A", "default_lora_latent_mapping")
            tensors[inner] = torch.randn(len(a_RI), len(a_RI), generator=generator)
    write_tensors(path, tensors)


@without_peft_warnings
def load_in_peft(llama: TinyLlama, path: Path) -> PeftModel:
    return PeftModel.from_pretrained(llama.model(), path).eval()


def peft_module(model: PeftModel, key: ModuleKey) -> Any:
    """PEFT's adapted layer."""
    return model.get_submodule(f"base_model.model.{key.path}")


def peft_increment(model: PeftModel, key: ModuleKey, x_TI: Tensor) -> Tensor:
    """What PEFT's layer adds to the output of its base layer."""
    layer = peft_module(model, key)
    with torch.no_grad():
        increment: Tensor = layer(x_TI) - layer.base_layer(x_TI)
    return increment


def adapted_keys(model: PeftModel) -> set[ModuleKey]:
    """Every module that PEFT has adapted."""
    paths = {ModuleKey(layer, name).path: (layer, name) for layer in (0, 1) for name in ALL}
    names = (name.removeprefix("base_model.model.") for name, _ in model.named_modules())
    return {ModuleKey(*paths[name]) for name in names if _is_adapted(model, name, paths)}


def _is_adapted(model: PeftModel, name: str, paths: dict[str, tuple[int, str]]) -> bool:
    return name in paths and hasattr(model.get_submodule(f"base_model.model.{name}"), "base_layer")


def edit_config(path: Path, **changes: Any) -> None:
    """Overwrite keys of a saved adapter's config."""
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    return dict(load_file(path / "adapter_model.safetensors"))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
