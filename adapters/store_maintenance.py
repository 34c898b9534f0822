"""Where a store's files lie; garbage collection and integrity over all of them.

Every function that changes or checks files is called by the holder of the store's lock. Knows
nothing of registration.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from adapters.compact import bank_from_bytes, blob_from_bytes
from adapters.errors import MalformedAdapterError, StoreCorruptedError
from adapters.records import AdapterRecord, manifest_name

_SUFFIX = ".safetensors"
_STAGING_GRACE_SECONDS = 3600.0  # a writer may be between staging and its turn


@dataclass(frozen=True)
class StorePaths:
    """The names of a store's files."""

    root: Path

    @property
    def adapters(self) -> Path:
        """Compact forms by digest."""
        return self.root / "adapters"

    @property
    def banks(self) -> Path:
        """Banks by digest."""
        return self.root / "banks"

    @property
    def manifests(self) -> Path:
        """One file per id."""
        return self.root / "manifests"

    @property
    def staging(self) -> Path:
        """Files that have no name yet."""
        return self.root / "staging"

    @property
    def usage(self) -> Path:
        """The ledger."""
        return self.root / "usage.json"

    @property
    def lock(self) -> Path:
        """The lock between writers."""
        return self.root / "lock"

    @property
    def directories(self) -> tuple[Path, ...]:
        """Every directory of the store."""
        return (self.adapters, self.banks, self.manifests, self.staging)

    def adapter(self, digest: str) -> Path:
        """The blob of a compact form."""
        return self.adapters / f"{digest}{_SUFFIX}"

    def bank(self, digest: str) -> Path:
        """The blob of a bank."""
        return self.banks / f"{digest}{_SUFFIX}"

    def blobs_of(self, record: AdapterRecord) -> Iterator[Path]:
        """The blobs that a record refers to."""
        yield self.adapter(record.digest)
        if record.bank_digest is not None:
            yield self.bank(record.bank_digest)

    def touch_blobs(self, record: AdapterRecord) -> None:
        """Start the grace of a record's blobs now: its name is about to let go of them."""
        for path in self.blobs_of(record):
            with suppress(FileNotFoundError):
                os.utime(path)


class Garbage(NamedTuple):
    """What a collection deleted."""

    num_files: int
    num_bytes: int


def file_names(directory: Path) -> list[str]:
    """The names in a directory, sorted."""
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries)


def collect_garbage(
    paths: StorePaths, records: Collection[AdapterRecord], grace_seconds: float
) -> Garbage:
    """Delete unreferenced blobs untouched for the grace, and what killed writers left."""
    referenced = {path for record in records for path in paths.blobs_of(record)}
    deleted: list[int] = []
    for directory in (paths.adapters, paths.banks):
        unreferenced = (directory / name for name in file_names(directory))
        deleted += _delete_old((p for p in unreferenced if p not in referenced), grace_seconds)
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
    for name in file_names(paths.adapters):
        _check_blob(paths.adapters / name)
    for name in file_names(paths.banks):
        _check_blob(paths.banks / name)
    for record in records:
        for path in paths.blobs_of(record):
            if not path.is_file():
                raise StoreCorruptedError(f"adapter {record.id!r} lacks its blob {path.name}")
        if not (paths.manifests / manifest_name(record.id)).is_file():
            raise StoreCorruptedError(f"the manifest of {record.id!r} has another id's file name")


def _check_blob(path: Path) -> None:
    data = path.read_bytes()
    try:
        is_bank = path.parent.name == "banks"
        digest = bank_from_bytes(data).digest if is_bank else blob_from_bytes(data).digest
    except MalformedAdapterError as error:
        raise StoreCorruptedError(f"{path.name} is unreadable: {error}") from error
    if digest != path.name.removesuffix(_SUFFIX):
        raise StoreCorruptedError(f"{path.name} has the content of {digest}")
