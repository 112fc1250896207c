"""The works of one request, followed from the event loop while the engine's thread does them."""

import asyncio
import collections
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Protocol

from mtnlg_jax.serve.models import Engine, Ticket
from mtnlg_jax.serve.refusals import Refused, later
from mtnlg_jax.serve.requests import (
    Busy,
    Draining,
    Event,
    Finished,
    Job,
    Result,
    Token,
    Usage,
    Work,
)

# Works of a request that the engine has at the same time; the others wait here, so that a request
# of many rows does not fill the queue for everybody.
WINDOW = 8
# Events that a reader of a stream may be behind.
MOST_BEHIND = 1024


class Watch(Protocol):
    """What counts events, for /metrics."""

    def first_token(self, seconds: float) -> None: ...

    def next_token(self, seconds: float) -> None: ...

    def finished(self, event: Finished) -> None: ...

    def slow_reader(self) -> None: ...


def refusal_of(error: Exception) -> Refused:
    """Return what a failed `submit` answers."""
    if isinstance(error, Busy):
        return later(str(error), error.retry_after, status=429, kind="rate_limit_error")
    if isinstance(error, Draining):
        return later("the server is shutting down; try again, or ask another one", 5)
    return Refused(str(error))


class Following:
    """Works of one request and their events, in the order in which they arrive.

    ``most_behind``: bound of events that nobody has taken; beyond it the request is cancelled, as
    a reader that does not read would fill the memory. None: no bound.
    """

    def __init__(
        self,
        engine: Engine,
        works: Iterable[Work],
        watch: Watch,
        most_behind: int | None = None,
    ):
        """Submit the first works.

        Raises Refused where the engine takes none: 400, 429 with Retry-After, or 503.
        """
        self._engine = engine
        self._watch = watch
        self._most_behind = most_behind
        self._loop = asyncio.get_running_loop()
        self._events: collections.deque[tuple[int, Event]] = collections.deque()
        self._arrived = asyncio.Event()
        self._left: Iterator[Work] = iter(works)
        self._next: Work | None = None
        self._tickets: dict[int, Ticket] = {}
        self._times: dict[int, tuple[float, bool]] = {}
        self._count = 0
        self._retry: asyncio.TimerHandle | None = None
        self.too_slow = False
        self._next = next(self._left, None)
        while self._next is not None and len(self._tickets) < WINDOW:
            try:
                self._submit()
            except (Busy, Draining, ValueError) as error:
                if self._tickets and isinstance(error, Busy):
                    break
                self.cancel()
                raise refusal_of(error) from None

    def _submit(self) -> None:
        """Give the next work to the engine."""
        assert self._next is not None
        index = self._count
        self._times[index] = (time.monotonic(), False)
        self._tickets[index] = self._engine.submit(self._next, self._passing(index))
        self._count += 1
        self._next = next(self._left, None)

    def _passing(self, index: int) -> Callable[[list[Event]], None]:
        """Return the callback of a work, which runs on the engine's thread."""

        def pass_on(events: list[Event]) -> None:
            try:
                self._loop.call_soon_threadsafe(self._take, index, list(events))
            except RuntimeError:  # the loop is closed: nobody is left to tell
                pass

        return pass_on

    def _take(self, index: int, events: list[Event]) -> None:
        for event in events:
            self._events.append((index, event))
            if isinstance(event, Token):
                now = time.monotonic()
                before, has_first = self._times.get(index, (now, True))
                (self._watch.next_token if has_first else self._watch.first_token)(now - before)
                self._times[index] = (now, True)
            elif isinstance(event, Finished):
                self._watch.finished(event)
                self._tickets.pop(index, None)
                self._times.pop(index, None)
        if self._most_behind is not None and len(self._events) > self._most_behind:
            if not self.too_slow:
                self._watch.slow_reader()
            self.too_slow = True
            self.cancel()
        self._refill()
        self._arrived.set()

    def _refill(self) -> None:
        """Submit further works, as others have ended."""
        self._retry = None
        while self._next is not None and len(self._tickets) < WINDOW:
            try:
                self._submit()
            except Busy as error:
                if not self._tickets:
                    # No event of ours will come, so the clock has to ask again.
                    wait = min(max(error.retry_after, 0.05), 5)
                    self._retry = self._loop.call_later(wait, self._refill)
                return
            except (Draining, ValueError) as error:
                self._next = None
                reason = refusal_of(error)
                self._events.append((self._count, _failed(reason.message)))
                self._arrived.set()
                self.cancel()
                return

    async def events(
        self, patience: float | None = None
    ) -> AsyncIterator[tuple[int, Event] | None]:
        """Yield (index of the work, event) until every work has ended.

        Yields None after each ``patience`` seconds without an event.
        """
        while True:
            while self._events:
                yield self._events.popleft()
            if self.too_slow or (not self._tickets and self._next is None):
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), patience)
            except TimeoutError:
                yield None

    def cancel(self) -> None:
        """End all works; safe to call again."""
        self._next = None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        for ticket in list(self._tickets.values()):
            ticket.cancel()


def _failed(message: str) -> Finished:
    return Finished("error", "", Usage(0, 0, 0), message)


async def result_of(engine: Engine, job: Job, watch: Watch) -> Any:
    """Return the result of a job. Cancels it where the caller is cancelled.

    Raises Refused if it is not taken or fails.
    """
    following = Following(engine, [job], watch)
    value = None
    try:
        async for each in following.events():
            if each is None:
                continue
            event = each[1]
            if isinstance(event, Result):
                value = event.value
            elif isinstance(event, Finished) and event.reason != "stop":
                raise ended(event)
    finally:
        following.cancel()
    return value


def ended(event: Finished) -> Refused:
    """Return the refusal of a work that did not end by itself."""
    if event.reason == "deadline":
        return later("the request took too long for this server; ask for less, or try later", 5)
    if event.reason == "cancelled":
        return later("the request was cancelled while the server shut down; try again", 5)
    told = event.error
    if not told or "/" in told or "\n" in told or len(told) > 200:
        # Words of a library, which may hold paths. The log has them.
        told = "the model failed; the log of the server says why"
    return Refused(told, status=500, kind="server_error")
