"""Instruments, their labels, and the pages of several replicas as one that promtool accepts."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from http_client import BASE
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from core.requests import FinishReason, GenerationRequest, RequestOutput, RequestTimings
from serving.metrics import (
    AdapterLabels,
    EngineMetrics,
    EngineState,
    HttpMetrics,
    RequestMetrics,
)
from serving.metrics_pages import PageFamily, PageSample, merge, snapshot

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(text: str) -> Samples:
    """Every sample of an exposition, read by prometheus_client's own parser."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} comes twice"
            found[key] = sample.value
    return found


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"vbserve_{name}", labels)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry, clock: Clock) -> RequestMetrics:
    labels = AdapterLabels("base", 2)
    return RequestMetrics(registry, labels, clock)


def request(name: str, digest: str | None = None) -> GenerationRequest:
    model = None if digest is None else f"name-of-{digest}"
    return GenerationRequest(name, (1, 2, 3), adapter_digest=digest, model=model)


def test_a_request_from_arrival_to_end(metrics, registry, clock):
    metrics.submitted(request("r", "d"))
    started = RequestTimings(arrived=90.0, scheduled=94.0, first_token=100.0)
    metrics.observe([RequestOutput("r", (7,), timings=started)])
    clock.now = 100.5
    metrics.observe([RequestOutput("r", (8,))])
    clock.now = 102.5
    ended = RequestTimings(90.0, 94.0, 100.0, finished=102.5)
    metrics.observe([RequestOutput("r", (9, 9), finish_reason=FinishReason.STOP, timings=ended)])

    label = {"adapter": "name-of-d"}
    assert value(registry, "queue_time_seconds_sum", **label) == 4.0
    assert value(registry, "time_to_first_token_seconds_sum", **label) == 10.0
    assert value(registry, "time_to_first_token_seconds_count", **label) == 1
    assert value(registry, "inter_token_latency_seconds_count", **label) == 3
    assert value(registry, "inter_token_latency_seconds_sum", **label) == 2.5
    assert value(registry, "e2e_request_latency_seconds_sum", **label) == 12.5
    assert value(registry, "prompt_tokens_total", **label) == 3
    assert value(registry, "generation_tokens_total", **label) == 4
    assert value(registry, "requests_total", **label, outcome="stop") == 1


def test_a_request_of_one_token_has_no_gap(metrics, registry):
    metrics.submitted(request("r"))
    timings = RequestTimings(90.0, 94.0, 100.0, finished=100.0)
    metrics.observe([RequestOutput("r", (7,), finish_reason=FinishReason.LENGTH, timings=timings)])
    assert value(registry, "inter_token_latency_seconds_count", adapter="base") is None
    assert value(registry, "time_to_first_token_seconds_count", adapter="base") == 1
    assert value(registry, "e2e_request_latency_seconds_count", adapter="base") == 1


def test_requests_are_counted_by_how_they_end(metrics, registry):
    for number, reason in enumerate(FinishReason):
        metrics.submitted(request(f"r{number}"))
        metrics.observe([RequestOutput(f"r{number}", (), finish_reason=reason)])
        assert value(registry, "requests_total", adapter="base", outcome=reason.value) == 1
    metrics.submitted(request("refused"))
    metrics.rejected(request("refused"))
    assert value(registry, "requests_total", adapter="base", outcome="rejected") == 1


def test_what_has_ended_is_forgotten(metrics):
    for number in range(10):
        metrics.submitted(request(f"r{number}"))
        metrics.observe([RequestOutput(f"r{number}", (1,), finish_reason=FinishReason.STOP)])
    metrics.observe([RequestOutput("unknown", (1,))])
    assert metrics._live == {}


def test_labels_are_capped():
    labels = AdapterLabels("base", 2)
    found = [labels.label(request("r", digest)) for digest in ("a", "b", "c", "a", "d")]
    assert found == ["name-of-a", "name-of-b", "other", "name-of-a", "other"]
    assert labels.label(request("r")) == "base"


def test_an_adapter_of_two_names_keeps_its_first():
    labels = AdapterLabels("base", 2)
    asked = [GenerationRequest("r", (1,), adapter_digest="d", model=name) for name in ("x", "y")]
    assert [labels.label(one) for one in asked] == ["x", "x"]


def test_a_cap_of_nothing_leaves_the_base_its_label():
    labels = AdapterLabels("base", 0)
    assert [labels.label(request("r", digest)) for digest in (None, "a")] == ["base", "other"]


def full_page(name: str) -> str:
    """An engine's and an ingress's page with every family in use."""
    state = EngineState(*range(1, 17), 0.25)
    engine = EngineMetrics(AdapterLabels("base", 2), lambda: state)
    engine.requests.submitted(request("r"))
    timings = RequestTimings(90.0, 94.0, 100.0, finished=102.0)
    for output in (
        RequestOutput("r", (7, 8), timings=timings),
        RequestOutput("r", (9,), finish_reason=FinishReason.STOP, timings=timings),
    ):
        engine.requests.observe([output])
    http = HttpMetrics()
    http.answered("/v1/completions", "POST", 200)
    return merge({f"engine-{name}": engine.page(), "engine-2": engine.page(), "in": http.page()})


