"""Keys and values in pages, and attention of a step's rows over them.

Knows nothing of which pages belong to whom beyond what the batch says.

Shape legend: T rows of the step, S single-token rows, P pages, L positions attended to, K key and
value heads, G query heads per key head, H = K * G query heads, D head dimension.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.batch import Batch, DecodeRows, PromptRows
from core.model_config import ModelConfig


class KVStorage:
    """Keys and values of all layers. `key[layer]` and `value[layer]` are [slots, K, D]."""

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.page_size = page_size
        shape = (config.num_layers, 2, num_pages * page_size, config.num_kv_heads, config.head_dim)
        storage = _zeros(shape, device, dtype)
        self.num_bytes = storage.nbytes
        self.keys = tuple(layer[0] for layer in storage)
        self.values = tuple(layer[1] for layer in storage)

    def write(self, layer: int, slot_T: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> None:
        """Store a step's keys and values at their slots."""
        self.keys[layer].index_copy_(0, slot_T, key_TKD)
        self.values[layer].index_copy_(0, slot_T, value_TKD)

    def gather(self, layer: int, page: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of whole pages, [*page.shape[:-1], P * page_size, K, D] each."""
        heads = self.keys[layer].shape[1:]
        paged = (-1, self.page_size, *heads)
        flat = (*page.shape[:-1], page.shape[-1] * self.page_size, *heads)
        key, value = self.keys[layer].view(paged), self.values[layer].view(paged)
        return key[page].view(flat), value[page].view(flat)


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def paged_attention(
    kv: KVStorage, layer: int, batch: Batch, query_THD: Tensor, mask: Tensor | None
) -> Tensor:
    """Causal attention of each row over its own sequence; the step's keys are written already.

    `mask` comes from `decode_mask`, made once per step. Returns [T, H * D].
    """
    out_THD = torch.empty_like(query_THD)
    if batch.decode is not None:
        assert mask is not None
        num_rows = batch.decode.length_S.shape[0]
        out_THD[:num_rows] = _decode(kv, layer, batch.decode, query_THD[:num_rows], mask)
    for rows in batch.prompts:
        out_THD[rows.start : rows.end] = _prompt(kv, layer, rows, query_THD[rows.start : rows.end])
    return out_THD.flatten(1)


def decode_mask(batch: Batch, page_size: int, dtype: torch.dtype) -> Tensor | None:
    """Additive mask [S, 1, 1, L]: 0 where a row may look, -inf beyond its sequence's end."""
    if batch.decode is None:
        return None
    rows = batch.decode
    place_L = torch.arange(rows.page_SP.shape[1] * page_size, device=rows.page_SP.device)
    hidden_SL = place_L >= rows.length_S[:, None]
    zeros = torch.zeros(hidden_SL.shape, dtype=dtype, device=hidden_SL.device)
    return zeros.masked_fill_(hidden_SL, float("-inf"))[:, None, None]


def _decode(kv: KVStorage, layer: int, rows: DecodeRows, query_SHD: Tensor, mask: Tensor) -> Tensor:
    key_SLKD, value_SLKD = kv.gather(layer, rows.page_SP)
    num_kv_heads = key_SLKD.shape[2]
    # The query heads of one key head stand as rows of one query, so no key is repeated.
    query_SKGD = query_SHD.unflatten(1, (num_kv_heads, -1))
    out_SKGD = F.scaled_dot_product_attention(
        query_SKGD, key_SLKD.transpose(1, 2), value_SLKD.transpose(1, 2), attn_mask=mask
    )
    return out_SKGD.flatten(1, 2)


def _prompt(kv: KVStorage, layer: int, rows: PromptRows, query_THD: Tensor) -> Tensor:
    num_rows, length = query_THD.shape[0], rows.num_before + query_THD.shape[0]
    key_LKD, value_LKD = kv.gather(layer, rows.page_P)
    mask = None
    if rows.num_before:
        mask = torch.ones(num_rows, length, dtype=torch.bool, device=query_THD.device)
        mask = mask.tril_(rows.num_before)
    out_HTD = F.scaled_dot_product_attention(
        query_THD.transpose(0, 1)[None],
        key_LKD[:length].transpose(0, 1)[None],
        value_LKD[:length].transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return out_HTD[0].transpose(0, 1)


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros; on the CPU from calloc, so that pages never used take no memory."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
