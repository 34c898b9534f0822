"""`AdapterStore`: adapters by name in a directory that several processes may have open at once.

    adapters/<digest>.safetensors   compact forms   immutable, named by content
    banks/<digest>.safetensors      vector banks    immutable, named by content
    manifests/<id>.json             one per name, replaced atomically; the truth about names
    staging/                        files on their way; left-overs of killed writers
    usage.json, lock                totals for the limits; the lock between writers

A registration is on the disk before `add` returns. Writers take turns; readers take no lock and see
another process's change at once, since each `resolve` looks at the manifest's stat. No operation
lists a directory except `records`, `collect_garbage` and `check_integrity`.

Knows nothing of HTTP, of other replicas, or of who may register what.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from adapters import store_maintenance
from adapters.bank_pool import Bank, BankPool
from adapters.compact import (
    CompactAdapter,
    bank_from_bytes,
    bank_to_bytes,
    blob_from_bytes,
)
from adapters.durable_files import (
    exclusive_lock,
    make_directory,
    publish,
    sync_directory,
    write_staged,
)
from adapters.errors import (
    AdapterExistsError,
    AdapterTooLargeError,
    MalformedAdapterError,
    StoreCorruptedError,
    UnknownAdapterError,
    WrongBaseError,
)
from adapters.peft_adapter import MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES, compact_from_files
from adapters.peft_files import read_peft_files
from adapters.records import AdapterRecord, check_adapter_id, manifest_name, record_of
from adapters.usage_ledger import Usage, UsageLedger
from core.model_config import BaseInfo

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoreLimits:
    """What a store accepts.

    max_upload_bytes         size of an adapter's weights file
    max_config_bytes         size of its config
    max_rank                 largest rank of any module
    max_adapters             registered names
    max_total_compact_bytes  sum of all compact forms, a bank counted for each adapter that uses it
    """

    max_upload_bytes: int = MAX_WEIGHTS_BYTES
    max_config_bytes: int = MAX_CONFIG_BYTES
    max_rank: int = 256
    max_adapters: int = 100_000
    max_total_compact_bytes: int = 64 * 1024**3


class AddResult(NamedTuple):
    """The record under the id now; `created` is False if it was there with the same content."""

    record: AdapterRecord
    created: bool


class _Stat(NamedTuple):
    """What tells one version of a manifest from another."""

    mtime_ns: int
    inode: int
    size: int


class AdapterStore:
    """See the module. Open one with `AdapterStore.open`; safe to use from several threads."""

    def __init__(
        self, root: Path, base: BaseInfo, limits: StoreLimits, reserved_ids: Collection[str]
    ) -> None:
        self.root = root
        self.base = base
        self.limits = limits
        self.banks = BankPool()
        self._reserved_ids = frozenset(reserved_ids)
        self._paths = store_maintenance.StorePaths(root)
        self._records: dict[str, tuple[_Stat, AdapterRecord]] = {}  # by manifest's file name
        self._ledger = UsageLedger(
            self._paths.usage, self._paths.staging, self._current_digest, self._count
        )

    @classmethod
    def open(
        cls,
        root: Path | str,
        base: BaseInfo,
        *,
        limits: StoreLimits | None = None,
        reserved_ids: Collection[str] = (),
    ) -> AdapterStore:
        """Open a store, creating it if there is none. `reserved_ids` may not name an adapter."""
        store = cls(Path(root), base, limits or StoreLimits(), reserved_ids)
        for directory in store._paths.directories:
            make_directory(directory)
        return store

    def add(
        self,
        adapter_id: str,
        directory: Path | str,
        *,
        replace: bool = False,
        allowed_root: Path | None = None,
    ) -> AddResult:
        """Register a PEFT directory under an id, durably.

        `allowed_root`: the directory's files must lie under it once links are followed.
        Raises InvalidAdapterIdError, MalformedAdapterError, UnsupportedAdapterError,
        AdapterTooLargeError, or AdapterExistsError if the id has other content and not `replace`.
        """
        check_adapter_id(adapter_id, self._reserved_ids)
        files = read_peft_files(
            directory,
            max_config_bytes=self.limits.max_config_bytes,
            max_weights_bytes=self.limits.max_upload_bytes,
            allowed_root=allowed_root,
        )
        adapter = compact_from_files(files, self.base)
        return self.add_compact(adapter_id, adapter, source_files=files.sizes, replace=replace)

    def add_compact(
        self,
        adapter_id: str,
        adapter: CompactAdapter,
        *,
        source_files: Mapping[str, int] | None = None,
        replace: bool = False,
    ) -> AddResult:
        """Register a compact form under an id; as `add`."""
        check_adapter_id(adapter_id, self._reserved_ids)
        if adapter.max_rank > self.limits.max_rank:
            raise AdapterTooLargeError(
                f"rank {adapter.max_rank} is over the limit of {self.limits.max_rank}"
            )
        record = record_of(adapter_id, adapter, source_files or {}, int(time.time()))
        # the slow part, before the lock; blobs that are there already need no writing
        staged = self._stage_blobs(adapter)
        with exclusive_lock(self._paths.lock):
            return self._register(record, adapter, staged, replace=replace)

    def record(self, adapter_id: str) -> AdapterRecord:
        """The record under an id, for whichever base. Raises UnknownAdapterError."""
        check_adapter_id(adapter_id)
        record = self._read_record(manifest_name(adapter_id))
        if record is None:
            raise UnknownAdapterError(f"no adapter has the id {adapter_id!r}")
        return record

    def resolve(self, adapter_id: str) -> AdapterRecord:
        """The record under an id that this base serves, as of now.

        Raises UnknownAdapterError, WrongBaseError, or InvalidAdapterIdError.
        """
        record = self.record(adapter_id)
        if record.base_fingerprint != self.base.fingerprint:
            raise WrongBaseError(
                f"adapter {adapter_id!r} was registered for base {record.base_fingerprint[:12]}, "
                f"this one is {self.base.fingerprint[:12]}"
            )
        return record

    def records(self) -> list[AdapterRecord]:
        """All records, of whichever base, sorted by id."""
        names = store_maintenance.file_names(self._paths.manifests)
        for gone in self._records.keys() - set(names):
            self._records.pop(gone, None)
        found = (self._read_record(name) for name in names)
        return sorted((record for record in found if record), key=lambda record: record.id)

    def remove(self, adapter_id: str) -> AdapterRecord:
        """Remove a name, durably; its content stays for those who hold the digest, until
        `collect_garbage`. Raises UnknownAdapterError.
        """
        with exclusive_lock(self._paths.lock):
            record = self.record(adapter_id)
            name = manifest_name(adapter_id)
            before = self._ledger.current()
            after = Usage(before.num_adapters - 1, before.compact_bytes - record.compact_bytes)
            self._ledger.begin(before, after, name, None)
            self._paths.touch_blobs(record)
            (self._paths.manifests / name).unlink()
            sync_directory(self._paths.manifests)
        return record

    def load(self, digest: str) -> CompactAdapter:
        """The compact form of a digest, registered under a name or not, verified against its hash.

        Raises UnknownAdapterError, WrongBaseError or StoreCorruptedError.
        """
        if not _DIGEST.fullmatch(digest):
            raise UnknownAdapterError(f"{digest[:80]!r} is not a digest")
        try:
            data = self._paths.adapter(digest).read_bytes()
        except FileNotFoundError:
            raise UnknownAdapterError(f"no adapter has the digest {digest}") from None
        try:
            blob = blob_from_bytes(data)
            if blob.base_fingerprint != self.base.fingerprint:
                raise WrongBaseError(f"adapter {digest} is for another base")
            bank = self._load_bank(blob.bank_digest) if blob.bank_digest else None
            adapter = blob.join(self.base.config, bank)
        except MalformedAdapterError as error:
            raise StoreCorruptedError(f"adapter {digest}: {error}") from error
        if adapter.digest != digest:
            raise StoreCorruptedError(f"adapter {digest} has the content of {adapter.digest}")
        return adapter

    def usage(self) -> Usage:
        """Number and total size of what is registered."""
        with exclusive_lock(self._paths.lock):
            return self._ledger.current()

    def collect_garbage(self, grace_seconds: float) -> store_maintenance.Garbage:
        """Delete blobs that no name has referred to for `grace_seconds`.

        The grace covers requests that hold a digest whose name is gone.
        """
        with exclusive_lock(self._paths.lock):
            self._ledger.reset()
            return store_maintenance.collect_garbage(self._paths, self.records(), grace_seconds)

    def check_integrity(self) -> None:
        """Read everything. Raises StoreCorruptedError for a wrong hash or a missing blob."""
        with exclusive_lock(self._paths.lock):
            store_maintenance.check_integrity(self._paths, self.records())

    def _stage_blobs(self, adapter: CompactAdapter) -> dict[Path, Path]:
        """Written and synced files by the names that they will have."""
        staged = {}
        bank = adapter.bank
        if bank is not None and not (path := self._paths.bank(bank.digest)).exists():
            staged[path] = write_staged(self._paths.staging, bank_to_bytes(bank))
        if not (path := self._paths.adapter(adapter.digest)).exists():
            staged[path] = write_staged(self._paths.staging, adapter.to_bytes())
        return staged

    def _register(
        self,
        record: AdapterRecord,
        adapter: CompactAdapter,
        staged: Mapping[Path, Path],
        *,
        replace: bool,
    ) -> AddResult:
        """Under the lock: check, then blobs, then the manifest, each durable before the next."""
        name = manifest_name(record.id)
        old = self._read_record(name)
        try:
            if old is not None and old.digest == record.digest:
                sync_directory(self._paths.manifests)  # its writer may have died before this
                return AddResult(old, created=False)
            before, after = self._check_limits(record, old, replace=replace)
            # a collector may have been faster than the lock
            self._publish_blobs({**self._stage_blobs(adapter), **staged})
        except BaseException:
            for path in staged.values():
                path.unlink(missing_ok=True)
            raise
        manifest = write_staged(self._paths.staging, record.to_json())
        if old is not None:
            self._paths.touch_blobs(old)
        self._ledger.begin(before, after, name, record.digest)
        publish(manifest, self._paths.manifests / name)
        sync_directory(self._paths.manifests)
        return AddResult(record, created=True)

    def _publish_blobs(self, staged: Mapping[Path, Path]) -> None:
        for target, path in staged.items():
            publish(path, target)
        for directory in (self._paths.banks, self._paths.adapters):
            sync_directory(directory)

    def _check_limits(
        self, record: AdapterRecord, old: AdapterRecord | None, *, replace: bool
    ) -> tuple[Usage, Usage]:
        """The usage before and after, or the error that refuses the change."""
        if old is not None and not replace:
            raise AdapterExistsError(
                f"adapter {record.id!r} exists with other content; ask to replace it"
            )
        before = self._ledger.current()
        old_bytes = old.compact_bytes if old is not None else 0
        after = Usage(
            before.num_adapters + (old is None),
            before.compact_bytes - old_bytes + record.compact_bytes,
        )
        if after.num_adapters > self.limits.max_adapters:
            raise AdapterTooLargeError(
                f"the store is full: {self.limits.max_adapters} adapters are registered"
            )
        if after.compact_bytes > self.limits.max_total_compact_bytes:
            raise AdapterTooLargeError(
                f"the store is full: {record.compact_bytes} bytes more would exceed "
                f"{self.limits.max_total_compact_bytes}"
            )
        return before, after

    def _read_record(self, name: str) -> AdapterRecord | None:
        """The record in a manifest file, read only if the file is another than last time."""
        path = self._paths.manifests / name
        cached = self._records.get(name)
        try:
            if cached is not None and cached[0] == _stat_of(path.stat()):
                return cached[1]
            with path.open("rb") as stream:
                version = _stat_of(os.fstat(stream.fileno()))
                record = AdapterRecord.from_json(stream.read())
        except FileNotFoundError:
            self._records.pop(name, None)
            return None
        self._records[name] = (version, record)
        return record

    def _load_bank(self, digest: str) -> Bank:
        def read() -> Bank:
            try:
                bank = bank_from_bytes(self._paths.bank(digest).read_bytes())
            except FileNotFoundError:
                raise StoreCorruptedError(f"bank {digest} is missing") from None
            if bank.digest != digest:
                raise StoreCorruptedError(f"bank {digest} has the content of {bank.digest}")
            return bank

        return self.banks.get(digest, read)

    def _current_digest(self, name: str) -> str | None:
        record = self._read_record(name) if name else None
        return record.digest if record is not None else None

    def _count(self) -> Usage:
        records = self.records()
        return Usage(len(records), sum(record.compact_bytes for record in records))


def _stat_of(info: os.stat_result) -> _Stat:
    return _Stat(info.st_mtime_ns, info.st_ino, info.st_size)
