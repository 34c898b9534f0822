"""Whatever bytes come in, the answer is an adapter or an AdapterError."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters import AdapterError, MalformedAdapterError
from adapters.compact import bank_from_bytes, blob_from_bytes
from adapters.peft_adapter import compact_from_files
from adapters.peft_files import PeftFiles
from adapters.safetensors_bytes import parse_safetensors, read_metadata
from core.model_config import BaseInfo

FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def build(header: Any, payload: bytes, header_bytes: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (
        (len(text) if header_bytes is None else header_bytes).to_bytes(8, "little") + text + payload
    )


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "short": b"\0" * 7,
    "huge_header": build({}, b"", 2**63),
    "header_past_end": build({}, b"", 100),
    "header_over_cap": build(b" " * (17 * 1024**2), b""),
    "not_json": build(b"{]", b""),
    "not_object": build([1], b""),
    "deep": build(b"[" * 50_000, b""),
    "truncated": build({"a": entry("F32", [4], 0, 16)}, b"\0" * 8),
    "overlap": build({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"\0" * 12),
    "hole": build({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, b"\0" * 12),
    "backwards": build({"a": entry("F32", [1], 4, 0)}, b"\0" * 4),
    "size_lie": build({"a": entry("F32", [3], 0, 8)}, b"\0" * 8),
    "overflow": build({"a": entry("F32", [2**62, 2**62], 0, 8)}, b"\0" * 8),
    "huge_empty": build({"a": entry("F32", [0, 2**62], 0, 0)}, b""),
    "odd_dtype": build({"a": entry("F8_E4M3", [4], 0, 4)}, b"\0" * 4),
    "no_dtype": build({"a": entry("F33", [1], 0, 4)}, b"\0" * 4),
    "negative": build({"a": entry("F32", [-1], 0, 4)}, b"\0" * 4),
    "many_dims": build({"a": entry("F32", [1] * 100, 0, 4)}, b"\0" * 4),
    "metadata_type": build({"__metadata__": {"a": 1}}, b""),
    "trailing": build({"a": entry("F32", [1], 0, 4)}, b"\0" * 8),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors(name: str) -> None:
    with pytest.raises(MalformedAdapterError):
        parse_safetensors(HOSTILE[name])


def test_a_complete_file_is_read() -> None:
    header = {
        "a": entry("BF16", [2], 0, 4),
        "b": entry("U8", [3, 0], 4, 4),
        "__metadata__": {"k": "v"},
    }
    data = build(header, b"\x80\x3f\0\0")
    tensors = parse_safetensors(data)
    assert tensors["a"].tolist() == [1, 0] and tensors["b"].shape == (3, 0)
    assert read_metadata(data) == {"k": "v"}


@st.composite
def mutated(draw: st.DrawFn, original: bytes) -> bytes:
    """A valid file with a few bytes changed, cut, or put in, mostly in its header."""
    data = bytearray(original)
    header_end = 8 + int.from_bytes(original[:8], "little")
    for _ in range(draw(st.integers(1, 4))):
        limit = draw(st.sampled_from([8, header_end, len(data)]))
        at = draw(st.integers(0, max(min(limit, len(data)) - 1, 0)))
        kind = draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        if kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 9))]
        else:
            del data[at:]
    return bytes(data)


@FUZZ
@given(data=st.data())
def test_mutated_adapters(data: st.DataObject, vblora_dirs: list[Path], base: BaseInfo) -> None:
    original = (vblora_dirs[0] / "adapter_model.safetensors").read_bytes()
    config = json.loads((vblora_dirs[0] / "adapter_config.json").read_text())
    changed = data.draw(mutated(original))
    with suppress(AdapterError):
        compact_from_files(PeftFiles(config, changed, {}), base)


@FUZZ
@given(data=st.data())
def test_mutated_blobs(data: st.DataObject, vblora_dirs: list[Path], base: BaseInfo) -> None:
    adapter = _compact(vblora_dirs[0], base)
    changed = data.draw(mutated(adapter.to_bytes()))
    for read in (blob_from_bytes, bank_from_bytes):
        with suppress(AdapterError):
            read(changed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("kind", ["vblora", "lora"])
def test_mutated_configs(
    data: st.DataObject, kind: str, vblora_dirs: list[Path], lora_dir: Path, base: BaseInfo
) -> None:
    path = lora_dir if kind == "lora" else vblora_dirs[0]
    config = json.loads((path / "adapter_config.json").read_text())
    weights = (path / "adapter_model.safetensors").read_bytes()
    keys = data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3))
    changed = {**config, **{key: data.draw(JSON) for key in keys}}
    with suppress(AdapterError):
        compact_from_files(PeftFiles(changed, weights, {}), base)


def _compact(path: Path, base: BaseInfo) -> Any:
    config = json.loads((path / "adapter_config.json").read_text())
    weights = (path / "adapter_model.safetensors").read_bytes()
    return compact_from_files(PeftFiles(config, weights, {}), base)
