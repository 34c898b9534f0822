"""A Ray cluster for one server: a private one on loopback, or a visit to one that exists.

The private one listens on 127.0.0.1, answers only those who know a token in its own runtime
directory (mode 0700), keeps its files there, and ends with this process, however that ends.
Knows nothing of what is deployed on it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from serving.cluster.garbage import collection_paused
from serving.cluster.launch_checks import LaunchError

# how often Serve's controller looks after its replicas: a start and a stop wait for several looks
CONTROL_LOOP_SECONDS = 0.25
_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum is 75 MiB; nothing large goes through it

# Ray reads these when it is first imported.
_SERVE_VARIABLES = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": str(CONTROL_LOOP_SECONDS),
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
}
_PRIVATE_VARIABLES = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's default of 15 lets all others on the machine go first
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: the node's address is 127.0.0.1
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray's own metrics and events, which nobody can see here
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # what Ray's node looks at 4 to 10 times a second, for tasks and objects that nobody has here
    "RAY_local_fs_monitor_interval_ms": "10000",
    "RAY_raylet_report_resources_period_milliseconds": "2000",
    "RAY_raylet_check_gc_period_milliseconds": "2000",
    "RAY_object_manager_timer_freq_ms": "2000",
    "RAY_kill_idle_workers_interval_ms": "2000",
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill the engine when others fill the memory
}


@contextlib.contextmanager
def private_cluster(num_cpus: int) -> Iterator[None]:
    """Start a cluster of this node alone and connect to it; stop all its processes at the end.

    Raises LaunchError when it does not start.
    """
    directory = Path(tempfile.mkdtemp(prefix="vbserve-"))
    try:
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ.update(_SERVE_VARIABLES | _PRIVATE_VARIABLES)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        with _connection(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(directory / "ray"),  # Ray lets everyone into this one, not its parent
        ):
            _end_needless_processes()
            yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _end_needless_processes() -> None:
    """Ray starts readers of logs, an autoscaler and half a dashboard whatever it is told."""
    from ray._private import worker

    node = worker._global_node
    for end in ("kill_log_monitor", "kill_monitor", "kill_dashboard"):
        with contextlib.suppress(Exception):  # not Ray's public interface: without it they go on
            getattr(node, end)(check_alive=False)


@contextlib.contextmanager
def existing_cluster(address: str) -> Iterator[None]:
    """Connect to a running cluster, and leave it running at the end. Raises LaunchError."""
    os.environ.update(_SERVE_VARIABLES)
    with _connection(address=address):
        yield


@contextlib.contextmanager
def _connection(**options: object) -> Iterator[None]:
    with collection_paused():
        import ray  # only now: it reads the variables above when imported

    try:
        try:
            ray.init(
                log_to_driver=False, logging_level=logging.ERROR, namespace="vbserve", **options
            )
        except Exception as error:  # Ray raises this very class when a node does not come up
            raise LaunchError(f"Ray did not start: {error}") from error
        yield
    finally:
        ray.shutdown()
