"""The adapters of a running server, or of a store's directory, behind one protocol.

For the command line. Knows nothing of how rows are shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import quote

import httpx

if TYPE_CHECKING:  # a client of a server needs no torch
    from adapters.records import AdapterRecord
    from adapters.store import AdapterStore

Row = Mapping[str, Any]
"""One adapter, as the server tells it; offline, the fields of `AdapterRecord`."""

_SECONDS = 60.0
_SUFFIXES = frozenset({".json", ".safetensors", ".bin", ".pt"})  # the server says which it refuses


class ServerError(Exception):
    """The server refused, or there is none; the message says what it said."""


class Added(NamedTuple):
    """The adapter under the id now; `created` is False if it was there with the same content."""

    row: Row
    created: bool


class AdapterDirectory(Protocol):
    """Adapters by id. Methods raise AdapterError offline, ServerError over HTTP."""

    def add(self, adapter_id: str, directory: Path, *, replace: bool) -> Added:
        """Register a PEFT directory."""
        ...

    def rows(self) -> list[Row]:
        """All adapters."""
        ...

    def row(self, adapter_id: str) -> Row:
        """One adapter."""
        ...

    def remove(self, adapter_id: str) -> None:
        """Remove a name."""
        ...


class StoreDirectory:
    """A store opened in this process."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store

    def add(self, adapter_id: str, directory: Path, *, replace: bool) -> Added:
        """See AdapterDirectory."""
        result = self._store.add(adapter_id, directory, replace=replace)
        return Added(_row(result.record), result.created)

    def rows(self) -> list[Row]:
        """See AdapterDirectory."""
        return [_row(record) for record in self._store.records()]

    def row(self, adapter_id: str) -> Row:
        """See AdapterDirectory."""
        return _row(self._store.record(adapter_id))

    def remove(self, adapter_id: str) -> None:
        """See AdapterDirectory."""
        self._store.remove(adapter_id)


class HttpDirectory:
    """The adapters of a server; `client` has its address and key."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def add(self, adapter_id: str, directory: Path, *, replace: bool) -> Added:
        """See AdapterDirectory: uploads the directory's files."""
        fields = {"id": adapter_id, "replace": "true" if replace else "false"}
        with contextlib.ExitStack() as stack:
            files = [
                ("files", (path.name, stack.enter_context(path.open("rb"))))
                for path in sorted(directory.iterdir())
                if path.suffix in _SUFFIXES
            ]
            response = self._request("POST", "/v1/adapters", data=fields, files=files)
        return Added(response.json(), response.status_code == httpx.codes.CREATED)

    def rows(self) -> list[Row]:
        """See AdapterDirectory."""
        rows: list[Row] = self._request("GET", "/v1/adapters").json()["data"]
        return rows

    def row(self, adapter_id: str) -> Row:
        """See AdapterDirectory."""
        row: Row = self._request("GET", _path(adapter_id)).json()
        return row

    def remove(self, adapter_id: str) -> None:
        """See AdapterDirectory."""
        self._request("DELETE", _path(adapter_id))

    def _request(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            response = self._client.request(method, path, **content)
        except httpx.TransportError as error:
            raise ServerError(f"no answer from {self._client.base_url}: {error}") from None
        if response.is_error:
            raise ServerError(f"{_message(response)} (HTTP {response.status_code})")
        return response


@contextlib.contextmanager
def http_directory(url: str, api_key: str | None) -> Iterator[HttpDirectory]:
    """The adapters of the server at `url`."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=_SECONDS) as client:
        yield HttpDirectory(client)


def _row(record: AdapterRecord) -> Row:
    return asdict(record)


def _path(adapter_id: str) -> str:
    return f"/v1/adapters/{quote(adapter_id)}"


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or "no message"
