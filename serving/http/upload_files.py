"""Where the files of an upload go while they arrive: a directory, or memory. Knows no multipart."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class UploadFile(Protocol):
    """A file that is being received."""

    def write(self, data: memoryview, /) -> object:
        """Add bytes at its end."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class UploadFiles(Protocol):
    """The files of one upload."""

    def create(self, name: str) -> UploadFile:
        """A new file. Raises FileExistsError."""
        ...


class DirectoryFiles:
    """Files in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def create(self, name: str) -> UploadFile:
        """See UploadFiles."""
        return (self._directory / name).open("xb")


class MemoryFiles:
    """Files in memory."""

    def __init__(self) -> None:
        self._files: dict[str, _MemoryFile] = {}

    def create(self, name: str) -> UploadFile:
        """See UploadFiles."""
        if name in self._files:
            raise FileExistsError(name)
        return self._files.setdefault(name, _MemoryFile())

    def contents(self) -> dict[str, bytes]:
        """What was written, by name."""
        return {name: bytes(file.content) for name, file in self._files.items()}


class _MemoryFile:
    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, data: memoryview) -> None:
        self.content += data

    def close(self) -> None:
        """The content stays."""