def test_every_figure_of_the_state_has_its_own_sample():
    samples = samples_of(full_page("1"))
    figures = {
        name: number
        for (name, labels), number in samples.items()
        if ("replica", "engine-1") in labels and "process" not in name and len(labels) == 1
    }
    assert figures == {
        "vbserve_requests_running": 1,
        "vbserve_requests_waiting": 2,
        "vbserve_preemptions_total": 3,
        "vbserve_prefix_cache_hit_tokens_total": 4,
        "vbserve_base_weights_bytes": 5,
        "vbserve_kv_cache_used_bytes": 6,
        "vbserve_kv_cache_size_bytes": 7,
        "vbserve_adapter_slots_bytes": 8,
        "vbserve_device_memory_bytes": 9,
        "vbserve_compact_adapters_bytes": 10,
        "vbserve_factor_cache_used_bytes": 11,
        "vbserve_factor_cache_budget_bytes": 12,
        "vbserve_factor_cache_hits_total": 13,
        "vbserve_factor_cache_misses_total": 14,
        "vbserve_factor_cache_evictions_total": 15,
        "vbserve_factor_rebuild_seconds_count": 16,
        "vbserve_factor_rebuild_seconds_sum": 0.25,
    }
    rss = [n for (name, _), n in samples.items() if name == "vbserve_process_resident_memory_bytes"]
    assert len(rss) == 3
    assert min(rss) > 1_000_000


def test_replicas_share_one_help_and_type():
    text = full_page("1")
    for kind in ("HELP", "TYPE"):
        lines = [line.split()[2] for line in text.splitlines() if line.startswith(f"# {kind}")]
        assert len(lines) == len(set(lines))
    for line in text.splitlines():
        assert line.startswith("#") or 'replica="' in line
        assert line.startswith(("# HELP vbserve_", "# TYPE vbserve_", "vbserve_"))


def test_a_page_survives_json():
    registry = CollectorRegistry()
    Histogram("vbserve_x_seconds", "Help.", ["adapter"], registry=registry).labels(
        'q"\\\n'
    ).observe(1)
    page = snapshot(registry)
    travelled = [
        PageFamily(name, kind, text, [PageSample(*sample) for sample in samples])
        for name, kind, text, samples in json.loads(json.dumps(page))
    ]
    assert travelled == page
    assert merge({"a": travelled}) == merge({"a": page})


@given(
    replicas=st.dictionaries(
        st.text(max_size=8),
        st.dictionaries(st.text(max_size=8), st.integers(0, 9), max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_merging_loses_and_mixes_nothing(replicas):
    pages, expected = {}, {}
    for replica, counts in replicas.items():
        registry = CollectorRegistry()
        counter = Counter("vbserve_x_total", "Help.", ["adapter"], registry=registry)
        gauge = Gauge("vbserve_y_bytes", "Help.", registry=registry)
        gauge.set(len(counts))
        expected["vbserve_y_bytes", frozenset({("replica", replica)})] = len(counts)
        for adapter, number in counts.items():
            counter.labels(adapter).inc(number)
            key = frozenset({("replica", replica), ("adapter", adapter)})
            expected["vbserve_x_total", key] = number
        pages[replica] = snapshot(registry)
    assert samples_of(merge(pages)) == expected


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing():
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=full_page("1"), capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


async def test_the_route_joins_all_pages_and_counts_answers(client, engine, services):
    state = EngineMetrics(AdapterLabels(BASE, 2), EngineState)
    engine.pages = {"engine-0": state.page(), "engine-1": state.page()}
    await client.post("/v1/completions", json={"model": BASE, "prompt": "Hello"})
    await client.post("/v1/completions", json={"model": "nobody", "prompt": "Hello"})
    await client.get("/nowhere/at/all")
    await client.request("BREW", "/v1/models/x")
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = samples_of(response.text)
    replicas = {dict(labels).get("replica") for _, labels in samples}
    assert replicas == {"engine-0", "engine-1", "ingress"}
    answers = {
        (dict(labels)["route"], dict(labels)["method"], dict(labels)["status"]): number
        for (name, labels), number in samples.items()
        if name == "vbserve_http_requests_total"
    }
    assert answers == {
        ("/v1/completions", "POST", "200"): 1,
        ("/v1/completions", "POST", "404"): 1,
        ("unmatched", "GET", "404"): 1,
        ("/v1/models/{model_id:path}", "other", "405"): 1,
    }


async def test_an_unexpected_error_is_counted_as_500(client, engine, services):
    engine.refuse = RuntimeError("x")
    await client.post("/v1/completions", json={"model": BASE, "prompt": "Hello"})
    text = merge({"in": services.metrics.page()})
    (name,) = [line for line in text.splitlines() if "http_requests_total{" in line]
    assert 'status="500"' in name


async def test_health_and_readiness(client, engine):
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/readyz")).status_code == 200
    engine.is_ready = False
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/readyz")).status_code == 503


async def test_openapi_describes_the_bodies_that_routes_read_themselves(client):
    paths = (await client.get("/openapi.json")).json()["paths"]
    for path, kind, field in [
        ("/v1/completions", "application/json", "return_token_ids"),
        ("/v1/chat/completions", "application/json", "messages"),
        ("/v1/adapters", "multipart/form-data", "files"),
        ("/v1/adapters", "application/json", "source"),
    ]:
        content = paths[path]["post"]["requestBody"]["content"]
        assert field in content[kind]["schema"]["properties"]
