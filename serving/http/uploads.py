"""An adapter's files from a multipart body, with caps checked while reading.

They go into a directory, and nothing is held in memory but the current chunk; or, where the body
is announced as small, into memory, since a directory for a moment costs more than parsing does. A
part's file name is checked before its first byte is written. Knows nothing of adapters.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serving.http.bodies import (
    announced_bytes,
    pieces_of,
    read_body,
    refuse_announced,
    too_large,
)
from serving.http.errors import ApiError
from serving.http.upload_files import DirectoryFiles, MemoryFiles, UploadFile, UploadFiles

FILES_FIELD = "files"

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_PARTS = 64
_MAX_FIELD_BYTES = 4096
_MAX_OVERHEAD_BYTES = 1 << 20  # boundaries, headers and fields, besides the files' own bytes
_WRITE_BYTES = 1 << 18
_SMALL_BYTES = 1 << 20


def is_small(request: Request) -> bool:
    """Whether the body is announced as one that may be held in memory."""
    announced = announced_bytes(request)
    return announced is not None and announced <= _SMALL_BYTES


class SmallUpload(NamedTuple):
    """A body in memory, not yet parsed."""

    boundary: bytes
    body: bytes
    max_file_bytes: int

    def parse(self) -> tuple[dict[str, str], dict[str, bytes]]:
        """The other fields, and the files by name. Raises as `receive_upload` does."""
        files = MemoryFiles()
        receiver = _Receiver(self.boundary, files, self.max_file_bytes)
        try:
            receiver.feed(self.body)
        except FormParserError as error:
            raise _broken_body(error) from error
        return receiver.finish(), files.contents()


def check_headers(request: Request, max_file_bytes: int) -> None:
    """Raise the ApiErrors that need nothing of the body: 400 for no boundary, 413 for its size.

    To be called before a body is received, and before it has to wait for that.
    """
    refuse_announced(request, max_file_bytes + _MAX_OVERHEAD_BYTES)
    _boundary(request)


async def receive_small_upload(request: Request, max_file_bytes: int) -> SmallUpload:
    """All of a body that `is_small`. Raises ApiError as `receive_upload` does."""
    body = await read_body(request, max_file_bytes + _MAX_OVERHEAD_BYTES)
    return SmallUpload(_boundary(request), body, max_file_bytes)


async def receive_upload(request: Request, directory: Path, max_file_bytes: int) -> dict[str, str]:
    """Write the parts named `files` into `directory`; return the other fields.

    Raises ApiError: 400 for a broken body, 408 for one that stops coming, 413 over `max_file_bytes`
    in all files together, 422 for a file name that is no plain name or comes twice.
    """
    max_body_bytes = max_file_bytes + _MAX_OVERHEAD_BYTES
    receiver = _Receiver(_boundary(request), DirectoryFiles(directory), max_file_bytes)
    num_bytes = 0
    try:
        async for chunk in _in_blocks(pieces_of(request)):
            num_bytes += len(chunk)
            if num_bytes > max_body_bytes:
                raise too_large(max_body_bytes)
            await asyncio.to_thread(receiver.feed, chunk)
        return receiver.finish()
    except FormParserError as error:
        raise _broken_body(error) from error
    finally:
        receiver.close()


async def _in_blocks(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces that are worth a thread's while."""
    block = bytearray()
    async for chunk in chunks:
        block += chunk
        if len(block) >= _WRITE_BYTES:
            yield bytes(block)
            block.clear()
    yield bytes(block)


def _boundary(request: Request) -> bytes:
    _, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if not boundary:
        raise _broken("the content type of a multipart body must name its boundary")
    return boundary


def _broken(message: str) -> ApiError:
    return ApiError(400, message, "invalid_multipart")


def _broken_body(error: FormParserError) -> ApiError:
    return _broken(f"broken multipart body: {error}")


class _Receiver:
    """Follows the parser through the parts; one file is open at a time."""

    def __init__(self, boundary: bytes, files: UploadFiles, max_file_bytes: int) -> None:
        self._files, self._max_file_bytes = files, max_file_bytes
        self._num_file_bytes = self._num_parts = 0
        self._fields: dict[str, bytearray] = {}
        self._header_name, self._header_value = bytearray(), bytearray()
        self._disposition = b""
        self._field = ""
        self._file: UploadFile | None = None
        self._complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._take_header_name,
                "on_header_value": self._take_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._take_data,
                "on_part_end": self.close,
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        self._parser.write(chunk)

    def finish(self) -> dict[str, str]:
        if not self._complete:
            raise _broken("the multipart body ends before its last boundary")
        try:
            return {name: value.decode() for name, value in self._fields.items()}
        except UnicodeDecodeError as error:
            raise _broken("a form field is not UTF-8") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise _broken(f"more than {_MAX_PARTS} parts")
        self._disposition = b""

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        if self._field == FILES_FIELD:
            self._open_file(options.get(b"filename", b"").decode("utf-8", "replace"))
        elif b"filename" in options:
            raise ApiError(400, f"files must come as {FILES_FIELD!r}", "unknown_field", self._field)
        elif self._field in self._fields:
            raise ApiError(400, f"{self._field!r} comes twice", "duplicate_field", self._field)
        else:
            self._fields[self._field] = bytearray()

    def _open_file(self, name: str) -> None:
        if not _FILE_NAME.fullmatch(name):
            raise ApiError(
                422,
                f"file name {name[:200]!r} is not valid: must be a plain name such as "
                "'adapter_config.json', without a path",
                "invalid_file_name",
                FILES_FIELD,
            )
        try:
            self._file = self._files.create(name)
        except FileExistsError:
            raise ApiError(
                422, f"file {name!r} comes twice", "duplicate_file", FILES_FIELD
            ) from None

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is None:
            value = self._fields[self._field]
            value += data[start:end]
            if len(value) > _MAX_FIELD_BYTES:
                raise ApiError(413, f"{self._field!r} is too long", "field_too_large", self._field)
            return
        self._num_file_bytes += end - start
        if self._num_file_bytes > self._max_file_bytes:
            raise ApiError(
                413,
                f"the files are larger than {self._max_file_bytes} bytes together",
                "upload_too_large",
                FILES_FIELD,
            )
        self._file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self._complete = True
