"""Bytes of a safetensors file → tensors, for files from strangers.

The safetensors library checks header, offsets and overlaps; here are the caps before it, and the
dtypes that torch can hold. Knows nothing of adapters.
"""

from __future__ import annotations

import json
from math import prod

import safetensors
import torch
from torch import Tensor

from adapters.errors import MalformedAdapterError

MAX_HEADER_BYTES = 16 * 1024**2
_MAX_DIM = 2**40

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def parse_safetensors(
    data: bytes, *, max_header_bytes: int = MAX_HEADER_BYTES
) -> dict[str, Tensor]:
    """The tensors (own memory, CPU) of a safetensors file.

    Raises MalformedAdapterError for anything that is not a complete, consistent file, for a header
    over `max_header_bytes`, and for dtypes other than the usual integers and floats.
    """
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header_bytes > len(data) - 8:
        raise MalformedAdapterError(
            f"not a safetensors file: header of {header_bytes} bytes in a file of {len(data)}"
        )
    if header_bytes > max_header_bytes:
        raise MalformedAdapterError(
            f"safetensors header of {header_bytes} bytes, at most {max_header_bytes} are read"
        )
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]  # a Rust function
    except safetensors.SafetensorError as error:
        raise MalformedAdapterError(f"not a safetensors file: {error}") from error
    return {name: _tensor(name, view) for name, view in entries}


def read_metadata(data: bytes) -> dict[str, str]:
    """The metadata of a file that `parse_safetensors` has accepted."""
    header: dict[str, dict[str, str]] = json.loads(split_header(data)[0])
    return header.get("__metadata__") or {}


def split_header(data: bytes) -> tuple[bytes, int]:
    """The header's JSON, and where the values begin, if the length at the file's start is true."""
    payload = 8 + int.from_bytes(data[:8], "little")
    return data[8:payload], payload


def _tensor(name: str, view: dict[str, object]) -> Tensor:
    dtype = DTYPES.get(str(view["dtype"]))
    if dtype is None:
        raise MalformedAdapterError(f"tensor {name!r} has dtype {view['dtype']}, which is not read")
    shape, data = view["shape"], view["data"]
    assert isinstance(shape, list) and isinstance(data, bytearray | bytes)
    if max(shape, default=0) > _MAX_DIM or len(shape) > 8:
        raise MalformedAdapterError(f"tensor {name!r} has the shape {shape}")
    if prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)
