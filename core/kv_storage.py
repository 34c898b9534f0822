"""Keys and values in pages. Knows nothing of which pages belong to whom.

Shape legend: P pages, K key and value heads, D head dimension.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from core import huge_pages
from core.model_config import ModelConfig


class KVStorage:
    """Keys and values of all layers. `keys[layer]` and `values[layer]` are [slots, K, D].

    `layer_stride` counts the numbers from one layer's keys to the next one's, or values.
    """

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
        self._storage = storage = _zeros(shape, device, dtype)
        self.num_bytes = storage.nbytes
        self.layer_stride = storage.stride(0)
        self.keys = tuple(layer[0] for layer in storage)
        self.values = tuple(layer[1] for layer in storage)

    def clear(self, page_P: Tensor) -> None:
        """Zero whole pages of all layers.

        What another sequence left in a page is gathered with the tokens of the next one. It gets
        no weight, but 0 * inf is NaN.
        """
        if len(page_P):
            self._storage.unflatten(2, (-1, self.page_size))[:, :, page_P] = 0

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


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros; on the CPU written at once, so that no request waits for the system to find memory."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    room = huge_pages.empty(prod(shape) * dtype.itemsize)
    huge_pages.write_zeros(room, torch.get_num_threads())
    return room.view(dtype).view(shape)
