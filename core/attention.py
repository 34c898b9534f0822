"""Attention of a step's rows over keys and values in pages, in torch's own words.

The slow twin of the compiled one, and the way on every device but the CPU.

Shape legend: T rows of the step, S single-token rows, L positions attended to, P pages, K key and
value heads, G query heads of one of them, N query heads, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core.batch import Batch, DecodeRows
from core.kv_storage import KVStorage


def attention(query_TND: Tensor, kv: KVStorage, layer: int, batch: Batch) -> Tensor:
    """Attention of all rows of a batch, [T, N, D]; copies the pages that they attend to."""
    parts = []
    if batch.decode is not None:
        rows_SND = query_TND[: len(batch.decode.length_S)]
        parts.append(decode_attention(rows_SND, kv, layer, batch.decode))
    if batch.prompts is not None:
        for (start, end, num_before, num_pages), page_P in zip(
            batch.prompts.spans, batch.prompts.page_QP, strict=True
        ):
            rows_TND = query_TND[start:end]
            parts.append(prompt_attention(rows_TND, kv, layer, page_P[:num_pages], num_before))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def decode_attention(query_SND: Tensor, kv: KVStorage, layer: int, rows: DecodeRows) -> Tensor:
    """Attention of one row per sequence, [S, N, D]; all are padded to the longest."""
    key_SLKD, value_SLKD = kv.gather(layer, rows.page_SP)
    # The query heads of one key head stand as rows of one query, so no key is repeated.
    query_SKGD = query_SND.reshape(len(query_SND), key_SLKD.shape[2], -1, query_SND.shape[-1])
    out_SKGD = F.scaled_dot_product_attention(
        query_SKGD,
        key_SLKD.transpose(1, 2),
        value_SLKD.transpose(1, 2),
        attn_mask=rows.visible_places[:, None, None],
    )
    return out_SKGD.flatten(1, 2)


def prompt_attention(
    query_TND: Tensor, kv: KVStorage, layer: int, page_P: Tensor, num_before: int
) -> Tensor:
    """Causal attention of consecutive rows of one sequence over all its tokens, [T, N, D]."""
    num_rows, length = query_TND.shape[0], num_before + query_TND.shape[0]
    key_LKD, value_LKD = kv.gather(layer, page_P)
    mask = None
    if num_before:
        mask = torch.ones(num_rows, length, dtype=torch.bool, device=query_TND.device)
        mask = mask.tril_(num_before)
    out_NTD = F.scaled_dot_product_attention(
        query_TND.transpose(0, 1)[None],
        key_LKD[:length].transpose(0, 1)[None],
        value_LKD[:length].transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return out_NTD[0].transpose(0, 1)
