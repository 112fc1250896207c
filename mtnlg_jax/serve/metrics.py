"""/metrics: what the API counts itself, and the engine's own numbers, for Prometheus."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from mtnlg_jax.serve.models import Models
from mtnlg_jax.serve.requests import Finished

_FIRST = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_NEXT = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WHOLE = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
PREFIX = "mtnlg_"


class Metrics:
    """The metrics of one server; a `following.Watch`."""

    def __init__(self, models: Models):
        registry = prometheus.CollectorRegistry()
        self._registry = registry
        self._requests = prometheus.Counter(
            PREFIX + "requests",
            "Requests by route and status",
            ["route", "status"],
            registry=registry,
        )
        self._seconds = prometheus.Histogram(
            PREFIX + "request_seconds",
            "Seconds from the headers of a request to the end of its answer",
            ["route"],
            buckets=_WHOLE,
            registry=registry,
        )
        self._first = prometheus.Histogram(
            PREFIX + "time_to_first_token_seconds",
            "Seconds from the queue to the first token of a row",
            buckets=_FIRST,
            registry=registry,
        )
        self._next = prometheus.Histogram(
            PREFIX + "inter_token_seconds",
            "Seconds between two tokens of a row",
            buckets=_NEXT,
            registry=registry,
        )
        self._tokens = prometheus.Counter(
            PREFIX + "tokens",
            "Tokens of rows: of prompts, of those cached, and generated",
            ["kind"],
            registry=registry,
        )
        self._ends = prometheus.Counter(
            PREFIX + "ended", "Rows and jobs by how they ended", ["reason"], registry=registry
        )
        self._slow = prometheus.Counter(
            PREFIX + "slow_readers", "Streams that nobody read, cancelled", registry=registry
        )
        self.in_flight = prometheus.Gauge(
            PREFIX + "requests_in_flight", "Requests that are being answered", registry=registry
        )
        registry.register(_OfEngines(models))

    def text(self) -> tuple[bytes, str]:
        """Return the page and its media type."""
        return prometheus.generate_latest(self._registry), prometheus.CONTENT_TYPE_LATEST

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next.observe(seconds)

    def finished(self, event: Finished) -> None:
        self._ends.labels(event.reason).inc()
        self._tokens.labels("prompt").inc(event.usage.prompt_tokens)
        self._tokens.labels("cached").inc(event.usage.cached_tokens)
        self._tokens.labels("generated").inc(event.usage.completion_tokens)

    def slow_reader(self) -> None:
        self._slow.inc()


class _OfEngines:
    """The `Engine.statistics` of each engine."""

    def __init__(self, models: Models):
        self._models = models

    def collect(self) -> Iterator[Any]:
        families: dict[str, Any] = {}
        names = {id(model.engine): model.name for model in reversed(self._models.all)}
        for engine in self._models.engines:
            statistics = engine.statistics()
            labels = [names[id(engine)]]
            for group, kind in _KINDS.items():
                for name, value in statistics[group].items():
                    family = families.get(name)
                    if family is None:
                        family = families[name] = kind(
                            f"{PREFIX}engine_{name}",
                            f"Of the engine: {name.replace('_', ' ')}",
                            labels=["model"],
                        )
                    if group == "histograms":
                        family.add_metric(labels, _buckets(value), value["sum"])
                    else:
                        family.add_metric(labels, float(value))
        yield from families.values()

    def describe(self) -> list[Any]:
        # The engine's names are known when it has begun.
        return []


_KINDS: dict[str, Any] = {
    "counters": CounterMetricFamily,
    "gauges": GaugeMetricFamily,
    "histograms": HistogramMetricFamily,
}


def _buckets(value: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return the cumulative counts of a histogram by the upper bound as Prometheus writes it."""
    return [("+Inf" if math.isinf(bound) else str(bound), n) for bound, n in value["buckets"]]
