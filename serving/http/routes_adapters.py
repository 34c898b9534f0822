"""/v1/adapters: register from an upload or from a directory on the server; list, show, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from adapters.errors import InvalidAdapterIdError
from adapters.records import AdapterRecord
from adapters.store import AddResult
from serving.http.auth import admin_guard, inference_guard
from serving.http.bodies import media_type, read_json
from serving.http.errors import ApiError
from serving.http.models import resolve_adapter, served_records
from serving.http.openapi import upload_or_json_body
from serving.http.routes_models import json_response
from serving.http.schemas import AdapterSource
from serving.http.services import Services
from serving.http.uploads import (
    FILES_FIELD,
    SmallUpload,
    check_headers,
    is_small,
    receive_small_upload,
    receive_upload,
)

_MAX_CONCURRENT_ADDS = 2  # each holds a whole adapter in memory
_MAX_SPOOLED = 8  # uploads in the spool directory; the bodies of others wait unread
_MAX_HELD = 64  # small ones in memory, likewise
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def adapters_router(services: Services) -> APIRouter:
    """The routes that manage adapters; what they change is durable before they answer."""
    router = APIRouter()
    access = services.access
    admin = [Depends(admin_guard(access))]
    reader = [Depends(inference_guard(access))]
    registrar = _Registrar(services)
    spooled, held = asyncio.Semaphore(_MAX_SPOOLED), asyncio.Semaphore(_MAX_HELD)

    described = upload_or_json_body(FILES_FIELD, AdapterSource)

    @router.post("/v1/adapters", dependencies=admin, status_code=201, openapi_extra=described)
    async def add_adapter(request: Request) -> Response:
        if media_type(request) != "multipart/form-data":
            body = await read_json(request, AdapterSource, access.max_body_bytes)
            root = _allowed_root(access.allowed_source_root)
            directory = _under(root, body.source)
            return await registrar.register_directory(body.id, directory, body.replace, root)
        check_headers(request, access.max_upload_bytes)
        if is_small(request):
            async with held:
                small = await receive_small_upload(request, access.max_upload_bytes)
                return await registrar.register_small(small)
        async with spooled:
            with TemporaryDirectory(prefix="vbserve-", dir=access.spool_directory) as spool:
                fields = await receive_upload(request, Path(spool), access.max_upload_bytes)
                adapter_id, replace = _upload_fields(fields)
                return await registrar.register_directory(adapter_id, Path(spool), replace, None)

    @router.get("/v1/adapters", dependencies=reader)
    async def list_adapters() -> Response:
        records = await asyncio.to_thread(served_records, services)
        objects = [adapter_object(services, record) for record in records]
        return json_response({"object": "list", "data": objects})

    @router.get("/v1/adapters/{adapter_id:path}", dependencies=reader)
    async def show_adapter(adapter_id: str) -> Response:
        return json_response(adapter_object(services, resolve_adapter(services, adapter_id)))

    @router.delete("/v1/adapters/{adapter_id:path}", dependencies=admin)
    async def delete_adapter(adapter_id: str) -> Response:
        resolve_adapter(services, adapter_id)
        record = await asyncio.to_thread(services.store.remove, adapter_id)
        return json_response(
            {"id": record.id, "object": "adapter", "deleted": True, "digest": record.digest}
        )

    return router


class _Registrar:
    """Adds adapters to the store, few at a time."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._adding = asyncio.Semaphore(_MAX_CONCURRENT_ADDS)

    async def register_directory(
        self, adapter_id: str, directory: Path, replace: bool, allowed_root: Path | None
    ) -> Response:
        """201, or 200 where the same content was there under this id already."""
        self._check_id(adapter_id)
        add = partial(self._services.store.add, replace=replace, allowed_root=allowed_root)
        return await self._register(partial(add, adapter_id, directory))

    async def register_small(self, upload: SmallUpload) -> Response:
        """As `register_directory`; also what needs no disk is done in the thread."""

        def add() -> AddResult:
            fields, files = upload.parse()
            adapter_id, replace = _upload_fields(fields)
            self._check_id(adapter_id)
            return self._services.store.add_uploaded(adapter_id, files, replace=replace)

        return await self._register(add)

    async def _register(self, add: Callable[[], AddResult]) -> Response:
        async with self._adding:
            record, created = await asyncio.to_thread(add)
        return json_response(adapter_object(self._services, record), 201 if created else 200)

    def _check_id(self, adapter_id: str) -> None:
        if adapter_id == self._services.base_name:
            raise InvalidAdapterIdError(f"{adapter_id!r} is the name of the base")


def adapter_object(services: Services, record: AdapterRecord) -> dict[str, Any]:
    """An adapter as /v1/adapters shows it; sizes are bytes."""
    return {
        "id": record.id,
        "object": "adapter",
        "digest": record.digest,
        "base": services.base_name,
        "kind": record.kind,
        "rank": record.rank,
        "targets": list(record.targets),
        "num_modules": record.num_modules,
        "num_stored_parameters": record.num_stored_parameters,
        "compact_bytes": record.compact_bytes,
        "factor_bytes": record.factor_bytes,
        "created": record.created,
    }


def _upload_fields(fields: dict[str, str]) -> tuple[str, bool]:
    """Id and `replace` of an upload; ApiError 400 for any other field."""
    unknown = sorted(fields.keys() - {"id", "replace"})
    if unknown:
        raise ApiError(400, f"unknown field {unknown[0]!r}", "unknown_field", unknown[0])
    if "id" not in fields:
        raise ApiError(400, "field 'id' is required", "missing", "id")
    replace = _BOOLEANS.get(fields.get("replace", "false").lower())
    if replace is None:
        raise ApiError(
            400,
            f"replace is {fields['replace'][:40]!r}, must be 'true' or 'false'",
            "invalid_value",
            "replace",
        )
    return fields["id"], replace


def _allowed_root(root: Path | None) -> Path:
    if root is None:
        raise ApiError(
            403,
            "this server registers no adapters from its own directories; upload the files instead",
            "source_not_allowed",
            "source",
        )
    return root.resolve()


def _under(root: Path, source: str) -> Path:
    """The directory that `source` names, links followed. What lies outside is not even looked at.

    Raises ApiError: 403 outside of `root`, 422 where there is no such directory.
    """
    if "\0" in source:
        raise ApiError(422, "source has a null character", "invalid_source", "source")
    path = (root / source).resolve()
    if not path.is_relative_to(root):
        raise ApiError(
            403,
            f"source {source!r} is not under the allowed root of this server",
            "source_not_allowed",
            "source",
        )
    if not path.is_dir():
        raise ApiError(422, f"source {source!r} is not a directory", "invalid_source", "source")
    return path
