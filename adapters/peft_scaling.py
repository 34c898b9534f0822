"""r and alpha of a PEFT config, with the patterns that override them for single modules.

Source: `get_pattern_key` and its callers in peft 0.21. Knows nothing of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adapters.peft_config import as_finite, as_patterns, as_positive_int, positive_int
from adapters.peft_targets import PatternMatcher, first_matching_pattern
from core.factors import ModuleKey

_DEFAULT_ALPHA = 8  # PEFT's, of LoRA and LoHa alike


class Scaling:
    """`alpha_key` is what the config calls alpha. Raises MalformedAdapterError."""

    def __init__(self, config: Mapping[str, Any], alpha_key: str = "lora_alpha") -> None:
        self._rank = positive_int(config, "r")
        self._alpha = as_finite(config.get(alpha_key, _DEFAULT_ALPHA), alpha_key)
        self._ranks = as_patterns(config.get("rank_pattern"), "rank_pattern")
        self._alphas = as_patterns(config.get("alpha_pattern"), "alpha_pattern")
        self._rslora = bool(config.get("use_rslora"))
        self._matcher = PatternMatcher()

    def rank_and_scale(self, key: ModuleKey) -> tuple[int, float]:
        """The rank of one module and the factor that its increment is multiplied with."""
        path = key.path
        rank_pattern = first_matching_pattern(self._ranks, path, self._matcher)
        alpha_pattern = first_matching_pattern(self._alphas, path, self._matcher)
        rank, alpha = self._rank, self._alpha
        if rank_pattern is not None:
            rank = as_positive_int(self._ranks[rank_pattern], f"rank_pattern[{rank_pattern!r}]")
        if alpha_pattern is not None:
            alpha = as_finite(self._alphas[alpha_pattern], f"alpha_pattern[{alpha_pattern!r}]")
        return rank, alpha / (math.sqrt(rank) if self._rslora else rank)
