"""Garbage collection and integrity over all files of a store.

Every function that changes or checks files is called by the holder of the store's lock. Knows
nothing of registration.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from adapters.compact import bank_from_bytes, blob_from_bytes
from adapters.errors import MalformedAdapterError, StoreCorruptedError
from adapters.records import AdapterRecord, manifest_name
from adapters.store_paths import BANK_SUFFIX, StorePaths, file_names

_STAGING_GRACE_SECONDS = 3600.0  # a writer may be between staging and its turn


class Garbage(NamedTuple):
    """What a collection deleted."""

    num_files: int
    num_bytes: int


def collect_garbage(
    paths: StorePaths, records: Collection[AdapterRecord], grace_seconds: float
) -> Garbage:
    """Delete unreferenced blobs untouched for the grace, and what killed writers left."""
    referenced = {path for record in records for path in paths.blobs_of(record)}
    deleted: list[int] = []
    blobs = (paths.blobs / name for name in file_names(paths.blobs))
    deleted += _delete_old((path for path in blobs if path not in referenced), grace_seconds)
    staged = (paths.staging / name for name in file_names(paths.staging))
    deleted += _delete_old(staged, max(grace_seconds, _STAGING_GRACE_SECONDS))
    return Garbage(len(deleted), sum(deleted))


def _delete_old(files: Iterator[Path], grace_seconds: float) -> Iterator[int]:
    """Delete the files older than the grace; their sizes in bytes."""
    latest = time.time() - grace_seconds
    for path in files:
        with suppress(FileNotFoundError):  # a staged file may just have got its name
            info = path.stat()
            if info.st_mtime <= latest:
                path.unlink()
                yield info.st_size


def check_integrity(paths: StorePaths, records: Collection[AdapterRecord]) -> None:
    """Every blob has the content of its name; every name has its blobs and its own manifest."""
    for name in file_names(paths.blobs):
        _check_blob(paths.blobs / name)
    for record in records:
        for path in paths.blobs_of(record):
            if not path.is_file():
                raise StoreCorruptedError(f"adapter {record.id!r} lacks its blob {path.name}")
        if not (paths.manifests / manifest_name(record.id)).is_file():
            raise StoreCorruptedError(f"the manifest of {record.id!r} has another id's file name")


def _check_blob(path: Path) -> None:
    data = path.read_bytes()
    try:
        is_bank = path.name.endswith(BANK_SUFFIX)
        digest = bank_from_bytes(data).digest if is_bank else blob_from_bytes(data).digest
    except MalformedAdapterError as error:
        raise StoreCorruptedError(f"{path.name} is unreadable: {error}") from error
    if digest != path.name.partition(".")[0]:
        raise StoreCorruptedError(f"{path.name} has the content of {digest}")
