"""Trains one VB-LoRA adapter (arXiv 2405.15179) with PEFT: step by step, to be resumed anywhere.

A step's batch depends on the recipe and the step's number alone, and nothing else is drawn after
the adapter is made, so a training that was interrupted ends as one that was not. Knows nothing of
files but its own state's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.training.errors import TrainingError
from adapters.training.examples import Example
from adapters.training.loop import Batch, BatchOf, TrainingLoop
from adapters.training.recipe import Recipe
from core.model_config import read_model_config


def shuffled(examples: Sequence[Example], recipe: Recipe) -> BatchOf:
    """Batches by step: the examples in another order in each pass over them."""

    def batch_of(step: int) -> Batch:
        places = range(step * recipe.batch_size, (step + 1) * recipe.batch_size)
        return [examples[_order(len(examples), place, recipe.seed)] for place in places]

    return batch_of


def _order(count: int, place: int, seed: int) -> int:
    rng = torch.Generator().manual_seed(seed * 1_000_003 + place // count)
    return int(torch.randperm(count, generator=rng)[place % count])


class AdapterTrainer(TrainingLoop):
    """An adapter in training over the base in the directory `base`, in fp32.

    `batch_of` gives a step's examples. With `bank` (H, B) that bank is used and kept as it is: the
    adapter then differs from others over it by indices and weights alone.
    """

    def __init__(
        self,
        base: Path,
        recipe: Recipe,
        batch_of: BatchOf,
        *,
        bank: Tensor | None = None,
    ) -> None:
        if bank is not None:
            recipe = replace(recipe, num_vectors=len(bank), vector_length=bank.shape[1])
        model_config = read_model_config(base)
        self.recipe = replace(recipe, vector_length=recipe.length_for(model_config))
        model = _new_adapter(base, self.recipe)
        self._train_bank = bank is None
        if bank is not None:
            set_bank(model, bank).requires_grad_(False)
        super().__init__(
            model,
            parameter_groups(model, self.recipe),
            num_steps=recipe.num_steps,
            batch_size=recipe.batch_size,
            batch_of=batch_of,
        )

    def save(self, directory: Path, base_name: str) -> None:
        """Write PEFT's files; `base_name` is what they say of the base."""
        self.model.peft_config["default"].target_modules = list(self.recipe.target_modules)
        save_adapter(self.model, directory, base_name)

    # -- state --------------------------------------------------------------------------------

    def write_state(self, file: Path, more: dict[str, Any]) -> None:
        """Everything that `read_state` needs; `more` is kept beside it. Replaces `file` at once."""
        state = {
            "recipe": asdict(self.recipe),
            "train_bank": self._train_bank,
            "num_done": self.num_done,
            "weights": {name: weight.detach() for name, weight in self._trained()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "more": more,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_suffix(".new")
        torch.save(state, written)
        written.replace(file)

    def read_state(self, file: Path) -> dict[str, Any]:
        """Go on from `file`; returns what was kept beside it.

        Raises TrainingError for a state of other settings, and OSError.
        """
        state = torch.load(file, weights_only=True)
        own = asdict(self.recipe) | {"train_bank": self._train_bank}
        theirs = state["recipe"] | {"train_bank": state["train_bank"]}
        for name, value in own.items():
            if theirs[name] != value:
                raise TrainingError(
                    f"{file} was made with {name} {theirs[name]}, not {value}: train anew, or with "
                    "the settings that it was begun with"
                )
        with torch.no_grad():
            for name, weight in self._trained():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.num_done = state["num_done"]
        more: dict[str, Any] = state["more"]
        return more

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(n, weight) for n, weight in self.model.named_parameters() if weight.requires_grad]


def _new_adapter(base: Path, recipe: Recipe) -> Any:
    from peft import VBLoRAConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(recipe.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = VBLoRAConfig(
            task_type="CAUSAL_LM",
            r=recipe.rank,
            topk=recipe.topk,
            num_vectors=recipe.num_vectors,
            vector_length=recipe.vector_length,
            target_modules=list(recipe.target_modules),
            vblora_dropout=0.0,
            save_only_topk_weights=True,
        )
        return get_peft_model(model, config)


def save_adapter(model: Any, directory: Path, base_name: str) -> None:
    """Write PEFT's files; `base_name` is what they say of the base."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name  # not the path that it had on this machine
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty form


def set_bank(model: Any, bank: Tensor) -> Tensor:
    """Give the adapter these vectors; returns its parameter."""
    own: Tensor
    (own,) = (weight for name, weight in model.named_parameters() if "vector_bank" in name)
    with torch.no_grad():
        own.copy_(bank)
    return own


def parameter_groups(model: Any, recipe: Recipe) -> list[dict[str, Any]]:
    """Bank and logits, each with its learning rate; groups of nothing are left out."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    bank = [weight for name, weight in trained if "vector_bank" in name]
    logits = [weight for name, weight in trained if "vector_bank" not in name]
    groups = [
        {"params": bank, "lr": recipe.bank_learning_rate},
        {"params": logits, "lr": recipe.logits_learning_rate},
    ]
    return [group for group in groups if group["params"]]
