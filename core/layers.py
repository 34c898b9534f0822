"""The seam behind which a forward's layers are computed, with two implementations.

`torch_layers.TorchLayers` runs anywhere that torch does and is the slow twin of
`kernels.cpu_layers.CpuLayers`.

Shape legend: T rows of the step, R rows that want logits, H hidden size, D head dimension.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from core.batch import Batch
from core.kv_storage import KVStorage


class Layers(Protocol):
    """All decoder layers and the norm after them, on the model's device in its dtype."""

    def forward(
        self, x_TH: Tensor, cos_sin: tuple[Tensor, Tensor], batch: Batch, kv: KVStorage
    ) -> Tensor:
        """Write the rows' keys and values into `kv`; return normed outputs [R, H].

        x_TH      embeddings of the rows; used up
        cos_sin   [T, D] each, see `Rotary.tables`

        Each row gets the increments of its adapter, see `Batch.adapter_rows`; the outputs are
        those of `batch.head_row_R`, which ascends.
        """
        ...

    @property
    def adapter_bytes(self) -> int:
        """Bytes held for adapters besides the leased factors themselves."""
        ...

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        ...
