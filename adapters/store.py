"""`AdapterStore`: adapters by name in a directory that several processes may have open at once.

    blobs/<digest>.adapter.safetensors  compact forms, immutable, named by content
    blobs/<digest>.bank.safetensors     vector banks, immutable, named by content
    manifests/<id>.json                 one per name, replaced atomically; the truth about names
    staging/                            files on their way; left-overs of killed writers
    usage.json, lock                    totals for the limits; the lock between writers

A registration is on the disk before `add` returns. Writers take turns; readers take no lock and see
another process's change at once, since each `resolve` looks at the manifest's stat. No operation
lists a directory except `records`, `collect_garbage` and `check_integrity`.

Knows nothing of HTTP, of other replicas, or of who may register what.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
    write_all_staged,
)
from adapters.errors import (
    AdapterExistsError,
    MalformedAdapterError,
    StoreCorruptedError,
    UnknownAdapterError,
    WrongBaseError,
)
from adapters.manifests import Manifests
from adapters.peft_adapter import PeftReader
from adapters.peft_files import PeftFiles, peft_files_in_memory, read_peft_files
from adapters.records import AdapterRecord, check_adapter_id, manifest_name, record_of
from adapters.store_limits import StoreLimits
from adapters.store_paths import StorePaths
from adapters.usage_ledger import Usage, UsageLedger
from core.model_config import BaseInfo

_NUM_WRITERS = 2  # a registration writes three files, one of them in its own thread
_DIGEST = re.compile(r"[0-9a-f]{64}")


class AddResult(NamedTuple):
    """The record under the id now; `created` is False if it was there with the same content."""

    record: AdapterRecord
    created: bool


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
        self._reader = PeftReader(base)
        self._writers = ThreadPoolExecutor(_NUM_WRITERS, thread_name_prefix="store-writer")
        self._paths = StorePaths(root)
        self._manifests = Manifests(self._paths.manifests)
        self._ledger = UsageLedger(
            self._paths.usage, self._paths.staging, self._manifests.digest, self._manifests.count
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
        return self._add_files(adapter_id, files, replace=replace)

    def add_uploaded(
        self, adapter_id: str, contents: Mapping[str, bytes], *, replace: bool = False
    ) -> AddResult:
        """`add` for the contents of a PEFT directory by file name."""
        check_adapter_id(adapter_id, self._reserved_ids)
        files = peft_files_in_memory(
            contents,
            max_config_bytes=self.limits.max_config_bytes,
            max_weights_bytes=self.limits.max_upload_bytes,
        )
        return self._add_files(adapter_id, files, replace=replace)

    def _add_files(self, adapter_id: str, files: PeftFiles, *, replace: bool) -> AddResult:
        adapter = self._reader.read(files)
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
        self.limits.check_rank(adapter.max_rank)
        record = record_of(adapter_id, adapter, source_files or {}, int(time.time()))
        # the slow part comes before the lock; what is there already needs no writing
        staged = {} if self._is_registered(record) else self._stage(record, adapter)
        try:
            with exclusive_lock(self._paths.lock):
                return self._register(record, adapter, staged, replace=replace)
        finally:
            for path in staged.values():
                path.unlink(missing_ok=True)  # those that were published are gone from here

    def record(self, adapter_id: str) -> AdapterRecord:
        """The record under an id, for whichever base. Raises UnknownAdapterError."""
        check_adapter_id(adapter_id)
        record = self._manifests.read(manifest_name(adapter_id))
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
        """All records, of whichever base, sorted by id; damaged ones are logged and left out."""
        return self._manifests.read_all(skip_damaged=True)

    def remove(self, adapter_id: str) -> AdapterRecord:
        """Remove a name, durably; its content stays for those who hold the digest, until
        `collect_garbage`. Raises UnknownAdapterError.
        """
        with exclusive_lock(self._paths.lock):
            record = self.record(adapter_id)
            name = manifest_name(adapter_id)
            before = self._ledger.current()
            self._ledger.begin(before, before.minus(record.compact_bytes), name, None)
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
            return store_maintenance.collect_garbage(
                self._paths, self._manifests.read_all(), grace_seconds
            )

    def check_integrity(self) -> None:
        """Read everything. Raises StoreCorruptedError for a wrong hash or a missing blob."""
        with exclusive_lock(self._paths.lock):
            store_maintenance.check_integrity(self._paths, self._manifests.read_all())

    def _is_registered(self, record: AdapterRecord) -> bool:
        old = self._manifests.read(manifest_name(record.id))
        return old is not None and old.digest == record.digest

    def _stage(self, record: AdapterRecord, adapter: CompactAdapter) -> dict[Path, Path]:
        """The files that registration needs and that are not there, by the names they will have."""
        blobs = self._missing_blobs(adapter)
        contents = {path: encode() for path, encode in blobs.items()}
        contents[self._paths.manifests / manifest_name(record.id)] = record.to_json()
        return write_all_staged(self._paths.staging, contents, self._writers)

    def _missing_blobs(self, adapter: CompactAdapter) -> dict[Path, Callable[[], bytes]]:
        blobs: dict[Path, Callable[[], bytes]] = {
            self._paths.adapter(adapter.digest): adapter.to_bytes
        }
        if (bank := adapter.bank) is not None:
            blobs[self._paths.bank(bank.digest)] = partial(bank_to_bytes, bank)
        return {path: encode for path, encode in blobs.items() if not path.exists()}

    def _register(
        self,
        record: AdapterRecord,
        adapter: CompactAdapter,
        staged: dict[Path, Path],
        *,
        replace: bool,
    ) -> AddResult:
        """Under the lock: check, then blobs, then the manifest, each durable before the next."""
        name = manifest_name(record.id)
        old = self._manifests.read(name)
        if old is not None and old.digest == record.digest:
            sync_directory(self._paths.manifests)  # its writer may have died before this
            return AddResult(old, created=False)
        if old is not None and not replace:
            raise AdapterExistsError(
                f"adapter {record.id!r} exists with other content; ask to replace it"
            )
        before = self._ledger.current()
        after = before.plus(record.compact_bytes)
        if old is not None:
            after = after.minus(old.compact_bytes)
        self.limits.check_usage(after)
        manifest = self._paths.manifests / name
        if not staged.keys() >= {manifest, *self._missing_blobs(adapter)}:
            # a collector or another writer was faster than the lock
            for path in staged.values():
                path.unlink()
            staged.update(self._stage(record, adapter))
        for target, path in staged.items():
            if target != manifest:
                publish(path, target)
        sync_directory(self._paths.blobs)
        if old is not None:
            self._paths.touch_blobs(old)
        self._ledger.begin(before, after, name, record.digest)
        publish(staged[manifest], manifest)
        sync_directory(self._paths.manifests)
        return AddResult(record, created=True)

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
