"""Which linear layers of a Llama a PEFT config claims, by PEFT's own matching rules.

Source: `check_target_module_exists`, `_maybe_include_all_linear_layers` and `get_pattern_key` of
peft 0.21. Patterns come from strangers, so they run in a regular expression engine with a deadline
(`re` has none). Knows nothing of tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import regex  # type: ignore[import-untyped]  # ships no types

from adapters.errors import MalformedAdapterError, UnsupportedAdapterError
from core.factors import PROJECTIONS, ModuleKey

_MAX_PATTERN_CHARS = 65_536
_DEADLINE_SECONDS = 2.0
_DEFAULT_TARGETS = ("q_proj", "v_proj")  # PEFT's for Llama, LoRA and VB-LoRA alike

Predicate = Callable[[str], bool]


def all_modules(num_layers: int) -> list[ModuleKey]:
    """Every linear layer that can be adapted, in the order of the forward."""
    return [ModuleKey(layer, name) for layer in range(num_layers) for name in PROJECTIONS]


class PatternMatcher:
    """Regular expressions from a config, matched within `deadline_seconds` in all."""

    def __init__(self, deadline_seconds: float = _DEADLINE_SECONDS) -> None:
        self._deadline = time.monotonic() + deadline_seconds
        self._compiled: dict[str, Any] = {}

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Whether `pattern` matches all of `name`. Raises MalformedAdapterError."""
        return self._match(pattern, name) is not None

    def layer_index(self, pattern: str, name: str) -> int | None:
        """The group `idx` of `pattern` at the start of `name`, or None without a match."""
        found = self._match(pattern, name, whole=False)
        return int(found["idx"]) if found else None

    def _match(self, pattern: str, name: str, *, whole: bool = True) -> Any:
        compiled = self._compiled.get(pattern) or self._compile(pattern)
        match = compiled.fullmatch if whole else compiled.match
        try:
            return match(name, timeout=max(self._deadline - time.monotonic(), 1e-3))
        except TimeoutError:
            raise MalformedAdapterError(
                f"the pattern {pattern[:80]!r} takes too long to match module names"
            ) from None

    def _compile(self, pattern: str) -> Any:
        if len(pattern) > _MAX_PATTERN_CHARS:
            raise MalformedAdapterError(f"a pattern of {len(pattern)} characters is too long")
        try:
            compiled = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise MalformedAdapterError(
                f"the pattern {pattern[:80]!r} is not a regular expression: {error}"
            ) from error
        self._compiled[pattern] = compiled
        return compiled


def claimed_modules(config: Mapping[str, Any], num_layers: int) -> list[ModuleKey]:
    """The linear layers that the config claims, in the order of the forward; at least one.

    Raises UnsupportedAdapterError where it also claims lm_head or embed_tokens, and
    MalformedAdapterError where it claims nothing or something that is no linear layer.
    """
    matcher = PatternMatcher()
    targeted = _target_predicate(config, matcher)
    excluded = _exclude_predicate(config, matcher)
    _refuse_other_targets(num_layers, lambda name: targeted(name) and not excluded(name))
    modules = [
        key for key in all_modules(num_layers) if targeted(path := key.path) and not excluded(path)
    ]
    if not modules:
        raise MalformedAdapterError(
            f"target_modules={str(config.get('target_modules'))[:80]} matches no linear layer of a "
            f"Llama with {num_layers} layers"
        )
    return modules


def first_matching_pattern(
    patterns: Iterable[str], path: str, matcher: PatternMatcher
) -> str | None:
    """The first of rank_pattern's or alpha_pattern's keys for a module (PEFT: get_pattern_key)."""
    for pattern in patterns:
        if matcher.fullmatch(rf"(.*\.)?({pattern})", path):
            return pattern
    return None


def _refuse_other_targets(num_layers: int, claims: Predicate) -> None:
    for name in _other_modules(num_layers):
        if not claims(name):
            continue
        if name in ("lm_head", "model.embed_tokens"):
            raise UnsupportedAdapterError(
                f"target_modules includes {name}: only the linear layers of the blocks are served",
                feature=name,
            )
        raise MalformedAdapterError(f"target_modules matches {name}, which is not a linear layer")


def _other_modules(num_layers: int) -> Iterator[str]:
    yield from ("model.embed_tokens", "lm_head", "model", "model.layers", "model.norm")
    yield "model.rotary_emb"
    for layer in range(num_layers):
        block = f"model.layers.{layer}"
        yield from (block, f"{block}.self_attn", f"{block}.mlp", f"{block}.mlp.act_fn")
        yield from (f"{block}.input_layernorm", f"{block}.post_attention_layernorm")


def _target_predicate(config: Mapping[str, Any], matcher: PatternMatcher) -> Predicate:
    targets = config.get("target_modules")
    if targets is None:
        targets = list(_DEFAULT_TARGETS)
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return lambda name: name.rpartition(".")[2] in PROJECTIONS
        return lambda name: matcher.fullmatch(targets, name)
    names = _name_set(targets, "target_modules")
    in_layers = _layer_predicate(config, matcher)
    return lambda name: name in names or (_has_suffix(name, names) and in_layers(name))


def _exclude_predicate(config: Mapping[str, Any], matcher: PatternMatcher) -> Predicate:
    excludes = config.get("exclude_modules")
    if not excludes:
        return lambda name: False
    if isinstance(excludes, str):
        return lambda name: matcher.fullmatch(excludes, name)
    names = _name_set(excludes, "exclude_modules")
    return lambda name: name in names or _has_suffix(name, names)


def _layer_predicate(config: Mapping[str, Any], matcher: PatternMatcher) -> Predicate:
    """Whether layers_to_transform names the layer of a module; without it, every module passes."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return lambda name: True
    layers = wanted if isinstance(wanted, list) else [wanted]
    if not all(type(layer) is int for layer in layers):
        raise MalformedAdapterError(f"layers_to_transform is {str(wanted)[:80]}, must be integers")
    patterns = _layer_patterns(config.get("layers_pattern"))

    def in_layers(name: str) -> bool:
        found = (matcher.layer_index(pattern, name) for pattern in patterns)
        return next((index for index in found if index is not None), None) in layers

    return in_layers


def _layer_patterns(value: Any) -> list[str]:
    if not value:
        return [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    names = [value] if isinstance(value, str) else value
    _name_set(names, "layers_pattern")
    return [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in names]


def _name_set(value: Any, key: str) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise MalformedAdapterError(
            f"{key} is {str(value)[:80]}, must be a string or list of strings"
        )
    return frozenset(value)


def _has_suffix(name: str, suffixes: Collection[str]) -> bool:
    """Whether `name` ends with a dot and one of `suffixes`."""
    while name:
        name = name.partition(".")[2]
        if name in suffixes:
            return True
    return False
