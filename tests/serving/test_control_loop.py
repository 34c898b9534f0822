"""Serve's controller looks after its replicas rarely, but while something starts or stops."""

import json
import subprocess
import sys

import pytest

COUNT_LOOKS = """
import json, time
from serving.cluster.ray_cluster import private_cluster

with private_cluster(num_cpus=1):
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from serving.cluster.control_loop import calm_controller

    serve.start(proxy_location="Disabled")
    controller = _get_global_client()._controller

    def looks():
        return ray.get(
            controller.__ray_call__.remote(lambda it: it._health_metrics_tracker.num_control_loops)
        )

    def looks_per_second():
        time.sleep(1)  # the interval that has begun
        begun, before = time.monotonic(), looks()
        time.sleep(4)
        return (looks() - before) / (time.monotonic() - begun)

    told = [looks_per_second()]
    with calm_controller():
        told.append(looks_per_second())
    told.append(looks_per_second())
print(json.dumps(told))
"""


@pytest.mark.ray
def test_a_calm_controller_looks_once_a_second() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT_LOOKS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    before, calm, after = json.loads(done.stdout.splitlines()[-1])
    assert calm <= 1.3  # a busy machine makes all of them fewer
    assert min(before, after) > 1.5  # 4 where nobody else computes
