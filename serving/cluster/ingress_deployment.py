"""One ingress replica: the FastAPI application over handles to the engine replicas, on its port.

Thin: no weights, no engine. Knows Ray Serve and how to build the application, nothing of routes.
Serve places, watches and restarts it; HTTP comes to it directly (see `http_server`).
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from serving.cluster.garbage import collection_paused, set_loaded_objects_aside

with collection_paused():
    import ray
    from ray import serve
    from ray.serve.handle import DeploymentHandle

    from core.model_config import read_base_info
    from core.tokenizer import load_tokenizer
    from serving.cluster.engine_deployment import replica_name
    from serving.cluster.http_server import HttpServer
    from serving.cluster.ray_engine_client import RayEngineClient
    from serving.cluster.token_channel import TokenReceiver
    from serving.http.app import build_app
    from serving.http.services import Access, Services
    from serving.metrics import HttpMetrics
    from serving.metrics_pages import Page
    from serving.settings import Settings
    from serving.stores import open_store

_STOP_SECONDS = 4  # for answers that are on their way; less than Serve gives the replica


class IngressReplica:
    """What Ray Serve runs `num_ingress_replicas` times, all on one port."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, base_name: str, model: Path, engines: DeploymentHandle
    ) -> None:
        """Return when HTTP requests are taken; waits until an engine answers."""
        self._name = replica_name("ingress")
        self._http_metrics = HttpMetrics()
        self._receiver = TokenReceiver(ray.util.get_node_ip_address())
        self._receiving = asyncio.create_task(self._receiver.run())
        context = serve.get_replica_context()
        ingresses = serve.get_deployment_handle(context.deployment, context.app_name)
        base = read_base_info(model)
        services = Services(
            base_name=base_name,
            base=base,
            tokenizer=load_tokenizer(model),
            store=open_store(settings, base_name, base),
            engines=RayEngineClient(engines, ingresses, self._receiver),
            max_model_len=await engines.max_model_len.remote(),
            access=access(settings),
            metrics=self._http_metrics,
            replica_name=self._name,
            quantize=settings.quantize,
        )
        self._http = HttpServer(
            build_app(services),
            settings.host,
            settings.port,
            shares_port=settings.num_ingress_replicas > 1,
            stop_seconds=_STOP_SECONDS,
        )
        set_loaded_objects_aside()
        await self._http.start()

    async def metric_page(self) -> tuple[str, Page]:
        """This replica's name and its own metrics."""
        return self._name, self._http_metrics.page()

    def check_health(self) -> None:
        """Raise when HTTP is not served any more, so that Serve replaces this replica."""
        if not self._http.is_serving:
            raise RuntimeError("the HTTP server has ended")

    async def __del__(self) -> None:
        """Serve calls this before it ends the process."""
        await self._http.stop()
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
