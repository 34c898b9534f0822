"""GET /v1/models: the base and its adapters. An id may have slashes."""

from __future__ import annotations

import asyncio
import time

import msgspec
from fastapi import APIRouter, Depends, Response

from serving.http.auth import inference_guard
from serving.http.models import adapter_card, base_card, resolve_adapter, served_records
from serving.http.services import Services


def models_router(services: Services) -> APIRouter:
    """The routes that list what may stand in `model`."""
    router = APIRouter(dependencies=[Depends(inference_guard(services.access))])
    started = int(time.time())

    @router.get("/v1/models")
    async def list_models() -> Response:
        records = await asyncio.to_thread(served_records, services)
        cards = [adapter_card(services, record) for record in records]
        return json_response({"object": "list", "data": [base_card(services, started), *cards]})

    @router.get("/v1/models/{model_id:path}")
    async def show_model(model_id: str) -> Response:
        if model_id == services.base_name:
            return json_response(base_card(services, started))
        return json_response(adapter_card(services, resolve_adapter(services, model_id)))

    return router


def json_response(content: object, status: int = 200) -> Response:
    """`content`, of plain values and msgspec structs, as JSON."""
    return Response(msgspec.json.encode(content), status, media_type="application/json")
