"""AdapterStore: names, contents, limits, other processes' changes, damage."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters import (
    AdapterExistsError,
    AdapterStore,
    AdapterTooLargeError,
    CompactLoRA,
    InvalidAdapterIdError,
    MalformedAdapterError,
    StoreLimits,
    UnknownAdapterError,
    WrongBaseError,
    rebuild_factors,
)
from adapters.records import manifest_name
from adapters.store_maintenance import Garbage
from core.model_config import BaseInfo

Numbered = Callable[[int], CompactLoRA]


def test_the_way_of_an_adapter(store: AdapterStore, vblora_dirs: list[Path]) -> None:
    before = int(time.time())
    record, created = store.add("team/json:1", vblora_dirs[0])
    assert created and store.resolve("team/json:1") == record and store.records() == [record]
    assert (record.kind, record.rank, record.num_modules) == ("vblora", 4, 14)
    assert record.targets[0] == "q_proj" and len(record.targets) == 7
    assert before <= record.created <= time.time()
    assert set(record.source_files) == {"adapter_config.json", "adapter_model.safetensors"}
    adapter = store.load(record.digest)
    assert adapter.digest == record.digest
    assert rebuild_factors(adapter).num_bytes == record.factor_bytes == adapter.factor_bytes
    assert record.compact_bytes < record.factor_bytes
    store.check_integrity()


def test_the_same_content_again_changes_nothing(
    store: AdapterStore, vblora_dirs: list[Path]
) -> None:
    first = store.add("a", vblora_dirs[0])
    files = {path: path.stat().st_mtime_ns for path in store.root.rglob("*") if path.is_file()}
    again = store.add("a", vblora_dirs[0])
    assert again == (first.record, False)
    files.pop(store.root / "lock")
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in files.items())
    assert not list((store.root / "staging").iterdir())


def test_other_content_needs_replace(store: AdapterStore, vblora_dirs: list[Path]) -> None:
    old = store.add("a", vblora_dirs[0]).record
    with pytest.raises(AdapterExistsError, match="'a' exists with other content"):
        store.add("a", vblora_dirs[1])
    assert store.resolve("a") == old and not list((store.root / "staging").iterdir())
    new, created = store.add("a", vblora_dirs[1], replace=True)
    assert created and store.resolve("a") == new and new.digest != old.digest
    assert store.load(old.digest).digest == old.digest  # for those who hold the digest
    assert store.usage() == (1, new.compact_bytes)


def test_a_refused_adapter_leaves_nothing(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(MalformedAdapterError):
        store.add("a", tmp_path)
    assert store.records() == [] and not list((store.root / "blobs").iterdir())


def test_equal_banks_are_stored_and_held_once(store: AdapterStore, vblora_dirs: list[Path]) -> None:
    one, two, other = (store.add(str(n), path).record for n, path in enumerate(vblora_dirs))
    assert one.bank_digest == two.bank_digest != other.bank_digest
    assert len(list((store.root / "blobs").glob("*.bank.safetensors"))) == 2
    first, second = store.load(one.digest), store.load(two.digest)
    assert first.bank is second.bank
    assert store.banks.num_bytes == first.bank.num_bytes


def test_one_content_under_two_names_is_stored_once(
    store: AdapterStore, numbered: Numbered
) -> None:
    records = [store.add_compact(name, numbered(1)).record for name in ("a", "b")]
    assert records[0].digest == records[1].digest
    assert len(list((store.root / "blobs").iterdir())) == 1


GOOD_IDS = ["a", "A", "0", "team/adapter", "x:1.2_3-4", "a" * 128, "a/b/c", "a..b"]
BAD_IDS = [
    "",
    "-a",
    ".",
    "..",
    "a/../b",
    "a//b",
    "/a",
    "a/",
    "a b",
    "a\n",
    "ä",
    "a" * 129,
    "a\0",
    "a%2f",
]


@pytest.mark.parametrize("adapter_id", GOOD_IDS)
def test_ids_that_are_served(adapter_id: str, store: AdapterStore, numbered: Numbered) -> None:
    store.add_compact(adapter_id, numbered(1))
    assert [record.id for record in store.records()] == [adapter_id]
    assert len(os.fsencode(manifest_name(adapter_id))) <= 120


@pytest.mark.parametrize("adapter_id", BAD_IDS)
def test_ids_that_are_refused(adapter_id: str, store: AdapterStore, numbered: Numbered) -> None:
    for call in (
        lambda: store.add_compact(adapter_id, numbered(1)),
        lambda: store.record(adapter_id),
    ):
        with pytest.raises(InvalidAdapterIdError, match="1 to 128 characters"):
            call()


def test_ids_that_differ_in_case_or_signs_are_different(
    store: AdapterStore, numbered: Numbered
) -> None:
    names = ["a/b", "a_b", "A/b", "a:b", "a.b"]
    for number, name in enumerate(names):
        store.add_compact(name, numbered(number))
    assert len({manifest_name(name).lower() for name in names}) == len(names)
    assert [record.id for record in store.records()] == sorted(names)


def test_the_name_of_the_base_is_reserved(
    tmp_path: Path, base: BaseInfo, numbered: Numbered
) -> None:
    store = AdapterStore.open(tmp_path / "s", base, reserved_ids=["tiny"])
    with pytest.raises(InvalidAdapterIdError, match="'tiny' is the name of the base"):
        store.add_compact("tiny", numbered(1))


def test_unknown_names_and_digests(store: AdapterStore) -> None:
    for call in (store.resolve, store.record, store.remove):
        with pytest.raises(UnknownAdapterError, match="no adapter has the id 'a'"):
            call("a")
    for digest in ("0" * 64, "x", "../../etc/passwd"):
        with pytest.raises(UnknownAdapterError):
            store.load(digest)


# other processes


def test_changes_of_another_process_are_seen_at_once(
    store: AdapterStore, base: BaseInfo, numbered: Numbered
) -> None:
    other = AdapterStore.open(store.root, base)
    for number in range(20):  # fast enough for several in one tick of the kernel's clock
        record = other.add_compact("a", numbered(number), replace=True).record
        assert store.resolve("a") == record
    other.remove("a")
    with pytest.raises(UnknownAdapterError):
        store.resolve("a")
    assert store.records() == []


def test_resolving_an_unchanged_name_reads_no_file(
    store: AdapterStore, numbered: Numbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = store.add_compact("a", numbered(1)).record
    assert store.resolve("a") == record
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: pytest.fail("opened a file"))
    assert store.resolve("a") == record


def test_no_directory_is_listed_by_adding(
    store: AdapterStore, numbered: Numbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_compact("first", numbered(0))
    monkeypatch.setattr(os, "scandir", lambda *args: pytest.fail("listed a directory"))
    store.add_compact("a", numbered(1))
    store.add_compact("a", numbered(2), replace=True)
    store.remove("a")


def test_a_reopened_store_has_everything(
    store: AdapterStore, base: BaseInfo, vblora_dirs: list[Path], lora_dir: Path
) -> None:
    records = [store.add(path.name, path).record for path in (*vblora_dirs, lora_dir)]
    again = AdapterStore.open(store.root, base)
    assert again.records() == sorted(records, key=lambda record: record.id)
    for record in records:
        assert again.load(again.resolve(record.id).digest).digest == record.digest
    assert again.usage() == store.usage()


def test_an_adapter_of_another_base_is_listed_but_not_served(
    store: AdapterStore, base: BaseInfo, vblora_dirs: list[Path]
) -> None:
    record = store.add("a", vblora_dirs[0]).record
    other = AdapterStore.open(store.root, BaseInfo(base.path, base.config, "f" * 64))
    assert other.records() == [record] and other.record("a") == record
    with pytest.raises(WrongBaseError, match=f"registered for base {base.fingerprint[:12]}"):
        other.resolve("a")
    with pytest.raises(WrongBaseError):
        other.load(record.digest)
    other.check_integrity()
    replaced = other.add("a", vblora_dirs[0], replace=True)
    assert replaced.created and other.resolve("a").digest != record.digest


# limits


def test_limits(
    tmp_path: Path, base: BaseInfo, numbered: Numbered, vblora_dirs: list[Path]
) -> None:
    size = numbered(0).num_bytes
    limits = StoreLimits(max_adapters=2, max_total_compact_bytes=2 * size, max_rank=3)
    store = AdapterStore.open(tmp_path / "s", base, limits=limits)
    with pytest.raises(AdapterTooLargeError, match="rank 4 is over the limit of 3"):
        store.add("v", vblora_dirs[0])
    store.add_compact("a", numbered(0))
    store.add_compact("b", numbered(1))
    with pytest.raises(AdapterTooLargeError, match="2 adapters are registered"):
        store.add_compact("c", numbered(2))
    store.add_compact("b", numbered(2), replace=True)
    store.remove("a")
    store.add_compact("c", numbered(3))
    assert store.usage() == (2, 2 * size)


def test_limit_of_bytes(tmp_path: Path, base: BaseInfo, numbered: Numbered) -> None:
    limits = StoreLimits(max_total_compact_bytes=2 * numbered(0).num_bytes - 1)
    store = AdapterStore.open(tmp_path / "s", base, limits=limits)
    store.add_compact("a", numbered(0))
    with pytest.raises(AdapterTooLargeError, match=r"would hold \d+ bytes, at most \d+"):
        store.add_compact("b", numbered(1))
    assert [record.id for record in store.records()] == ["a"]


def test_limits_of_files(tmp_path: Path, base: BaseInfo, vblora_dirs: list[Path]) -> None:
    for name, limits in {
        "adapter_config.json": StoreLimits(max_config_bytes=10),
        "adapter_model.safetensors": StoreLimits(max_upload_bytes=10),
    }.items():
        store = AdapterStore.open(tmp_path / name, base, limits=limits)
        with pytest.raises(AdapterTooLargeError, match=f"{name} has .* at most 10 are allowed"):
            store.add("a", vblora_dirs[0])


def test_the_ledger_after_a_kill_between_note_and_change(
    store: AdapterStore, numbered: Numbered
) -> None:
    store.add_compact("a", numbered(1))
    usage = store.usage()
    store._ledger.begin(usage, usage.plus(10**9), manifest_name("b"), "f" * 64)
    assert store.usage() == usage
    store._ledger.begin(usage, usage.minus(usage.compact_bytes), manifest_name("a"), None)
    assert store.usage() == usage
    (store.root / "usage.json").write_text("{")
    assert store.usage() == usage
    store.add_compact("b", numbered(2))
    assert store.usage() == store._manifests.count()


# garbage


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_the_grace_counts_from_the_last_name(store: AdapterStore, vblora_dirs: list[Path]) -> None:
    one, two, _ = (store.add(path.name, path).record for path in vblora_dirs)
    for blob in (store.root / "blobs").iterdir():
        age(blob, 1000)
    store.remove(vblora_dirs[0].name)
    assert store.collect_garbage(500) == Garbage(0, 0)
    assert store.load(one.digest).digest == one.digest
    store.add("again", vblora_dirs[0])
    assert store.collect_garbage(0).num_files == 0
    store.remove("again")
    assert store.collect_garbage(0).num_files == 1  # the bank has another user
    with pytest.raises(UnknownAdapterError):
        store.load(one.digest)
    assert store.load(two.digest).digest == two.digest
    store.check_integrity()


def test_what_killed_writers_left_is_collected(store: AdapterStore) -> None:
    fresh, old = store.root / "staging" / "fresh", store.root / "staging" / "old"
    for path in (fresh, old):
        path.write_bytes(b"x")
    age(old, 4000)
    assert store.collect_garbage(0) == Garbage(1, 1)
    assert fresh.exists() and not old.exists()


def test_a_collector_that_is_faster_than_the_lock(
    store: AdapterStore, numbered: Numbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blob was there when the writer looked, and is gone when it is the writer's turn."""
    store.add_compact("a", numbered(1))
    store.remove("a")
    stage = store._stage

    def stage_then_collect(*args: object) -> dict[Path, Path]:
        monkeypatch.undo()
        staged = stage(*args)  # type: ignore[arg-type]
        assert len(staged) == 1  # the manifest alone
        assert store.collect_garbage(0).num_files == 1
        return staged

    monkeypatch.setattr(store, "_stage", stage_then_collect)
    record = store.add_compact("b", numbered(1)).record
    assert store.load(record.digest).digest == record.digest
    assert not list((store.root / "staging").iterdir())
