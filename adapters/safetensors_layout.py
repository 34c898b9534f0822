"""Where the tensors of a safetensors file lie, so that many can be read by one gather.

The tensors of one dtype, in the order of the file, make one flat area. Two files with the same
header have the same layout. Knows nothing of adapters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.safetensors_bytes import DTYPES, split_header


class Place(NamedTuple):
    """A tensor: its dtype and shape, and the number of its first value in the area of its dtype."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def values_of(self, areas: Mapping[torch.dtype, Tensor]) -> Tensor:
        """The tensor, a view of its area."""
        return areas[self.dtype][self.start : self.start + prod(self.shape)].view(self.shape)

    def positions(self) -> Tensor:
        """The number of each of its values in the area, in the shape of the tensor."""
        return torch.arange(self.start, self.start + prod(self.shape)).view(self.shape)


@dataclass(frozen=True)
class SafetensorsLayout:
    """The places of all tensors by name, and the bytes of a file that make the areas."""

    places: Mapping[str, Place]
    runs: Mapping[torch.dtype, Sequence[slice]]

    def areas(self, data: bytes) -> dict[torch.dtype, Tensor]:
        """One flat tensor per dtype from a file of this layout; own memory."""
        view = memoryview(data)
        return {
            dtype: torch.frombuffer(bytearray().join(view[run] for run in runs), dtype=dtype)
            for dtype, runs in self.runs.items()
        }


def read_layout(data: bytes) -> SafetensorsLayout:
    """The layout of a file that `parse_safetensors` has accepted."""
    header, payload = split_header(data)
    entries: dict[str, Any] = json.loads(header)
    entries.pop("__metadata__", None)
    places: dict[str, Place] = {}
    runs: dict[torch.dtype, list[slice]] = {}
    num_values = dict.fromkeys(DTYPES.values(), 0)
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        places[name] = Place(dtype, shape, num_values[dtype])
        num_values[dtype] += prod(shape)
        begin, end = entry["data_offsets"]
        if end > begin:
            _extend(runs.setdefault(dtype, []), payload + begin, payload + end)
    return SafetensorsLayout(places, runs)


def _extend(runs: list[slice], begin: int, end: int) -> None:
    """Add bytes to the last run where they follow it, else as a run of their own."""
    if runs and runs[-1].stop == begin:
        begin = runs.pop().start
    runs.append(slice(begin, end))
