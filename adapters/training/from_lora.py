"""A LoRA directory → a VB-LoRA directory that is fitted to it. How, is `fitting.py`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.compact import CompactAdapter, CompactLoRA
from adapters.peft_adapter import read_peft_adapter
from adapters.rebuild import rebuild_factors
from adapters.training.errors import TrainingError
from adapters.training.fitting import balanced, fit_bank, relative_errors, sub_vectors
from adapters.training.recipe import Recipe
from adapters.training.vblora_files import write_vblora
from core.factors import PROJECTIONS, LowRankPair, ModuleKey
from core.model_config import BaseInfo


@dataclass(frozen=True)
class FittedLoRA:
    """What was fitted to what.

    recipe   the shape of `fitted`, its vector length included
    pairs    what `source` adds to each module
    errors   by module, the norm of what is wrong with B A by its own
    """

    source: CompactLoRA
    fitted: CompactAdapter
    recipe: Recipe
    pairs: Mapping[ModuleKey, LowRankPair]
    errors: Mapping[ModuleKey, float]


def fit_lora(
    source: Path,
    target: Path,
    base: BaseInfo,
    recipe: Recipe,
    *,
    rank: int | None = None,
    rounds: int = 20,
    progress: Callable[[float], None] = lambda error: None,
) -> FittedLoRA:
    """Fit a bank to the LoRA adapter in `source` and write it to the new directory `target`.

    The bank's shape is the recipe's; its modules are the adapter's own, and its rank, unless
    `rank` is given, the adapter's largest. `progress` gets the relative error of each round.

    Raises AdapterError for what cannot be read or is not LoRA, OSError where `target` exists.
    """
    adapter = read_peft_adapter(source, base)
    if not isinstance(adapter, CompactLoRA):
        raise TrainingError(f"{source} is a {adapter.kind} adapter, not LoRA")
    if adapter.gains is not None:
        raise TrainingError(f"{source} is DoRA, whose gains VB-LoRA does not have")
    wanted = rebuild_factors(adapter).pairs
    names = tuple(name for name in PROJECTIONS if any(key.projection == name for key in wanted))
    shape = replace(recipe, rank=rank or adapter.max_rank, target_modules=names)
    length = shape.length_for(base.config)
    pairs = {key: balanced(pair, shape.rank) for key, pair in wanted.items()}
    fit = fit_bank(
        sub_vectors(pairs, length),
        num_vectors=shape.num_vectors,
        topk=shape.topk,
        rounds=rounds,
        seed=shape.seed,
        progress=progress,
    )
    write_vblora(target, fit, pairs, base.path.name)
    fitted = read_peft_adapter(target, base)
    errors = dict(relative_errors(wanted, rebuild_factors(fitted)))
    return FittedLoRA(adapter, fitted, replace(shape, vector_length=length), wanted, errors)
