"""The tensors of one step, built from its chunks.

Rows (tokens) stand in this order: chunks of one token (decodes) sorted by adapter, then longer
chunks (prompts) sorted by adapter. Knows nothing of weights.

Shape legend: T rows of the step, S single-token chunks, Q longer ones, P pages of the longest of
them, L places in those pages.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import groupby
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
    visible_SL   bool, L = P * page_size: the places that lie before length_S
    """

    page_SP: Tensor
    length_S: Tensor
    visible_SL: Tensor


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
    positions = [np.arange(chunk.start, chunk.end) for chunk in ordered]
    tokens = [chunk.seq.token_ids[chunk.start : chunk.end] for chunk in ordered]
    slots = [
        _kv_slots(chunk, place, page_size) for chunk, place in zip(ordered, positions, strict=True)
    ]
    starts = np.cumsum([0, *(chunk.num_tokens for chunk in ordered)])
    head_rows, spans = _logit_rows(ordered, starts)

    def put(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        chunks=tuple(ordered),
        token_T=put(np.fromiter((t for part in tokens for t in part), np.int64, starts[-1])),
        position_T=put(np.concatenate(positions)),
        kv_slot_T=put(np.concatenate(slots)),
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


def _kv_slots(chunk: Chunk, positions: IntArray, page_size: int) -> IntArray:
    pages = np.array(chunk.seq.pages)
    return pages[positions // page_size] * page_size + positions % page_size


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
    pages = _pages(chunks)
    lengths = np.array([chunk.end for chunk in chunks])
    visible = np.arange(pages.shape[1] * page_size) < lengths[:, None]
    return DecodeRows(put(pages), put(lengths), put(visible))


def _prompt_rows(
    chunks: Seq[Chunk], starts: IntArray, put: Callable[[npt.NDArray[Any]], Tensor]
) -> PromptRows:
    spans = tuple(
        (int(start), int(start) + chunk.num_tokens, chunk.start, len(chunk.seq.pages))
        for chunk, start in zip(chunks, starts, strict=False)
    )
    return PromptRows(put(np.array(spans)[:, :3].copy()), put(_pages(chunks)), spans)


def _pages(chunks: Seq[Chunk]) -> IntArray:
    """The pages of each chunk's sequence, padded with its first."""
    num_pages = max(len(chunk.seq.pages) for chunk in chunks)
    pages = np.empty((len(chunks), num_pages), dtype=np.int64)
    for row, chunk in enumerate(chunks):
        pages[row] = chunk.seq.pages[0]
        pages[row, : len(chunk.seq.pages)] = chunk.seq.pages
    return pages


def _adapter_rows(chunks: Seq[Chunk], starts: IntArray) -> tuple[AdapterRows, ...]:
    rows = []
    for _, group in groupby(range(len(chunks)), key=lambda index: chunks[index].seq.digest):
        indices = list(group)
        first, last = indices[0], indices[-1]
        rows.append(AdapterRows(chunks[first].seq.lease, int(starts[first]), int(starts[last + 1])))
    return tuple(rows)


def _logit_rows(
    chunks: Seq[Chunk], starts: IntArray
) -> tuple[IntArray, tuple[tuple[Chunk, int], ...]]:
    """All rows of chunks that want prompt logprobs, the last row of those that sample."""
    rows: list[IntArray] = []
    spans: list[tuple[Chunk, int]] = []
    for chunk, start in zip(chunks, starts, strict=False):
        end = start + chunk.num_tokens
        if wants_prompt_logprobs(chunk):
            rows.append(np.arange(start, end))
        elif chunk.samples:
            rows.append(np.array([end - 1]))
        else:
            continue
        spans.append((chunk, len(rows[-1])))
    return (np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)), tuple(spans)


def wants_prompt_logprobs(chunk: Chunk) -> bool:
    """Whether any logit of this chunk tells of a prompt token that has no logprob yet."""
    seq = chunk.seq
    asked = seq.request.sampling.prompt_logprobs is not None
    return asked and len(seq.prompt_logprobs) < seq.num_prompt and chunk.start < seq.num_prompt
