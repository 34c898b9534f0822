"""One ingress replica: the FastAPI application over handles to the engine replicas.

Thin: no weights, no engine. Knows Ray Serve and how to build the application, nothing of routes.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from transformers import AutoTokenizer

from core.model_config import read_base_info
from serving.cluster.engine_deployment import replica_name
from serving.cluster.ray_engine_client import RayEngineClient
from serving.cluster.token_channel import TokenReceiver
from serving.http.app import build_app
from serving.http.services import Access, Services
from serving.metrics import HttpMetrics
from serving.metrics_pages import Page
from serving.settings import Settings
from serving.stores import open_store


class IngressReplica:
    """What Ray Serve runs `num_ingress_replicas` times, wrapped by `serve.ingress`."""

    def __init__(
        self, settings: Settings, base_name: str, model: Path, engines: DeploymentHandle
    ) -> None:
        self._settings, self._base_name, self._model = settings, base_name, model
        self._engines = engines
        self._name = replica_name("ingress")
        self._http_metrics = HttpMetrics()
        self._receiver = TokenReceiver(ray.util.get_node_ip_address())
        self._receiving = asyncio.get_running_loop().create_task(self._receiver.run())

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once, after the constructor; waits until an engine answers."""
        context = serve.get_replica_context()
        ingresses = serve.get_deployment_handle(context.deployment, context.app_name)
        base = read_base_info(self._model)
        services = Services(
            base_name=self._base_name,
            base=base,
            tokenizer=AutoTokenizer.from_pretrained(self._model),
            store=open_store(self._settings, self._base_name, base),
            engines=RayEngineClient(self._engines, ingresses, self._receiver),
            max_model_len=await self._engines.max_model_len.remote(),
            access=access(self._settings),
            metrics=self._http_metrics,
            replica_name=self._name,
        )
        return build_app(services)

    async def metric_page(self) -> tuple[str, Page]:
        """This replica's name and its own metrics."""
        return self._name, self._http_metrics.page()

    async def __del__(self) -> None:
        self._receiving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._receiving
        self._receiver.shutdown()


def access(settings: Settings) -> Access:
    """Who may do what, from the settings."""
    return Access(
        api_keys=tuple(key.get_secret_value() for key in settings.api_keys),
        admin_keys=tuple(key.get_secret_value() for key in settings.admin_keys),
        max_upload_bytes=settings.max_upload_bytes,
        allowed_source_root=settings.allowed_source_root,
    )
