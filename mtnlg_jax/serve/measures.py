"""Counters and histograms of the engine, which /metrics shows."""

import bisect
import threading
from collections import Counter

import jax

# Seconds, from a step on an accelerator to a long wait on a CPU.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# The name of threads that do a job for an engine.
JOB_THREAD = "engine-job"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Histogram:
    """Counts of values by upper bound, cumulative as Prometheus has them."""

    def __init__(self, bounds: tuple[float, ...] = BOUNDS):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def read(self) -> dict:
        """Return {"buckets": [(upper bound, count up to it), ...], "sum", "count"}; the last bound
        is infinity."""
        buckets = []
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return {"buckets": buckets, "sum": self._sum, "count": total}


COUNTERS = (
    *(f"requests_{reason}" for reason in ("stop", "length", "cancelled", "deadline", "error")),
    *("refused_requests", "prompt_tokens", "cached_tokens", "completion_tokens"),
    *("turns", "chunks", "slices"),
)


class Measures:
    """What an engine counts. One thread writes; a reader may see a number one event old."""

    def __init__(self):
        # All from the start: a rate of a counter needs its 0.
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.histograms = {
            name: Histogram()
            for name in (
                "queue_seconds",  # from arrival to a slot, or to the first slice of a job
                "first_token_seconds",  # from arrival
                "gap_seconds",  # between two turns that gave a request tokens
                "request_seconds",  # from arrival to the end
                "turn_seconds",
            )
        }

    def report(self, gauges: dict, compiles: "Compiles") -> dict:
        """Return {"counters", "gauges", "histograms"}, as `Engine.statistics` tells them."""
        counters = dict(self.counters)
        for kind in ("warm", "serving", "jobs"):
            counters[f"compiles_{kind}"] = compiles.counts[kind]
        histograms = {name: each.read() for name, each in self.histograms.items()}
        return {"counters": counters, "gauges": gauges, "histograms": histograms}


class Compiles:
    """The programs compiled by one thread, that which calls `watch`, and by those of jobs.

    JAX reports each to listeners of the whole process. ``kind`` is under which they count now. The
    programs of jobs count for every engine of the process.
    """

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.kind = "warm"
        self._thread = 0
        self._closed = False
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def watch(self) -> None:
        """Count what the calling thread compiles from now on."""
        self._thread = threading.get_ident()

    def close(self) -> None:
        """Stop counting; safe to call again."""
        if not self._closed:
            jax.monitoring.unregister_event_duration_listener(self._heard)
        self._closed = True
        self._thread = 0

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event != _COMPILED:
            return
        if threading.get_ident() == self._thread:
            self.counts[self.kind] += 1
        elif threading.current_thread().name == JOB_THREAD:
            self.counts["jobs"] += 1
