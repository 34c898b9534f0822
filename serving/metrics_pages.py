"""Metrics of one process as plain data, and the pages of many processes as one exposition text.

A `Page` travels between processes (pickle, msgpack or JSON) and knows nothing of instruments.
Knows nothing of engines or of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class PageSample(NamedTuple):
    """One line of an exposition: the sample's full name, its labels, its value."""

    name: str
    labels: dict[str, str]
    value: float


class PageFamily(NamedTuple):
    """One metric: name (without the counter's `_total`), prometheus type, help, samples."""

    name: str
    kind: str
    help: str
    samples: list[PageSample]


Page = list[PageFamily]


def snapshot(registry: CollectorRegistry) -> Page:
    """All samples of `registry`, without the `_created` series that nobody reads."""
    return [
        PageFamily(
            family.name,
            family.type,
            family.documentation,
            [
                PageSample(sample.name, dict(sample.labels), sample.value)
                for sample in family.samples
                if not sample.name.endswith("_created")
            ],
        )
        for family in registry.collect()
    ]


def merge(pages: Mapping[str, Page]) -> str:
    """Prometheus' text exposition of all pages; every sample gets the label `replica`.

    Each family appears once, with one HELP and one TYPE line, whatever the number of replicas.
    """
    families: dict[str, Metric] = {}
    for replica, page in pages.items():
        for name, kind, documentation, samples in page:
            family = families.setdefault(name, Metric(name, documentation, kind))
            for sample_name, labels, value in samples:
                family.add_sample(sample_name, {**labels, "replica": replica}, value)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families.values()))
    return generate_latest(registry).decode()


class _Families(Collector):
    """Hands ready-made families to prometheus_client, which knows the format's escaping."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
