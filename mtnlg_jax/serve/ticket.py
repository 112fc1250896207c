"""A request that the engine accepted."""

import logging
import time
from collections.abc import Callable, Iterator

from mtnlg_jax.decode.row import Row
from mtnlg_jax.serve.requests import Event, Generation, Work

log = logging.getLogger(__name__)


class Ticket:
    """A request that was accepted. Its events end with one `Finished`, whatever happens."""

    def __init__(self, work: Work, on_events: Callable[[list[Event]], None], wake: Callable):
        self.work = work
        self.cancelled = False
        self._on_events = on_events
        self._wake = wake
        self.arrived = time.monotonic()
        self.admitted = 0.0  # when it got a slot
        self.last = 0.0  # when its last tokens came
        self.events: list[Event] = []  # of this turn
        self.row: Row | None = None
        self.slices: Iterator[object] | None = None  # of a job that began
        self.value: object = None  # what its last slice yielded

    @property
    def tokens(self) -> int:
        """The prompt's tokens, which the queue's bound counts."""
        return len(self.work.tokens) if isinstance(self.work, Generation) else 0

    def cancel(self) -> None:
        """End the request within one turn, wherever it is."""
        self.cancelled = True
        self._wake()

    def late(self, now: float) -> bool:
        """Return whether the deadline passed."""
        return self.work.deadline is not None and now >= self.work.deadline

    def send(self) -> None:
        """Hand this turn's events to the caller."""
        events = self.events
        self.events = []
        try:
            self._on_events(events)
        except Exception:
            # Nobody listens: the row must not keep its slot, and others go on.
            log.exception("a listener failed, so its request is cancelled")
            self.cancelled = True
