"""The tensors of one step, built from its chunks.

Rows (tokens) stand in this order: chunks of one token (decodes) sorted by adapter, then longer
chunks (prompts) sorted by adapter. Knows nothing of weights.

Shape legend: T rows of the step, S single-token chunks, Q longer ones, P pages of the longest of
them, L places in those pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.factors import FactorLease
from core.sequence import Chunk

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DecodeRows:
    """Rows 0..S-1 of the batch: one token each, attending to the whole of its own sequence.

    page_SP      int64, padded with the row's own first page
    length_S     int64, tokens to attend to (itself included)
    page_size    tokens of a page
    """

    page_SP: Tensor
    length_S: Tensor
    page_size: int

    @cached_property
    def visible_places(self) -> Tensor:
        """(S, L) bool, for torch's attention: which of L = P * page_size places are attended to."""
        num_places = self.page_SP.shape[1] * self.page_size
        return torch.arange(num_places, device=self.length_S.device) < self.length_S[:, None]


@dataclass(frozen=True)
class PromptRows:
    """The rows of longer chunks: consecutive tokens of one sequence each.

    span_Q3   int64: first row, row after the last, tokens of the sequence that come before
    page_QP   int64, padded with the chunk's own first page
    spans     `span_Q3` as numbers, and how many pages are the chunk's
    """

    span_Q3: Tensor
    page_QP: Tensor
    spans: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class AdapterRows:
    """Rows start..end-1 belong to one adapter; None is the base."""

    lease: FactorLease | None
    start: int
    end: int


@dataclass(frozen=True)
class Batch:
    """One step's input.

    token_T, position_T, kv_slot_T  int64: token id, position in its sequence, page*page_size+offset
    length_T      the sequence length that rotary scaling goes by, where it depends on one
    tail_page_P   int64 pages that this step begins and does not fill
    decode        None when no chunk has a single token
    prompts       None when all have
    adapter_rows  cover all rows in order; base-only batches have one entry without a lease
    head_row_R    int64 rows whose logits are wanted, ascending, in the order of `logit_spans`
    logit_spans   (chunk, number of its logit rows), only chunks that want any
    """

    chunks: tuple[Chunk, ...]
    token_T: Tensor
    position_T: Tensor
    kv_slot_T: Tensor
    tail_page_P: Tensor
    length_T: list[int] | None
    decode: DecodeRows | None
    prompts: PromptRows | None
    adapter_rows: tuple[AdapterRows, ...]
    head_row_R: Tensor
    logit_spans: tuple[tuple[Chunk, int], ...]


def build_batch(
    chunks: Seq[Chunk], page_size: int, device: torch.device, *, with_lengths: bool
) -> Batch:
    """Lay the chunks of one step out as rows; `with_lengths` fills `length_T`."""
    ordered = sorted(chunks, key=lambda chunk: (chunk.num_tokens > 1, chunk.seq.digest or ""))
    num_decode = sum(chunk.num_tokens == 1 for chunk in ordered)
    places = [_places(chunk, page_size) for chunk in ordered]
    starts = list(accumulate((chunk.num_tokens for chunk in ordered), initial=0))
    head_rows, spans = _logit_rows(ordered, starts)

    def put(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        chunks=tuple(ordered),
        token_T=put(_joined(token_ids for token_ids, _, _ in places)),
        position_T=put(_joined(positions for _, positions, _ in places)),
        kv_slot_T=put(_joined(slots for _, _, slots in places)),
        tail_page_P=put(_tail_pages(ordered, page_size)),
        length_T=_rotary_lengths(ordered) if with_lengths else None,
        decode=_decode_rows(ordered[:num_decode], page_size, put) if num_decode else None,
        prompts=(
            _prompt_rows(ordered[num_decode:], starts[num_decode:], put)
            if num_decode < len(ordered)
            else None
        ),
        adapter_rows=_adapter_rows(ordered, starts),
        head_row_R=put(head_rows),
        logit_spans=spans,
    )


