"""How often Serve's controller looks after its replicas: rarely while none starts or stops.

A look takes 2 ms of a core that engines wait for. Serve reads the interval once, from the
environment, so the controller is told later by Ray's way to run a function in an actor. Knows
nothing of what is deployed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ray

from serving.cluster.ray_cluster import CONTROL_LOOP_SECONDS

_CALM_SECONDS = 1.0
_PATIENCE_SECONDS = 5.0


@contextlib.contextmanager
def calm_controller() -> Iterator[None]:
    """Let the controller of the connected cluster look once a second, until the end."""
    _tell_controller(_CALM_SECONDS)
    try:
        yield
    finally:
        _tell_controller(CONTROL_LOOP_SECONDS)


def _tell_controller(seconds: float) -> None:
    with contextlib.suppress(Exception):  # not Serve's public interface: else it looks more often
        from ray.serve.context import _get_global_client

        controller = _get_global_client()._controller
        told = controller.__ray_call__.remote(_set_interval, seconds)
        ray.get(told, timeout=_PATIENCE_SECONDS)


def _set_interval(_: object, seconds: float) -> None:
    from ray.serve._private import controller

    controller.CONTROL_LOOP_INTERVAL_S = seconds
