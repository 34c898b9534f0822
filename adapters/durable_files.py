"""Files that are there whole or not at all, also after a crash; and a lock between processes.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path


def write_staged(staging: Path, data: bytes, *, durable: bool = True) -> Path:
    """A new file under `staging` with `data`, on the disk when `durable`; for `publish`.

    Its modification time is set to the nanosecond, since the kernel's own clock ticks in
    milliseconds: two files of one name that differ then differ in their stat.
    """
    path = staging / f"{os.getpid()}-{uuid.uuid4().hex}"
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.utime(stream.fileno(), ns=(now := time.time_ns(), now))
        if durable:
            os.fsync(stream.fileno())
    return path


def write_all_staged(
    staging: Path, contents: Mapping[Path, bytes], pool: ThreadPoolExecutor
) -> dict[Path, Path]:
    """A staged, durable file for each target, synced side by side: one journal commit for all."""
    if not contents:
        return {}
    *others, own = contents.values()
    running = [pool.submit(write_staged, staging, data) for data in others]
    last = write_staged(staging, own)
    return dict(zip(contents, [*(file.result() for file in running), last], strict=True))


def publish(staged: Path, target: Path) -> None:
    """Give a staged file its name, replacing what had it. `sync_directory` makes that durable."""
    staged.replace(target)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Create a directory and its parents, durably; nothing happens if it exists."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    sync_directory(directory.parent)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock file: one holder among all threads and processes; freed when a holder dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
