"""Logits → next tokens, and log-probabilities where asked for.

Randomness is one uniform number per token, a hash of the request's seed and the token's place:
the same seed gives the same tokens whatever else is in the batch, on any device. Knows nothing
of why a sequence ends.

Shape legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from hashlib import blake2b

import torch
from torch import Tensor

from core.head import largest
from core.requests import SamplingParams, TokenLogprobs
from core.sequence import Sequence


def sample(logits_RV: Tensor, seqs: Seq[Sequence], eos_token_ids: frozenset[int]) -> list[int]:
    """The next token of each sequence from its row of logits."""
    rows = _adjusted(logits_RV, seqs, eos_token_ids)
    tokens = largest(rows)
    # Apart, since sorting gives a token another share of the unit interval: what other rows of
    # the batch ask for must not change what this one draws.
    all_random = [i for i, seq in enumerate(seqs) if seq.request.sampling.temperature > 0]
    for filtered in (False, True) if all_random else ():
        random = [index for index in all_random if _is_filtered(seqs[index]) == filtered]
        if random:
            own_seqs = [seqs[index] for index in random]
            picked = _sample_random(rows[random].float(), own_seqs, filtered=filtered)
            for index, token in zip(random, picked, strict=True):
                tokens[index] = token
    return tokens


def is_plain_greedy(seq: Sequence) -> bool:
    """Whether its next token is the one with the largest logit, as the model gives it."""
    return seq.request.sampling.temperature == 0 and not _needs_adjusting(seq)


def logprobs_of(logits_RV: Tensor, token_ids: Seq[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of the model's own distribution for one chosen token per row."""
    logprobs_RV = logits_RV.float().log_softmax(dim=-1)
    chosen = torch.tensor(token_ids, device=logits_RV.device)[:, None]
    own_R1 = logprobs_RV.gather(1, chosen)
    rank_R = (logprobs_RV > own_R1).sum(dim=-1) + 1
    top = logprobs_RV.topk(min(num_top, logprobs_RV.shape[-1]), dim=-1)
    return [
        TokenLogprobs(token, own, rank, dict(zip(ids, values, strict=True)))
        for token, own, rank, ids, values in zip(
            token_ids,
            own_R1[:, 0].tolist(),
            rank_R.tolist(),
            top.indices.tolist(),
            top.values.tolist(),
            strict=True,
        )
    ]


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = blake2b(f"{seed}:{place}".encode(), digest_size=8).digest()
    # 52 bits: times any total it stays below that total, so no tail of probability 0 is hit.
    return (int.from_bytes(digest, "little") >> 12) / (1 << 52)


def _adjusted(logits_RV: Tensor, seqs: Seq[Sequence], eos_token_ids: frozenset[int]) -> Tensor:
    """Logits with biases, penalties and forbidden stops applied; the same tensor if none is."""
    changed = [index for index, seq in enumerate(seqs) if _needs_adjusting(seq)]
    if not changed:
        return logits_RV
    rows = logits_RV.to(torch.float32, copy=True)  # small adjustments are lost in bf16
    for index in changed:
        _adjust(rows[index], seqs[index], eos_token_ids)
    return rows


def _needs_adjusting(seq: Sequence) -> bool:
    params = seq.request.sampling
    penalties = params.presence_penalty or params.frequency_penalty
    return bool(penalties or params.logit_bias or seq.num_output < params.min_tokens)


def _adjust(row_V: Tensor, seq: Sequence, eos_token_ids: frozenset[int]) -> None:
    params = seq.request.sampling
    for token, bias in params.logit_bias.items():
        row_V[token] += bias
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(seq.token_ids[seq.num_prompt :])
        for token, count in counts.items():
            row_V[token] -= params.presence_penalty + count * params.frequency_penalty
    if seq.num_output < params.min_tokens:
        stops = eos_token_ids | params.stop_token_ids
        row_V[[token for token in stops if token < len(row_V)]] = float("-inf")


def _is_filtered(seq: Sequence) -> bool:
    params = seq.request.sampling
    return bool(params.top_p < 1 or params.top_k or params.min_p)


def _sample_random(logits_RV: Tensor, seqs: Seq[Sequence], *, filtered: bool) -> list[int]:
    params = [seq.request.sampling for seq in seqs]

    def column(values: Seq[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_RV.device)[:, None]

    temperature = column([p.temperature for p in params])
    # Shifted first, so that a tiny temperature leaves the best token at 0 instead of infinity.
    shifted = logits_RV.double() - logits_RV.amax(dim=-1, keepdim=True)
    probs_RV = (shifted / temperature).softmax(dim=-1)
    if filtered:
        probs_RV, ids_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
        probs_RV = _filtered(probs_RV, params, column)
    else:
        ids_RV = None
    cumulative = probs_RV.cumsum(dim=-1)
    places = column([uniform(seq.seed, len(seq.token_ids)) for seq in seqs])
    picked = torch.searchsorted(cumulative, places * cumulative[:, -1:], right=True)
    tokens = picked if ids_RV is None else ids_RV.gather(1, picked)
    return [int(token) for token in tokens[:, 0].tolist()]


def _filtered(
    sorted_RV: Tensor, params: Seq[SamplingParams], column: Callable[[Seq[float]], Tensor]
) -> Tensor:
    """Zero what min_p, top_k and top_p drop, in this order, from rows sorted downwards."""
    num_tokens = sorted_RV.shape[-1]
    place_V = torch.arange(num_tokens, device=sorted_RV.device)
    kept = sorted_RV >= sorted_RV[:, :1] * column([p.min_p for p in params])
    kept &= place_V < column([p.top_k or num_tokens for p in params])
    probs_RV = sorted_RV * kept
    before_RV = probs_RV.cumsum(dim=-1) - probs_RV
    kept &= before_RV < column([p.top_p for p in params]) * probs_RV.sum(dim=-1, keepdim=True)
    kept[:, 0] = True
    return sorted_RV * kept
