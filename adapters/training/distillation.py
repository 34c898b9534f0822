"""A fitted VB-LoRA adapter, trained on to answer as the adapter that it was fitted to.

The loss is the divergence (Kullback and Leibler's, nats a token) of its next tokens from the
teacher's where answers stand. Which vectors a sub-vector mixes stays as it was fitted; their
weights and the bank are trained. Teacher and student share the frozen base.

Shape legend: R rank, I input features, O output features.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adapters.training.loop import Batch, BatchOf, TrainingLoop
from adapters.training.loss import answer_logits
from adapters.training.recipe import Recipe
from adapters.training.trainer import parameter_groups, save_adapter
from core.factors import LowRankPair, ModuleKey

_NOT_MIXED = -30.0  # a logit whose weight is 1e-13


class Distillation(TrainingLoop):
    """Of `teacher`'s pairs into the adapter that `directory` has, over the base in `base`, in fp32.

    `recipe` gives steps, batches and learning rates; the adapter keeps its own shape.
    """

    def __init__(
        self,
        base: Path,
        directory: Path,
        teacher: Mapping[ModuleKey, LowRankPair],
        recipe: Recipe,
        batch_of: BatchOf,
    ) -> None:
        model = _load_to_train(base, directory)
        self._teacher = teacher
        super().__init__(
            model,
            parameter_groups(model, recipe),
            num_steps=recipe.num_steps,
            batch_size=recipe.batch_size,
            batch_of=batch_of,
            loss=self._divergence,
        )

    def save(self, directory: Path, base_name: str) -> None:
        """Write PEFT's files, over those that are there."""
        save_adapter(self.model, directory, base_name)

    def _divergence(self, model: Any, batch: Batch) -> Tensor:
        with torch.no_grad(), _taught(model, self._teacher):
            wanted_NV = answer_logits(model, batch).log_softmax(-1)
        own_NV = answer_logits(model, batch).log_softmax(-1)
        return functional.kl_div(own_NV, wanted_NV, reduction="batchmean", log_target=True)


def _load_to_train(base: Path, directory: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapter = PeftModel.from_pretrained(model, directory, is_trainable=True)
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if (
                "vblora_logits" in name
            ):  # a stored weight of 0 comes back as -inf, or by rounding NaN
                weight.nan_to_num_(nan=_NOT_MIXED, neginf=_NOT_MIXED)
    return adapter


@contextmanager
def _taught(model: Any, teacher: Mapping[ModuleKey, LowRankPair]) -> Iterator[None]:
    """Inside, the model is the base with the teacher's increments."""
    handles = []
    for key, pair in teacher.items():
        layer = model.get_base_model().get_submodule(key.path).base_layer
        handles.append(layer.register_forward_hook(_adding(pair)))
    try:
        with model.disable_adapter():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(pair: LowRankPair) -> Any:
    def add(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + pair.scale * (inputs[0] @ pair.a_RI.T) @ pair.b_RO

    return add
