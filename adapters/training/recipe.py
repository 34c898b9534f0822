"""How an adapter is trained: one frozen, checked object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from adapters.training.errors import TrainingError
from core.factors import PROJECTIONS
from core.model_config import ModelConfig

_LONGEST_VECTOR = 256  # the paper's


@dataclass(frozen=True)
class Recipe:
    """VB-LoRA's shape and its training. Learning rates are the paper's, and fall linearly to zero.

    vector_length   None: the longest of at most 256 that divides all modules
    """

    num_steps: int = 300
    batch_size: int = 4
    seed: int = 0
    bank_learning_rate: float = 1e-3
    logits_learning_rate: float = 1e-2
    rank: int = 4
    topk: int = 2
    num_vectors: int = 256
    vector_length: int | None = None
    target_modules: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < (0 if field.name == "seed" else 1):
                raise TrainingError(f"{field.name} is {value}, must be at least 1")
            if type(value) is float and not 0 < value < math.inf:
                raise TrainingError(f"{field.name} is {value}, must be above 0")
        unknown = [name for name in self.target_modules if name not in PROJECTIONS]
        if unknown or not self.target_modules:
            raise TrainingError(
                f"target_modules has {unknown or 'nothing'}, must be some of "
                f"{', '.join(PROJECTIONS)}"
            )
        if self.topk > self.num_vectors:
            raise TrainingError(
                f"topk is {self.topk}, must be at most num_vectors ({self.num_vectors})"
            )

    def length_for(self, model: ModelConfig) -> int:
        """The vector length over this base. Raises TrainingError where it does not divide."""
        sizes = _sizes(model, self.target_modules)
        common = math.gcd(*sizes)
        if self.vector_length is None:
            return max(n for n in range(1, _LONGEST_VECTOR + 1) if common % n == 0)
        if common % self.vector_length:
            raise TrainingError(
                f"vector_length is {self.vector_length}, must divide {common}, which the modules' "
                f"sizes {', '.join(map(str, sorted(set(sizes))))} have in common"
            )
        return self.vector_length


def _sizes(model: ModelConfig, modules: Sequence[str]) -> list[int]:
    return [size for name in modules for size in model.projection_shape(name)]
