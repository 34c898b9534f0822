"""The FastAPI application: OpenAI's routes over an `EngineClient` and an adapter store.

Holds no weights and blocks on nothing. Knows nothing of Ray.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http import errors
from serving.http.routes_adapters import adapters_router
from serving.http.routes_generation import generation_router
from serving.http.routes_models import models_router
from serving.http.routes_operations import operations_router
from serving.http.services import Access, Services
from serving.metrics import HttpMetrics

__all__ = ["Access", "Services", "build_app"]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def build_app(services: Services) -> FastAPI:
    """All routes over `services`. The interactive docs are left out: they load foreign scripts."""
    app = FastAPI(title="vbserve", docs_url=None, redoc_url=None)
    app.include_router(generation_router(services))
    app.include_router(models_router(services))
    app.include_router(adapters_router(services))
    app.include_router(operations_router(services))
    errors.install(app)
    app.add_middleware(CountAnswers, metrics=services.metrics)
    return app


class CountAnswers:
    """ASGI middleware: every answer by route, method and status."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; look at the status on its way."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # the client went before there was an answer

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_look)
        except Exception:
            status = 500  # answered further out
            raise
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.answered(route, method, status)
