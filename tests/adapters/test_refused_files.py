"""Files that are missing, too large, of another kind or elsewhere: refused by name and reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adapters import (
    AdapterTooLargeError,
    MalformedAdapterError,
    UnsupportedAdapterError,
    read_peft_adapter,
)
from core.model_config import BaseInfo


def test_other_files_are_ignored(vblora: Path, base: BaseInfo) -> None:
    before = read_peft_adapter(vblora, base).digest
    for name in ("README.md", "training_args.bin", "optimizer.pt"):
        (vblora / name).write_text("not for us")
    assert read_peft_adapter(vblora, base).digest == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.bin", "adapter_model.bin: pickled weights are not read"),
        ("adapter_model-00001-of-00002.safetensors", "a second weights file"),
        ("other.safetensors", "other.safetensors: a second weights file"),
    ],
)
def test_other_weights_are_refused_by_name(
    name: str, message: str, vblora: Path, base: BaseInfo
) -> None:
    (vblora / name).write_bytes(b"x")
    with pytest.raises(UnsupportedAdapterError, match=message):
        read_peft_adapter(vblora, base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file(name: str, vblora: Path, base: BaseInfo) -> None:
    (vblora / name).unlink()
    with pytest.raises(MalformedAdapterError, match=f"{name} is missing"):
        read_peft_adapter(vblora, base)


def test_a_missing_directory(base: BaseInfo, tmp_path: Path) -> None:
    with pytest.raises(MalformedAdapterError, match="not a readable directory"):
        read_peft_adapter(tmp_path / "nowhere", base)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "\ud800".encode("utf-8", "surrogatepass"), "[" * 100_000]
)
def test_a_config_that_is_no_json_object(text: str | bytes, vblora: Path, base: BaseInfo) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    (vblora / "adapter_config.json").write_bytes(data)
    with pytest.raises(MalformedAdapterError, match=r"is not (a )?JSON"):
        read_peft_adapter(vblora, base)


def test_files_over_their_caps_are_not_read(vblora: Path, base: BaseInfo) -> None:
    with pytest.raises(AdapterTooLargeError, match=r"adapter_config.json has \d+ bytes, at most 9"):
        read_peft_adapter(vblora, base, max_config_bytes=9)
    with pytest.raises(AdapterTooLargeError, match=r"adapter_model.safetensors has \d+ bytes"):
        read_peft_adapter(vblora, base, max_weights_bytes=9)


def test_a_pipe_neither_blocks_nor_passes(vblora: Path, base: BaseInfo) -> None:
    (vblora / "adapter_model.safetensors").unlink()
    os.mkfifo(vblora / "adapter_model.safetensors")
    with pytest.raises(MalformedAdapterError, match="not a regular file"):
        read_peft_adapter(vblora, base)


def test_links_may_not_lead_out_of_the_allowed_root(
    vblora: Path, vblora_dirs: list[Path], base: BaseInfo, tmp_path: Path
) -> None:
    weights = vblora / "adapter_model.safetensors"
    inside = tmp_path / "blob"
    weights.rename(inside)
    weights.symlink_to(inside)
    read_peft_adapter(vblora, base, allowed_root=tmp_path)  # as in a Hugging Face cache
    weights.unlink()
    weights.symlink_to(vblora_dirs[0] / weights.name)
    read_peft_adapter(vblora, base)
    with pytest.raises(MalformedAdapterError, match="leads outside"):
        read_peft_adapter(vblora, base, allowed_root=tmp_path)


def test_json_constants_do_not_get_through(vblora: Path, base: BaseInfo) -> None:
    config = json.loads((vblora / "adapter_config.json").read_text())
    text = json.dumps({**config, "r": float("inf")})
    (vblora / "adapter_config.json").write_text(text)
    with pytest.raises(MalformedAdapterError, match="r is inf"):
        read_peft_adapter(vblora, base)
