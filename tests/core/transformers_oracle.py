"""What the engine is held to: transformers in fp32, one adapter at a time.

An adapter is merged into the weights as W + scale * B @ A. It shares no code with core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from core.factors import AdapterFactors

TIE_GAP = 1e-3
"""Tokens may differ from the oracle's where its two best logits are closer than this."""


def load_reference(path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """transformers' own model, eager attention."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return model.eval()


def _forget_lengths(model: LlamaForCausalLM) -> None:
    """Dynamic rope keeps the longest length it has met until it meets a short one."""
    if model.config.rope_parameters["rope_type"] == "dynamic":
        model(torch.tensor([[1]]))


@contextmanager
def merged(model: LlamaForCausalLM, factors: AdapterFactors | None) -> Iterator[LlamaForCausalLM]:
    """`model` with W + scale * B @ A in place of W, for as long as the context lasts."""
    saved: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for (layer, name), pair in ({} if factors is None else factors.pairs).items():
            block = model.model.layers[layer]
            owner = block.mlp if name in ("gate_proj", "up_proj", "down_proj") else block.self_attn
            weight = getattr(owner, name).weight
            saved.append((weight, weight.clone()))
            weight += (pair.scale * pair.b_RO.T.double() @ pair.a_RI.double()).to(weight.dtype)
        try:
            yield model
        finally:
            for weight, before in saved:
                weight.copy_(before)


def reference_logits(
    model: LlamaForCausalLM, token_ids: Sequence[int], factors: AdapterFactors | None = None
) -> Tensor:
    """Logits [tokens, vocabulary] of one forward over the whole sequence."""
    with merged(model, factors), torch.inference_mode():
        _forget_lengths(model)
        return model(torch.tensor([list(token_ids)])).logits[0]


@dataclass(frozen=True)
class ReferenceGreedy:
    """Greedy tokens, and for each how far the best logit stood above the second."""

    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]


def reference_greedy(
    model: LlamaForCausalLM,
    prompt: Sequence[int],
    num_tokens: int,
    factors: AdapterFactors | None = None,
) -> ReferenceGreedy:
    """One sequence alone with transformers' own cache, as generate() does, eos ignored."""
    tokens: list[int] = []
    gaps: list[float] = []
    cache = DynamicCache(config=model.config)
    step = torch.tensor([list(prompt)])
    with merged(model, factors), torch.inference_mode():
        _forget_lengths(model)
        for _ in range(num_tokens):
            logits = model(step, past_key_values=cache, use_cache=True).logits[0, -1]
            best = logits.topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            step = best.indices[:1][None]
    return ReferenceGreedy(tuple(tokens), tuple(gaps))


def assert_same_greedy(
    token_ids: Sequence[int], expected: ReferenceGreedy, tie_gap: float = TIE_GAP
) -> None:
    """Equal up to the first place where the oracle itself is at a tie."""
    assert len(token_ids) == len(expected.token_ids)
    for place, (own, reference, gap) in enumerate(
        zip(token_ids, expected.token_ids, expected.gaps, strict=True)
    ):
        if own != reference:
            assert gap < tie_gap, (
                f"token {place} is {own}, the oracle's is {reference} by a gap of {gap}: "
                f"{list(token_ids)} against {list(expected.token_ids)}"
            )
            return


def assert_close_logits(own: Tensor, expected: Tensor, relative: float) -> None:
    """The largest difference stays below `relative` times the largest logit."""
    difference = (own.float() - expected.float()).abs().max()
    assert own.shape == expected.shape
    assert difference <= relative * expected.float().abs().max(), f"differs by {difference}"
