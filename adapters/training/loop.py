"""Steps of an optimiser over batches that depend on their number; the rate falls linearly to zero.

Knows nothing of what is trained, and nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adapters.training.examples import Example
from adapters.training.loss import answer_loss

Batch = Sequence[Example]
BatchOf = Callable[[int], Batch]
Loss = Callable[[Any, Batch], Tensor]


class TrainingLoop:
    """AdamW without decay over `groups`, torch's parameter groups, of `model`.

    `batch_of` gives a step's examples, `batch_size` of them; `loss` is a mean over their answers'
    tokens.
    """

    def __init__(
        self,
        model: Any,
        groups: Sequence[dict[str, Any]],
        *,
        num_steps: int,
        batch_size: int,
        batch_of: BatchOf,
        loss: Loss = answer_loss,
    ) -> None:
        self.model = model
        self.num_done = 0
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, num_steps)
        self._num_steps, self._batch_size = num_steps, batch_size
        self._batch_of, self._loss = batch_of, loss

    @property
    def is_done(self) -> bool:
        """Whether all steps have been made."""
        return self.num_done >= self._num_steps

    def step(self) -> float:
        """One step; returns its loss in nats a token."""
        loss = self._loss(self.model, self._batch_of(self.num_done))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._schedule.step()
        self.num_done += 1
        return loss.item()

    def loss_over(self, examples: Sequence[Example]) -> float:
        """Mean loss a token over `examples`, in nats."""
        return mean_loss(self.model, examples, self._batch_size, self._loss)


def mean_loss(
    model: Any, examples: Sequence[Example], batch_size: int, loss: Loss = answer_loss
) -> float:
    """Of an answer's token over `examples`, in nats."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            num_tokens = sum(len(example.answer) for example in batch)
            total += loss(model, batch).item() * num_tokens
            tokens += num_tokens
    return total / tokens
