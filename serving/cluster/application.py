"""The two deployments put together with their options.

Knows what runs where and how many requests each part takes; nothing of what they do.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from serving.cluster.control_loop import calm_controller
from serving.settings import Settings

APP_NAME = "vbserve"
ENGINE_NAME = "engine"
INGRESS_NAME = "ingress"

# paths that replicas import, since the launcher does without torch
_ENGINE = "serving.cluster.engine_deployment.EngineReplica"
_INGRESS = "serving.cluster.ingress_deployment.IngressReplica"

_STOP_SECONDS = 5.0  # for requests that run when the server stops
_GIVE_UP_SECONDS = 20.0
_STOP_POLL_SECONDS = 0.2
_HEALTH_PERIOD_SECONDS = 2.0
_HEAD_NODE, _A_LITTLE = "node:__internal_head__", 1e-4  # `host` is an address of that node
_EXTRA_CALLS = 64  # broadcasts and health checks come on top of requests


@contextlib.contextmanager
def serve_running(settings: Settings) -> Iterator[None]:
    """Start Serve's controller on the connected cluster; one that was there before stays.

    Raises RuntimeError with Serve's words.
    """
    logging.getLogger("ray.serve").setLevel(settings.log_level.upper())
    status = serve.status()
    was_running = bool(status.proxies or status.applications)
    serve.start(proxy_location="Disabled", logging_config=_logging(settings))
    try:
        yield
    finally:
        if settings.ray_address is not None and not was_running:
            _within(_GIVE_UP_SECONDS, serve.shutdown)  # a private cluster ends as a whole


@contextlib.contextmanager
def deployed(settings: Settings, base_name: str, base: Path) -> Iterator[None]:
    """Run the application for the model directory `base`; take it down at the end.

    Raises RuntimeError with Serve's words when a deployment fails.
    """
    try:
        # no route: the ingress replicas speak HTTP themselves, no proxy stands before them
        serve.run(_application(settings, base_name, base), name=APP_NAME, route_prefix=None)
        with calm_controller() if settings.ray_address is None else contextlib.nullcontext():
            yield
    finally:
        _within(_GIVE_UP_SECONDS, serve.delete, APP_NAME)  # lets running requests end


def _within(seconds: float, call: Callable[..., None], *args: object) -> None:
    """Wait for a call, but not for ever: the cluster may be dead already."""
    thread = threading.Thread(target=call, args=args, daemon=True)
    thread.start()
    thread.join(seconds)


def _application(settings: Settings, base_name: str, base: Path) -> serve.Application:
    shared: dict[str, Any] = {
        "graceful_shutdown_timeout_s": _STOP_SECONDS,
        "graceful_shutdown_wait_loop_s": _STOP_POLL_SECONDS,
        "health_check_period_s": _HEALTH_PERIOD_SECONDS,
        "logging_config": _logging(settings),
    }
    engine = serve.deployment(name=ENGINE_NAME)(_ENGINE).options(
        num_replicas=settings.num_engine_replicas,
        max_ongoing_requests=_engine_requests(settings),
        max_queued_requests=settings.max_waiting,
        ray_actor_options=_engine_resources(settings),
        **shared,
    )
    ingress = serve.deployment(name=INGRESS_NAME)(_INGRESS).options(
        num_replicas=settings.num_ingress_replicas,
        max_ongoing_requests=_EXTRA_CALLS,  # HTTP requests do not come through Serve
        ray_actor_options={"num_cpus": 0, "resources": {_HEAD_NODE: _A_LITTLE}},
        **shared,
    )
    engines = engine.bind(settings, base_name, base)
    return ingress.bind(settings, base_name, base, engines)


def _engine_requests(settings: Settings) -> int:
    """More than an engine lets in: its own queue refuses first, with a typed error."""
    return settings.max_waiting + settings.max_num_seqs + _EXTRA_CALLS


def _engine_resources(settings: Settings) -> dict[str, float]:
    """A share of the cluster's GPUs, if any; CPUs are not reserved, threads are set anyway."""
    num_gpus = ray.cluster_resources().get("GPU", 0.0) if settings.device != "cpu" else 0.0
    if num_gpus == 0:
        return {"num_cpus": 0}
    num_sharing = math.ceil(settings.num_engine_replicas / num_gpus)  # none lies on two of them
    return {"num_cpus": 0, "num_gpus": 1 / num_sharing}


def _logging(settings: Settings) -> LoggingConfig:
    return LoggingConfig(log_level=settings.log_level.upper(), enable_access_log=False)
