"""From a step's logits to the next token of each sequence that samples, with logprobs.

Knows which logit rows belong to whom; `sampler` knows how a token is chosen.

Shape legend: R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from core.batch import Batch, wants_prompt_logprobs
from core.requests import TokenLogprobs
from core.sampler import logprobs_of, sample
from core.sequence import Chunk, Sequence


@dataclass(frozen=True)
class NextToken:
    """A sampled token; `logprobs` where the request asks for them."""

    token_id: int
    logprobs: TokenLogprobs | None


def next_tokens(
    batch: Batch, logits_RV: Tensor, eos_token_ids: frozenset[int]
) -> dict[Sequence, NextToken | None]:
    """New tokens of the sequences that sample, with logprobs; fills prompt logprobs.

    None for a sequence whose logits are not finite: factors may overflow in the forward.
    """
    finite = [isfinite(largest) for largest in logits_RV.amax(dim=-1).tolist()]
    found: dict[Sequence, NextToken | None] = {}
    rows: list[int] = []
    seqs: list[Sequence] = []
    end = 0
    for chunk, num_rows in batch.logit_spans:
        end += num_rows
        if not all(finite[end - num_rows : end]):
            found[chunk.seq] = None
            continue
        if wants_prompt_logprobs(chunk):
            _fill_prompt_logprobs(chunk, logits_RV[end - num_rows : end])
        if chunk.samples and chunk.seq.request.sampling.max_tokens > 0:
            rows.append(end - 1)
            seqs.append(chunk.seq)
    if not seqs:
        return found
    chosen_RV = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
    tokens = sample(chosen_RV, seqs, eos_token_ids)
    logprobs = _sampled_logprobs(chosen_RV, seqs, tokens)
    for seq, token in zip(seqs, tokens, strict=True):
        found[seq] = NextToken(token, logprobs.get(seq))
    return found


def _fill_prompt_logprobs(chunk: Chunk, logits_RV: Tensor) -> None:
    """Add the logprobs of the prompt's tokens after the chunk's rows, unless they are there."""
    seq = chunk.seq
    known = seq.prompt_logprobs
    if not known:
        known.append(None)  # nothing comes before the first token
    first_row = len(known) - 1 - chunk.start
    targets = seq.token_ids[len(known) : min(chunk.end + 1, seq.num_prompt)]
    if targets and first_row >= 0:
        num_top = seq.request.sampling.prompt_logprobs or 0
        rows_RV = logits_RV[first_row : first_row + len(targets)]
        known.extend(logprobs_of(rows_RV, targets, num_top))


def _sampled_logprobs(
    logits_RV: Tensor, seqs: Seq[Sequence], tokens: Seq[int]
) -> dict[Sequence, TokenLogprobs]:
    found = {}
    for row, (seq, token) in enumerate(zip(seqs, tokens, strict=True)):
        num_top = seq.request.sampling.logprobs
        if num_top is not None:
            found[seq] = logprobs_of(logits_RV[row : row + 1], [token], num_top)[0]
    return found
