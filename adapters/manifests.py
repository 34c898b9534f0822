"""Records by manifest, read only when another process has changed them.

A manifest is replaced, never written in place, so its stat tells its versions apart: one stat per
look, no lock. Knows nothing of blobs.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from adapters.errors import StoreCorruptedError
from adapters.records import AdapterRecord
from adapters.store_paths import file_names
from adapters.usage_ledger import Usage

logger = logging.getLogger(__name__)


class _Version(NamedTuple):
    """What tells one version of a manifest from another."""

    mtime_ns: int
    inode: int
    size: int


class Manifests:
    """The manifests of one directory. Safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._records: dict[str, tuple[_Version, AdapterRecord]] = {}

    def read(self, name: str) -> AdapterRecord | None:
        """The record in a manifest as of now; None if there is none. Raises StoreCorruptedError."""
        path = self._directory / name
        cached = self._records.get(name)
        try:
            if cached is not None and cached[0] == _version(path.stat()):
                return cached[1]
            with path.open("rb") as stream:
                version = _version(os.fstat(stream.fileno()))
                record = AdapterRecord.from_json(stream.read())
        except FileNotFoundError:
            self._records.pop(name, None)
            return None
        self._records[name] = (version, record)
        return record

    def read_all(self, *, skip_damaged: bool = False) -> list[AdapterRecord]:
        """All records, sorted by id. Raises StoreCorruptedError, or logs and skips what is damaged.

        Who deletes what no record names must not skip.
        """
        names = file_names(self._directory)
        known = list(self._records)  # at once: other threads add to it
        for gone in set(known).difference(names):
            self._records.pop(gone, None)
        read = self._read_if_sound if skip_damaged else self.read
        found = (read(name) for name in names)
        return sorted((record for record in found if record), key=lambda record: record.id)

    def _read_if_sound(self, name: str) -> AdapterRecord | None:
        try:
            return self.read(name)
        except StoreCorruptedError as error:
            logger.error("%s in %s is left out: %s", name, self._directory, error)
            return None

    def digest(self, name: str) -> str | None:
        """The digest in a manifest; None if there is none."""
        record = self.read(name) if name else None
        return record.digest if record is not None else None

    def count(self) -> Usage:
        """Totals over all records."""
        records = self.read_all(skip_damaged=True)
        return Usage(len(records), sum(record.compact_bytes for record in records))


def _version(info: os.stat_result) -> _Version:
    return _Version(info.st_mtime_ns, info.st_ino, info.st_size)
