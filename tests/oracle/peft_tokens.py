"""Greedy tokens from PEFT, one adapter and one prompt at a time: the oracle of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from peft import PeftModel
from peft_oracle import without_peft_warnings
from transformers import AutoModelForCausalLM
from transformers_oracle import ReferenceGreedy, assert_same_greedy


@dataclass(frozen=True)
class Answer:
    """What was said to a prompt; `adapter` is its directory, None the base itself."""

    adapter: Path | None
    prompt: Sequence[int]
    token_ids: Sequence[int]


@without_peft_warnings
def peft_greedy(
    base: Path, adapter: Path | None, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[ReferenceGreedy]:
    """Tokens of `adapter` (None: the base itself) over `base` in fp32, end of sequence ignored."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return [_greedy(model, prompt, num_tokens) for prompt in prompts]


def _greedy(model: PeftModel, prompt: Sequence[int], num_tokens: int) -> ReferenceGreedy:
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            eos_token_id=-1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack([logits[0].topk(2).values for logits in out.logits])
    return ReferenceGreedy(
        tuple(out.sequences[0, len(prompt) :].tolist()), tuple((best[:, 0] - best[:, 1]).tolist())
    )


@without_peft_warnings
def peft_choices(base: Path, answers: Sequence[Answer]) -> list[ReferenceGreedy]:
    """For each answer what PEFT chooses after its prompt and each of its beginnings.

    One forward an answer, so much less work than `peft_greedy`, and as good a judge: tokens that
    are these choices are those of greedy decoding. The base is read once.
    """
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    chosen = []
    for adapter, same in groupby(answers, key=lambda answer: answer.adapter):
        if adapter is None:
            chosen += [_choices(fresh, answer) for answer in same]
        else:
            model = PeftModel.from_pretrained(fresh, adapter).eval()
            chosen += [_choices(model, answer) for answer in same]
            fresh = model.unload()
    return chosen


def assert_pefts(base: Path, answers: Sequence[Answer]) -> None:
    """Every answer is what PEFT would have said, ties aside."""
    for answer, chosen in zip(answers, peft_choices(base, answers), strict=True):
        assert_same_greedy(answer.token_ids, chosen)


def _choices(model: torch.nn.Module, answer: Answer) -> ReferenceGreedy:
    ids = torch.tensor([[*answer.prompt, *answer.token_ids[:-1]]])
    with torch.inference_mode():
        best = model(input_ids=ids).logits[0, len(answer.prompt) - 1 :].topk(2)
    gaps = best.values[:, 0] - best.values[:, 1]
    return ReferenceGreedy(tuple(best.indices[:, 0].tolist()), tuple(gaps.tolist()))
