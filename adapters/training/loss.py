"""The loss of answers: mean cross-entropy over their tokens, the end of sequence included.

Shape legend: B examples, T tokens, D hidden size, N answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from adapters.training.examples import Example


def answer_loss(model: Any, batch: Sequence[Example]) -> Tensor:
    """Of a PEFT model over a transformers Llama."""
    targets = [token for example in batch for token in example.answer]
    return functional.cross_entropy(answer_logits(model, batch), torch.tensor(targets))


def answer_logits(model: Any, batch: Sequence[Example]) -> Tensor:
    """(N, V): what predicts the answers' tokens, example by example; other logits are not made."""
    shared = _shared_start([example.prompt for example in batch])
    rows = [[*example.prompt, *example.answer] for example in batch]
    hidden_BTD = _hidden_states(model, shared, rows)
    predicting: list[Tensor] = []
    for hidden_TD, example in zip(hidden_BTD, batch, strict=True):
        # The prompt's last token predicts the answer's first.
        first = len(example.prompt) - len(shared) - 1
        predicting.append(hidden_TD[first : first + len(example.answer)])
    logits_NV: Tensor = model.get_base_model().lm_head(torch.cat(predicting))
    return logits_NV


def _shared_start(prompts: Sequence[tuple[int, ...]]) -> list[int]:
    """The tokens with which all prompts begin, short of any prompt's last token."""
    shared = 0
    most = min(map(len, prompts)) - 1
    while shared < most and len({prompt[: shared + 1] for prompt in prompts}) == 1:
        shared += 1
    return list(prompts[0][:shared])


def _hidden_states(model: Any, shared: list[int], rows: Sequence[list[int]]) -> Tensor:
    """Last hidden states (B, T, D) of each row after the shared start, padded on the right.

    With a chat template the shared start is a third to a half of all tokens: it is computed once.
    """
    decoder = model.get_base_model().model
    cache = None
    if shared:
        cache = decoder(input_ids=torch.tensor([shared]), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
    rests = [torch.tensor(row[len(shared) :]) for row in rows]
    attended = [torch.ones(len(row), dtype=torch.long) for row in rows]
    hidden: Tensor = decoder(
        input_ids=pad_sequence(rests, batch_first=True),
        attention_mask=pad_sequence(attended, batch_first=True),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return hidden
