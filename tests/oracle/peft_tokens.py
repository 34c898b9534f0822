"""Greedy tokens from PEFT, one adapter and one prompt at a time: the oracle of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from peft_oracle import without_peft_warnings
from tiny_models import ReferenceGreedy
from transformers import AutoModelForCausalLM


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
def peft_greedy_of_many(
    base: Path, adapters: dict[str, Path], prompt: Sequence[int], num_tokens: int
) -> dict[str, ReferenceGreedy]:
    """As `peft_greedy` for one prompt and many adapters, the base being read once."""
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model: PeftModel | None = None
    said = {}
    for name, path in adapters.items():
        model = PeftModel.from_pretrained(fresh, path).eval()
        said[name] = _greedy(model, prompt, num_tokens)
        fresh = model.unload()
    return said
