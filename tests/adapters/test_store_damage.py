"""AdapterStore: what is damaged on disk is noticed, and harms nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters import (
    AdapterStore,
    CompactLoRA,
    StoreCorruptedError,
)
from adapters.records import manifest_name

Numbered = Callable[[int], CompactLoRA]


def blob(store: AdapterStore, suffix: str) -> Path:
    (path,) = (store.root / "blobs").glob(f"*.{suffix}.safetensors")
    return path


@pytest.mark.parametrize("suffix", ["adapter", "bank"])
def test_a_flipped_bit_is_noticed(
    suffix: str, store: AdapterStore, vblora_dirs: list[Path]
) -> None:
    record = store.add("a", vblora_dirs[0]).record
    path = blob(store, suffix)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreCorruptedError, match="has the content of"):
        store.load(record.digest)
    with pytest.raises(StoreCorruptedError, match="has the content of"):
        store.check_integrity()


@pytest.mark.parametrize("suffix", ["adapter", "bank"])
def test_a_cut_blob_is_noticed(suffix: str, store: AdapterStore, vblora_dirs: list[Path]) -> None:
    record = store.add("a", vblora_dirs[0]).record
    path = blob(store, suffix)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StoreCorruptedError):
        store.load(record.digest)
    with pytest.raises(StoreCorruptedError, match="is unreadable"):
        store.check_integrity()


def test_a_missing_blob_is_noticed(store: AdapterStore, vblora_dirs: list[Path]) -> None:
    record = store.add("a", vblora_dirs[0]).record
    blob(store, "bank").unlink()
    with pytest.raises(StoreCorruptedError, match=r"bank .* is missing"):
        store.load(record.digest)
    with pytest.raises(StoreCorruptedError, match="'a' lacks its blob"):
        store.check_integrity()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}'])
def test_a_damaged_manifest_is_noticed(text: str, store: AdapterStore, numbered: Numbered) -> None:
    store.add_compact("a", numbered(1))
    (store.root / "manifests" / manifest_name("a")).write_text(text)
    with pytest.raises(StoreCorruptedError, match="not a manifest"):
        store.resolve("a")


def test_a_damaged_manifest_hides_no_other_and_stops_the_garbage_collector(
    store: AdapterStore, numbered: Numbered
) -> None:
    for name in ("a", "b"):
        store.add_compact(name, numbered(ord(name)))
    (store.root / "manifests" / manifest_name("a")).write_text("{}")
    assert [record.id for record in store.records()] == ["b"]
    store.add_compact("c", numbered(3))
    with pytest.raises(StoreCorruptedError):
        store.collect_garbage(grace_seconds=0)
    with pytest.raises(StoreCorruptedError):
        store.check_integrity()


def test_a_manifest_under_another_name_is_noticed(store: AdapterStore, numbered: Numbered) -> None:
    store.add_compact("a", numbered(1))
    manifests = store.root / "manifests"
    (manifests / manifest_name("a")).rename(manifests / manifest_name("b"))
    with pytest.raises(StoreCorruptedError, match="has another id's file name"):
        store.check_integrity()


def test_the_manifest_is_json_for_people(store: AdapterStore, numbered: Numbered) -> None:
    record = store.add_compact("Team/a", numbered(1)).record
    (path,) = (store.root / "manifests").iterdir()
    assert path.name.startswith("team_a.")
    assert json.loads(path.read_text())["digest"] == record.digest
