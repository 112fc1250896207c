"""What a simulated computation spends, by class, and its pieces."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Event:
    """A piece of a lane. ``begin`` counts from the start of its computation, in seconds."""

    name: str
    lane: str
    begin: float
    seconds: float
    label: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Loop:
    name: str
    begin: float
    seconds: float  # of all trips
    trips: float
    body: str


@dataclasses.dataclass
class Wait:
    """What computing waits for at one place of a program, in all runs of it."""

    label: str  # "wait all-gather data", or "all-gather data" where it is synchronous
    source: str
    count: float = 0.0
    seconds: float = 0.0
    bytes: float = 0.0  # of the operands


Sums = defaultdict[str, float]


def empty_sums() -> Sums:
    return defaultdict(float)


def largest_first(sums: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


@dataclasses.dataclass
class Span:
    """One run of a computation."""

    seconds: float = 0.0
    classes: Sums = dataclasses.field(default_factory=empty_sums)  # seconds of computing
    flops: Sums = dataclasses.field(default_factory=empty_sums)  # of products, by class
    waits: dict[str, Wait] = dataclasses.field(default_factory=dict)  # by instruction
    events: list[Event] = dataclasses.field(default_factory=list)  # of this computation alone
    loops: list[Loop] = dataclasses.field(default_factory=list)

    def include(self, other: "Span", times: float = 1.0) -> None:
        """Add the sums of ``other``, not its events."""
        for label, seconds in other.classes.items():
            self.classes[label] += times * seconds
        for label, flops in other.flops.items():
            self.flops[label] += times * flops
        for name, wait in other.waits.items():
            self.wait(name, wait.label, wait.source, wait.seconds, wait.bytes, wait.count, times)

    def wait(
        self,
        name: str,
        label: str,
        source: str,
        seconds: float,
        given: float,
        count: float = 1.0,
        times: float = 1.0,
    ) -> None:
        total = self.waits.setdefault(name, Wait(label, source))
        total.seconds += times * seconds
        total.bytes += times * given
        total.count += times * count
