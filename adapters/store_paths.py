"""Where the files of a store lie. Knows nothing of what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.records import AdapterRecord

_ADAPTER_SUFFIX = ".adapter.safetensors"
BANK_SUFFIX = ".bank.safetensors"


@dataclass(frozen=True)
class StorePaths:
    """The names of a store's files."""

    root: Path

    @property
    def blobs(self) -> Path:
        """Compact forms and banks by digest."""
        return self.root / "blobs"

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
        return (self.blobs, self.manifests, self.staging)

    def adapter(self, digest: str) -> Path:
        """The blob of a compact form."""
        return self.blobs / f"{digest}{_ADAPTER_SUFFIX}"

    def bank(self, digest: str) -> Path:
        """The blob of a bank."""
        return self.blobs / f"{digest}{BANK_SUFFIX}"

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


def file_names(directory: Path) -> list[str]:
    """The names in a directory, sorted."""
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries)
