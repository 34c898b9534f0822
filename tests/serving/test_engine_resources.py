"""Engines share the GPUs that the cluster has, on a real one that says it has some."""

import json
import subprocess
import sys

import pytest

ASK = """
import json, sys
import ray
from serving.cluster.application import _engine_resources
from serving.settings import load_settings

ray.init(num_cpus=1, num_gpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False)

@ray.remote
class Engine:
    def gpus(self):
        return [int(gpu) for gpu in ray.get_gpu_ids()]

told = []
for flags in json.loads(sys.argv[2]):
    settings = load_settings(flags, None)
    options = _engine_resources(settings)
    engines = [Engine.options(**options).remote() for _ in range(settings.num_engine_replicas)]
    told.append(sorted(ray.get([engine.gpus.remote() for engine in engines], timeout=60)))
    for engine in engines:
        ray.kill(engine)
print(json.dumps(told))
"""


def gpus_of_engines(num_gpus: int, *flags: dict[str, str]) -> list[list[list[int]]]:
    """For each set of flags: the GPUs of its engine replicas, actors that Ray has placed."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(num_gpus), json.dumps(flags)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    told: list[list[list[int]]] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.ray
def test_engines_take_a_gpu_each_or_share_them() -> None:
    two, three = {"num_engine_replicas": "2"}, {"num_engine_replicas": "3"}
    alone, both, shared, none = gpus_of_engines(2, {}, two, three, {"device": "cpu"})
    assert alone in ([[0]], [[1]])
    assert both == [[0], [1]]
    assert shared in ([[0], [0], [1]], [[0], [1], [1]])
    assert none == [[]]


@pytest.mark.ray
def test_a_cluster_without_gpus_is_asked_for_none() -> None:
    assert gpus_of_engines(0, {"device": "auto"}) == [[[]]]
