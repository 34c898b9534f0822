"""From a step's last hidden states to the next token of each sequence that samples, with logprobs.

Knows which rows belong to whom and what of their logits is needed; `sampler` knows how a token is
chosen from them.

Shape legend: R rows that want logits, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from core.batch import Batch, wants_prompt_logprobs
from core.head import Head, are_finite
from core.requests import TokenLogprobs
from core.sampler import is_plain_greedy, logprobs_of, sample
from core.sequence import Chunk, Sequence


@dataclass(frozen=True)
class NextToken:
    """A sampled token; `logprobs` where the request asks for them."""

    token_id: int
    logprobs: TokenLogprobs | None


def next_tokens(
    batch: Batch, x_RH: Tensor, head: Head, eos_token_ids: frozenset[int]
) -> dict[Sequence, NextToken | None]:
    """New tokens of the sequences that sample, with logprobs; fills prompt logprobs.

    None for a sequence whose logits are not finite: factors may overflow in the forward. Logits are
    computed for those alone who need more of them than the largest.
    """
    found: dict[Sequence, NextToken | None] = {}
    greedy: list[tuple[Sequence, int]] = []  # and its row
    others: list[tuple[Chunk, int]] = []  # and how many rows
    other_rows: list[int] = []
    end = 0
    for chunk, num_rows in batch.logit_spans:
        end += num_rows
        if _needs_largest_alone(chunk):
            greedy.append((chunk.seq, end - 1))
        else:
            others.append((chunk, num_rows))
            other_rows += range(end - num_rows, end)
    if greedy:
        tokens = head.most_probable(_rows(x_RH, [row for _, row in greedy]))
        for (seq, _), token in zip(greedy, tokens, strict=True):
            found[seq] = None if token is None else NextToken(token, None)
    if others:
        logits_RV = head.logits(_rows(x_RH, other_rows))
        found |= _by_logits(others, logits_RV, eos_token_ids)
    return found


def _needs_largest_alone(chunk: Chunk) -> bool:
    """Whether all that is asked of a chunk is its most probable next token."""
    params = chunk.seq.request.sampling
    return (
        chunk.samples
        and params.max_tokens > 0
        and params.logprobs is None
        and is_plain_greedy(chunk.seq)
        and not wants_prompt_logprobs(chunk)
    )


def _rows(x_RH: Tensor, rows: list[int]) -> Tensor:
    """These rows, of which none stands twice, in order."""
    return x_RH if len(rows) == len(x_RH) else x_RH[rows]


def _by_logits(
    spans: Seq[tuple[Chunk, int]], logits_RV: Tensor, eos_token_ids: frozenset[int]
) -> dict[Sequence, NextToken | None]:
    """See `next_tokens`: of chunks with so many rows of logits each."""
    finite = are_finite(logits_RV)
    found: dict[Sequence, NextToken | None] = {}
    rows: list[int] = []
    seqs: list[Sequence] = []
    end = 0
    for chunk, num_rows in spans:
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
    chosen_RV = _rows(logits_RV, rows)
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