def _places(chunk: Chunk, page_size: int) -> tuple[Seq[int], Seq[int], Seq[int]]:
    """Token ids, positions and slots of a chunk; plain numbers, since most have one token."""
    start, end, pages = chunk.start, chunk.end, chunk.seq.pages
    slots: list[int] = []
    for page in range(start // page_size, (end - 1) // page_size + 1):
        first, last = max(start, page * page_size), min(end, (page + 1) * page_size)
        offset = (pages[page] - page) * page_size
        slots += range(offset + first, offset + last)
    return chunk.seq.token_ids[start:end], range(start, end), slots


def _joined(parts: Iterable[Iterable[int]]) -> IntArray:
    return np.fromiter(chain.from_iterable(parts), np.int64)


def _tail_pages(chunks: Seq[Chunk], page_size: int) -> IntArray:
    tails = [
        chunk.seq.pages[chunk.end // page_size]
        for chunk in chunks
        if chunk.end % page_size and chunk.start <= chunk.end // page_size * page_size
    ]
    return np.array(tails, dtype=np.int64)


def _rotary_lengths(chunks: Seq[Chunk]) -> list[int]:
    return [
        max(chunk.seq.num_prompt, position + 1)
        for chunk in chunks
        for position in range(chunk.start, chunk.end)
    ]


def _decode_rows(
    chunks: Seq[Chunk], page_size: int, put: Callable[[npt.NDArray[Any]], Tensor]
) -> DecodeRows:
    lengths = np.array([chunk.end for chunk in chunks])
    return DecodeRows(put(_pages(chunks)), put(lengths), page_size)


def _prompt_rows(
    chunks: Seq[Chunk], starts: Seq[int], put: Callable[[npt.NDArray[Any]], Tensor]
) -> PromptRows:
    spans = tuple(
        (start, start + chunk.num_tokens, chunk.start, len(chunk.seq.pages))
        for chunk, start in zip(chunks, starts, strict=False)
    )
    return PromptRows(put(np.array(spans)[:, :3].copy()), put(_pages(chunks)), spans)


def _pages(chunks: Seq[Chunk]) -> IntArray:
    """The pages of each chunk's sequence, padded with its first."""
    pages = [chunk.seq.pages for chunk in chunks]
    longest = max(map(len, pages))
    return np.array([own + own[:1] * (longest - len(own)) for own in pages])


def _adapter_rows(chunks: Seq[Chunk], starts: Seq[int]) -> tuple[AdapterRows, ...]:
    rows = []
    for _, group in groupby(range(len(chunks)), key=lambda index: chunks[index].seq.digest):
        indices = list(group)
        first, last = indices[0], indices[-1]
        rows.append(AdapterRows(chunks[first].seq.lease, starts[first], starts[last + 1]))
    return tuple(rows)


def _logit_rows(
    chunks: Seq[Chunk], starts: Seq[int]
) -> tuple[IntArray, tuple[tuple[Chunk, int], ...]]:
    """All rows of chunks that want prompt logprobs, the last row of those that sample."""
    rows: list[int] = []
    spans: list[tuple[Chunk, int]] = []
    for chunk, start in zip(chunks, starts, strict=False):
        end = start + chunk.num_tokens
        if wants_prompt_logprobs(chunk):
            wanted = range(start, end)
        elif chunk.samples:
            wanted = range(end - 1, end)
        else:
            continue
        rows += wanted
        spans.append((chunk, len(wanted)))
    return np.array(rows, dtype=np.int64), tuple(spans)


def wants_prompt_logprobs(chunk: Chunk) -> bool:
    """Whether any logit of this chunk tells of a prompt token that has no logprob yet."""
    seq = chunk.seq
    asked = seq.request.sampling.prompt_logprobs is not None
    return asked and len(seq.prompt_logprobs) < seq.num_prompt and chunk.start < seq.num_prompt
