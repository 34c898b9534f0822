"""How the tests post adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

ADAPTERS = "/v1/adapters"


def files_of(directory: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (file.name, file.read_bytes())) for file in sorted(directory.iterdir())]


async def upload(
    client: httpx.AsyncClient, directory: Path, adapter_id: str, **fields: str
) -> httpx.Response:
    return await client.post(ADAPTERS, data={"id": adapter_id, **fields}, files=files_of(directory))


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error
