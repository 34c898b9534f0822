"""What is varied, one thing at a time, and beside what it stands. Pure values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from adapters.training.recipe import Recipe

USUAL = Recipe(num_steps=100, vector_length=96)
"""VB-LoRA as the paper trains it, in a third of the demo adapters' steps."""

NOISES = (0.01, 0.1)
"""Standard deviations of noisy logits; the second is that of PEFT's first logits."""


@dataclass(frozen=True)
class VBLoRA:
    """`noise` is added to the logits before the top k are chosen, while it trains. Where another
    task `lends` its bank, that of its demo adapter, the bank stays as it is. It is trained for
    `times` as many steps as the others, with a seed that is `reseeded` above theirs."""

    recipe: Recipe = USUAL
    noise: float = 0.0
    lends: bool = False
    times: int = 1
    reseeded: int = 0


@dataclass(frozen=True)
class LoRA:
    """alpha is twice the rank; trained as long as VB-LoRA."""

    rank: int
    learning_rate: float
    target_modules: tuple[str, ...] = USUAL.target_modules


@dataclass(frozen=True)
class MovedLoRA:
    """`lora`, trained, then a bank fitted to it (`vbserve convert lora`) and trained on for
    `num_steps` to answer the task's messages as it does."""

    lora: LoRA
    num_steps: int
    recipe: Recipe = USUAL


Variant = VBLoRA | LoRA | MovedLoRA


@dataclass(frozen=True)
class Ablation:
    """A table and a plot: variants by the label of their row; `axis` names numbers on a scale."""

    title: str
    variants: dict[str, Variant]
    axis: str | None = None


def _varied(field: str, values: tuple[int, ...]) -> dict[str, Variant]:
    return {str(value): VBLoRA(replace(USUAL, **{field: value})) for value in values}


_QV = ("q_proj", "v_proj")
_GOOD_LORA = LoRA(4, 2e-3)

ABLATIONS = {
    "topk": Ablation("vectors of a sub-vector, k", _varied("topk", (1, 2, 3, 4)), "k"),
    "bank": Ablation("vectors of the bank, h", _varied("num_vectors", (64, 128, 256, 512)), "h"),
    "length": Ablation("length of a vector, b", _varied("vector_length", (32, 64, 96, 192)), "b"),
    "noise": Ablation(
        "choice of the top k",
        {"noiseless": VBLoRA(), **{f"noise of {std}": VBLoRA(noise=std) for std in NOISES}},
    ),
    "lora": Ablation(
        "beside LoRA",
        {
            "VB-LoRA, rank 4": VBLoRA(),
            "LoRA, rank 4, rate 5e-4": LoRA(4, 5e-4),
            "LoRA, rank 4, rate 2e-3": _GOOD_LORA,
            "LoRA, rank 1 of q and v, rate 5e-4": LoRA(1, 5e-4, _QV),
            "LoRA, rank 1 of q and v, rate 2e-3": LoRA(1, 2e-3, _QV),
        },
    ),
    "moved": Ablation(
        "LoRA moved to VB-LoRA",
        {
            "VB-LoRA": VBLoRA(),
            "LoRA": _GOOD_LORA,
            "a bank fitted to it": MovedLoRA(_GOOD_LORA, 0),
            "and 100 steps": MovedLoRA(_GOOD_LORA, 100),
        },
    ),
    "shared": Ablation(
        "whose bank",
        {
            "its own": VBLoRA(),
            "another task's, frozen": VBLoRA(lends=True),
            "its own, three times as long": VBLoRA(times=3),
            "another task's, frozen, three times as long": VBLoRA(lends=True, times=3),
        },
    ),
    "seed": Ablation("seed", {f"seed {n}": VBLoRA(reseeded=n) for n in range(3)}),
}

LENDER = {
    "classify": "json-extract",
    "formal": "json-extract",
    "json-extract": "text-to-sql",
    "text-to-sql": "json-extract",
}
"""Whose demo adapter's bank a task is trained over where it has none of its own."""


def name_of(variant: Variant) -> str:
    """What a run is filed under; equal variants have one name, whichever ablations they are in."""
    if isinstance(variant, MovedLoRA):
        return f"{name_of(variant.lora)}-moved-{variant.num_steps}"
    if isinstance(variant, LoRA):
        modules = "all" if variant.target_modules == USUAL.target_modules else "qv"
        return f"lora-r{variant.rank}-{modules}-{variant.learning_rate:g}"
    recipe = variant.recipe
    name = f"vblora-k{recipe.topk}-h{recipe.num_vectors}-b{recipe.vector_length}"
    noise = f"-noise{variant.noise:g}" if variant.noise else ""
    times = f"-x{variant.times}" if variant.times > 1 else ""
    seed = f"-seed{variant.reseeded}" if variant.reseeded else ""
    return name + noise + ("-shared" if variant.lends else "") + times + seed


def all_variants() -> Iterator[tuple[str, Variant]]:
    """Each variant once, by name; the usual one first."""
    found: dict[str, Variant] = {name_of(VBLoRA()): VBLoRA()}
    for ablation in ABLATIONS.values():
        for variant in ablation.variants.values():
            found.setdefault(name_of(variant), variant)
    yield from found.items()
