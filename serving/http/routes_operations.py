"""GET /healthz, /readyz and /metrics, for whatever watches the server."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from serving.http.auth import metrics_guard
from serving.http.routes_models import json_response
from serving.http.services import Services
from serving.metrics_pages import merge


def operations_router(services: Services) -> APIRouter:
    """The routes that need no model."""
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> Response:
        return json_response({"status": "ok"})

    @router.get("/readyz")
    async def readyz() -> Response:
        if await services.engines.ready():
            return json_response({"status": "ready"})
        return json_response({"status": "no engine is ready"}, 503)

    @router.get("/metrics", dependencies=[Depends(metrics_guard(services.access))])
    async def metrics() -> Response:
        own = {services.replica_name: services.metrics.page()}
        pages = {**own, **await services.engines.metric_pages()}
        return Response(merge(pages), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
