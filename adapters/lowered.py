"""PEFT's AdaLoRA, VeRA and LoHa (peft 0.21) → `CompactLoRA`: low-rank pairs that mean the same.

    AdaLoRA   B (A * E) alpha / (init_r + 1e-5), with the singular values E folded into A
    VeRA      (lambda_b * B) (lambda_d * A), over one A and B that all modules cut to their size
    LoHa      (B1 A1) * (B2 A2) alpha / r, element by element: a product of rank r * r

Folding rounds once, from fp64. What is stored are the pairs, so an adapter takes the bytes of LoRA
of that rank. Knows nothing of the store or of how pairs are used.

Shape legend: R rank, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.compact import CompactLoRA
from adapters.errors import MalformedAdapterError, UnsupportedAdapterError
from adapters.layout import factor_order, in_layout_order, module_spec
from adapters.peft_config import (
    as_finite,
    as_patterns,
    check_features,
    positive_int,
)
from adapters.peft_scaling import Scaling
from adapters.peft_targets import claimed_modules
from adapters.peft_tensors import FLOATS, PeftTensors, check_finite, tensor_name
from core.factors import LowRankPair, ModuleKey
from core.model_config import BaseInfo

_Config = Mapping[str, Any]
_Tensors = Mapping[str, Tensor]

_ADALORA_KEYS = frozenset({
    "r", "lora_alpha", "rank_pattern", "init_r",
    # only of training; rsLoRA's scale and alpha_pattern are LoRA's, AdaLoRA reads neither
    "alpha_pattern", "beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit",
    "total_step", "use_rslora",
})  # fmt: skip
_VERA_KEYS = frozenset({"r", "save_projection", "projection_prng_key", "d_initial", "init_weights",
                        "vera_dropout"})  # fmt: skip
_LOHA_KEYS = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout",
                        "module_dropout", "init_weights", "use_effective_conv2d"})  # fmt: skip


def read_adalora(config: _Config, tensors: _Tensors, base: BaseInfo) -> CompactLoRA:
    """Validate an AdaLoRA adapter against the base and lower it. Raises as `read_lora` does."""
    check_features(config, _ADALORA_KEYS)
    initial = positive_int(config, "init_r")
    alpha = as_finite(config.get("lora_alpha", 8), "lora_alpha")
    scale = (alpha if alpha > 0 else initial) / (initial + 1e-5)
    ranks = _pruned_ranks(config, initial)
    own = OwnTensors(config, tensors, base, ("lora_A", "lora_B", "lora_E"))
    pairs = {}
    for key in own.keys:
        num_out, num_in = base.config.projection_shape(key.projection)
        rank = ranks.get(key.path, initial)
        a_RI = own.take(key, "lora_A", (rank, num_in)) * own.take(key, "lora_E", (rank, 1))
        b_OR = own.take(key, "lora_B", (num_out, rank))
        if rank:  # pruned to nothing, a module is the base's again
            pairs[key] = LowRankPair(a_RI, b_OR.T, scale)
    return compact_lora(base, pairs)


def _pruned_ranks(config: _Config, initial: int) -> dict[str, int]:
    """By module: how many of its singular values training has kept."""
    ranks = {}
    for name, kept in as_patterns(config.get("rank_pattern"), "rank_pattern").items():
        are_flags = isinstance(kept, list) and all(type(flag) is bool for flag in kept)
        if not are_flags or len(kept) != initial:
            raise MalformedAdapterError(
                f"rank_pattern[{name[:80]!r}] must be a list of {initial} booleans"
            )
        ranks[name.removesuffix(".lora_E")] = sum(kept)
    return ranks


def read_vera(config: _Config, tensors: _Tensors, base: BaseInfo) -> CompactLoRA:
    """Validate a VeRA adapter against the base and lower it. Raises as `read_lora` does."""
    check_features(config, _VERA_KEYS)
    if not config.get("save_projection", True):
        raise UnsupportedAdapterError(
            "save_projection=False: vera_A and vera_B are not in the file, and random numbers that "
            "are drawn again may differ; save it with save_projection=True",
            feature="save_projection",
        )
    rank = positive_int(config, "r")
    own = OwnTensors(
        config, tensors, base, ("vera_lambda_b", "vera_lambda_d"), ("vera_A", "vera_B")
    )
    shapes = [base.config.projection_shape(key.projection) for key in own.keys]
    a_RI = own.take_shared("vera_A", (rank, max(num_in for _, num_in in shapes)))
    b_OR = own.take_shared("vera_B", (max(num_out for num_out, _ in shapes), rank))
    pairs = {}
    for key, (num_out, num_in) in zip(own.keys, shapes, strict=True):
        gain_O = own.take(key, "vera_lambda_b", (num_out,))
        gain_R = own.take(key, "vera_lambda_d", (rank,))
        a = gain_R[:, None] * a_RI[:, :num_in]
        pairs[key] = LowRankPair(a, (gain_O[:, None] * b_OR[:num_out]).T, 1.0)
    return compact_lora(base, pairs)


def read_loha(config: _Config, tensors: _Tensors, base: BaseInfo) -> CompactLoRA:
    """Validate a LoHa adapter against the base and lower it. Raises as `read_lora` does."""
    check_features(config, _LOHA_KEYS)
    scaling = Scaling(config, "alpha")
    own = OwnTensors(config, tensors, base, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
    pairs = {}
    for key in own.keys:
        num_out, num_in = base.config.projection_shape(key.projection)
        rank, scale = scaling.rank_and_scale(key)
        b1_OR, b2_OR = (own.take(key, f"hada_w{n}_a", (num_out, rank)) for n in (1, 2))
        a1_RI, a2_RI = (own.take(key, f"hada_w{n}_b", (rank, num_in)) for n in (1, 2))
        a = (a1_RI[:, None] * a2_RI[None]).flatten(0, 1)
        b = (b1_OR[:, :, None] * b2_OR[:, None]).flatten(1)
        pairs[key] = LowRankPair(a, b.T, scale)
    return compact_lora(base, pairs)


class OwnTensors:
    """The tensors of the modules that the config claims, in fp64; all others are refused."""

    def __init__(
        self,
        config: _Config,
        tensors: _Tensors,
        base: BaseInfo,
        suffixes: tuple[str, ...],
        shared: tuple[str, ...] = (),
    ) -> None:
        self.keys = claimed_modules(config, base.config.num_layers)
        self._tensors = PeftTensors(tensors)
        names = {tensor_name(key.path, suffix) for key in self.keys for suffix in suffixes}
        names |= {_shared_name(name) for name in shared}
        self._tensors.refuse_others(names, {key.path for key in self.keys})

    def take(self, key: ModuleKey, suffix: str, shape: tuple[int, ...]) -> Tensor:
        """One module's tensor; MalformedAdapterError if it is absent, misshapen or not finite."""
        return self._take(tensor_name(key.path, suffix), shape)

    def take_shared(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that all modules share; likewise."""
        return self._take(_shared_name(name), shape)

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensors.take(name, shape, FLOATS)
        check_finite(name, tensor)
        return tensor.double()


def _shared_name(name: str) -> str:
    return f"base_model.{name}"


def compact_lora(
    base: BaseInfo,
    pairs: Mapping[ModuleKey, LowRankPair],
    gains: Mapping[ModuleKey, Tensor] | None = None,
) -> CompactLoRA:
    """The compact form of these pairs, rounded to fp32. Raises MalformedAdapterError.

    `gains`, if there are any, has the gain_O of every module.
    """
    specs = in_layout_order(
        module_spec(key, len(pair.a_RI), pair.scale, base.config) for key, pair in pairs.items()
    )
    if not specs:
        raise MalformedAdapterError("the adapter changes nothing: all its modules have rank 0")
    parts = [
        pairs[spec.key].a_RI if side == "a" else pairs[spec.key].b_RO
        for spec, side in factor_order(specs)
    ]
    values = torch.cat([part.flatten() for part in parts]).float()
    check_finite("of the lowered factors", values)
    if gains is None:
        return CompactLoRA(base.fingerprint, specs, values)
    all_gains = torch.cat([gains[spec.key] for spec in specs]).float()
    check_finite("of the gains", all_gains)
    return CompactLoRA(base.fingerprint, specs, values, all_gains)
