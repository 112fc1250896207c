"""The engine: one thread that writes all requests at once, continuous batching (Yu 2022, Orca).

A turn of it: drop what was cancelled or is late; give a free slot to the next request; read at most
one chunk of one prompt; do one slice of one job; then write tokens for about ``budget`` seconds. So
a long prompt or a ranking delays the text of others by one chunk and one slice at most.

    engine = Engine(decoder, tokenizer, slots=8)
    engine.start()
    ticket = engine.submit(Generation(tokens, settings, seed), on_events)

The thread owns the device. `submit`, `Ticket.cancel` and `statistics` are for any thread.
"""

import functools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import cast

from mtnlg_jax.decode.batch import Batch
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.row import NewToken, Row
from mtnlg_jax.serve.measures import Compiles, Measures
from mtnlg_jax.serve.mirror import Mirror
from mtnlg_jax.serve.queues import FairQueue
from mtnlg_jax.serve.requests import (
    Busy,
    Draining,
    Event,
    Finished,
    Generation,
    Job,
    Reason,
    Result,
    Token,
    Usage,
    Work,
    close,
)
from mtnlg_jax.serve.ticket import Ticket

log = logging.getLogger(__name__)

BUDGET = 0.1  # seconds of steps in a turn
# Of the budget while a request waits for a slot or for its prompt to be read.
SHARE_WHILE_WAITING = 0.25
LONGEST_RETRY = 60.0
SLICE_TOKENS = 1024  # that a job scores before others may write again


class Engine:
    """Continuous batching behind a bounded queue.

    Args:
      slots: rows that write at once.
      waiting: requests that may wait for a slot; one more raises `Busy`.
      waiting_tokens: tokens of prompts, but one, that may wait together; None: 8 contexts.
      warm: compile all programs before ``ready``.
      budget: seconds of steps in a turn.
      mirror: lets other processes of the decoder's mesh do the same; see mirror.py.
      batch: further options of `Batch`.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer,
        *,
        slots: int = 8,
        waiting: int = 64,
        waiting_tokens: int | None = None,
        warm: bool = True,
        budget: float = BUDGET,
        mirror: Mirror | None = None,
        **batch,
    ):
        self.decoder = decoder
        self.tokenizer = tokenizer
        self._mirror = mirror
        if mirror is not None:
            batch["make_slots"] = mirror.make_slots
        self._make = lambda: Batch(decoder, tokenizer, slots=slots, **batch)
        self._batch = self._make()
        self._most = waiting
        self._most_tokens = 8 * self._batch.size if waiting_tokens is None else waiting_tokens
        self._warm = warm
        self._budget = budget
        self._changed = threading.Condition()
        # Those that wait for a slot.
        self._rows: FairQueue[Ticket] = FairQueue(lambda ticket: ticket.tokens)
        self._jobs: FairQueue[Ticket] = FairQueue()
        self._running: dict[Row, Ticket] = {}
        self._job: Ticket | None = None
        self._turning = False
        self._told: dict[Ticket, None] = {}  # those with events of this turn, in order
        self._thread: threading.Thread | None = None
        self._ready = False
        self._draining = False
        self._closing = False
        self._failure: BaseException | None = None
        self._cost: dict[int, float] = {}  # seconds of a step, by rows of the program
        self._mean = 1.0  # seconds of a request in a slot
        self._measures = Measures()
        self._compiles = Compiles()

    # From any thread

    def start(self) -> None:
        """Start the thread. It compiles first, and is ``ready`` then."""
        if self._thread is not None:
            raise RuntimeError("the engine was started already")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether all programs are compiled and requests are taken."""
        return self._ready and not self._draining and self._failure is None

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread; None while it runs, and after `close`."""
        return self._failure

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until all programs are compiled. Raise RuntimeError if that failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure, timeout)
        if self._failure is not None:
            raise RuntimeError(f"the engine stopped: {self._failure}") from self._failure
        return self._ready

    def submit(self, work: Work, on_events: Callable[[list[Event]], None]) -> Ticket:
        """Queue a request. ``on_events`` gets its events on the engine's thread, once a turn.

        Raises ValueError if the model cannot take it, `Busy` if the queue is full, `Draining` if
        the engine takes nothing new.
        """
        if isinstance(work, Generation):
            self._batch.check(work.tokens, work.settings)
        ticket = Ticket(work, on_events, self._wake)
        with self._changed:
            if self._draining or self._closing or self._failure is not None:
                raise Draining("the server is shutting down and takes no new request")
            self.check_room()
            self._check_weight(ticket)
            queue = self._rows if isinstance(work, Generation) else self._jobs
            queue.push(work.key, ticket)
            self._changed.notify_all()
        return ticket

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing new, and wait until all that was accepted is finished.

        Return whether it is. A ``timeout`` of 0 does not wait.
        """
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            return self._changed.wait_for(self._idle, timeout)

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._draining = True
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._compiles.close()

    def statistics(self) -> dict:
        """Return {"counters": {name: number}, "gauges": ..., "histograms": {name: {"buckets",
        "sum", "count"}}}; names end in their units."""
        batch = self._batch
        with self._changed:
            waiting = len(self._rows) + len(self._jobs)
            tokens = self._rows.weight
        gauges = {
            "ready": int(self.ready),
            "draining": int(self._draining),
            "slots": batch.slots,
            "writing_requests": batch.busy,
            "filling_requests": batch.filling,
            "waiting_requests": waiting,
            "waiting_prompt_tokens": tokens,
            "running_jobs": int(self._job is not None),
            "cache_bytes": batch.cache_bytes,
            "cache_positions": batch.length,
            # Flat once ``ready``, unless jobs compile their own.
            "programs": batch.programs,
        }
        return self._measures.report(gauges, self._compiles)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def check_room(self) -> None:
        """Raise `Busy` if no request at all would be taken now, before any work is done for one."""
        with self._changed:
            waiting = len(self._rows) + len(self._jobs)
            # A request that finds a free slot waits for one turn only.
            if waiting >= self._most + self._batch.free:
                raise self._busy(f"{waiting} requests are waiting; at most {self._most} may wait")

    def _check_weight(self, ticket: Ticket) -> None:
        """Raise `Busy` if the prompts that wait are too long together."""
        tokens = self._rows.weight
        if tokens and tokens + ticket.tokens > self._most_tokens:
            raise self._busy(
                f"{tokens} prompt tokens are waiting, the limit is {self._most_tokens}, and this "
                f"prompt has {ticket.tokens}"
            )

    def _busy(self, what: str) -> Busy:
        self._measures.counters["refused_requests"] += 1
        waiting = len(self._rows) + len(self._jobs)
        after = self._mean * (waiting + 1) / self._batch.slots
        after = min(max(1.0, math.ceil(after)), LONGEST_RETRY)
        return Busy(f"{what}; try again in {after:.0f} s", after)

    def _idle(self) -> bool:
        if self._thread is None or not self._thread.is_alive():
            return True
        # Within a turn a request may be in none of the lists for a moment.
        return not (self._turning or self._rows or self._jobs or self._running or self._job)

    # On the engine's thread

    def _run(self) -> None:
        self._compiles.watch()
        try:
            if self._warm:
                self._batch.warm(stop=lambda: self._closing)
            self._compiles.kind = "serving"
            with self._changed:
                self._ready = True
                self._changed.notify_all()
            while not self._closing:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or not self._idle())
                self._turn()
                with self._changed:
                    self._changed.notify_all()
        except BaseException as error:
            log.exception("the engine stopped")
            self._failure = error
        finally:
            self._end_all()
            with self._changed:
                self._changed.notify_all()

    def _turn(self) -> None:
        began = time.monotonic()
        self._turning = True
        self._drop(began)
        try:
            self._admit()
            if self._batch.fill():
                self._measures.counters["chunks"] += 1
            self._slice()
            self._write()
        except Exception as error:
            # The cache may be lost with the failed step, so no row can go on.
            log.exception("a turn failed")
            if self._mirror is not None:
                raise  # The other processes may be gone, or elsewhere.
            self._lose(f"the device failed: {error}")
        self._measures.counters["turns"] += 1
        self._measures.histograms["turn_seconds"].add(time.monotonic() - began)
        told = self._told
        self._told = {}
        for ticket in told:
            ticket.send()
        self._turning = False

    def _say(self, ticket: Ticket, *events: Event) -> None:
        """Keep events of a request until the turn ends."""
        ticket.events += events
        self._told[ticket] = None

    def _drop(self, now: float) -> None:
        """End what was cancelled or is late, wherever it is."""

        def over(ticket: Ticket) -> bool:
            return ticket.cancelled or ticket.late(now)

        with self._changed:
            found = [*self._rows.take(over), *self._jobs.take(over)]
        if self._job is not None and over(self._job):
            found.append(self._job)
        found += [ticket for ticket in self._running.values() if over(ticket)]
        for ticket in found:
            if ticket.row is not None:
                self._batch.drop(ticket.row)
            self._finish(ticket, "cancelled" if ticket.cancelled else "deadline")

    def _admit(self) -> None:
        """Give a free slot to the next request.

        One at a time: those with the same prompt then find its keys.
        """
        if not self._batch.free or self._batch.filling:
            return
        running = Counter(ticket.work.key for ticket in self._running.values())
        with self._changed:
            ticket = self._rows.pop(running)
        if ticket is None:
            return
        work = ticket.work
        assert isinstance(work, Generation)
        ticket.admitted = time.monotonic()
        self._measures.histograms["queue_seconds"].add(ticket.admitted - ticket.arrived)
        try:
            ticket.row = self._batch.admit(
                work.tokens,
                work.settings,
                work.seed,
                constraint=work.constraint,
                alternatives=work.alternatives,
            )
        except Exception as error:
            # It is in no list yet, so nobody else would tell it.
            self._finish(ticket, "error", str(error))
            raise
        self._running[ticket.row] = ticket

    def _slice(self) -> None:
        """Do one slice of a job."""
        if self._job is None:
            with self._changed:
                self._job = self._jobs.pop({})
            if self._job is None:
                return
            self._measures.histograms["queue_seconds"].add(time.monotonic() - self._job.arrived)
        ticket = self._job
        self._compiles.kind = "jobs"
        try:
            self._measures.counters["slices"] += 1
            self._step_job(ticket)
        except Exception as error:
            # A job is code of its own: its mistake ends itself alone.
            log.exception("a job failed")
            self._finish(ticket, "error", str(error))
        finally:
            self._compiles.kind = "serving"

    def _step_job(self, ticket: Ticket) -> None:
        work = ticket.work
        assert isinstance(work, Job)
        if ticket.slices is None:
            decoder = self.decoder._replace(block_tokens=SLICE_TOKENS)
            mirror = self._mirror
            run = work.run if mirror is None else functools.partial(mirror.slices, work.run)
            ticket.slices = iter(run(decoder))
        try:
            ticket.value = next(ticket.slices)
        except StopIteration:
            self._say(ticket, Result(ticket.value))
            self._finish(ticket, "stop")

    def _steps(self) -> int:
        """Return how many steps the next turn may take."""
        if any(row.placed and not row.new for row in self._running):
            return 1  # a first token is shown at once
        cost = self._cost.get(self._batch.rows_of_turn)
        if cost is None:
            return 1
        waits = self._batch.filling or self._rows or self._job is not None
        share = SHARE_WHILE_WAITING if waits else 1.0
        return max(2 if waits else 1, int(share * self._budget / cost))

    def _write(self) -> None:
        rows = self._batch.rows_of_turn
        if not rows:
            return
        steps = self._steps()
        began = time.monotonic()
        told = self._batch.turn(steps)
        now = time.monotonic()
        made = max((len(tokens) for _, tokens in told), default=0)
        if made:
            # The least of recent turns: others are slower by what else the machine does.
            cost = (now - began) / made
            self._cost[rows] = min(1.05 * self._cost.get(rows, math.inf), cost)
        for row, tokens in told:
            self._tell(self._running[row], tokens, now)
        for row in [row for row in self._running if row.reason]:
            reason = "deadline" if row.reason == "timeout" else row.reason
            self._finish(self._running[row], reason, row.error)

    def _tell(self, ticket: Ticket, tokens: list[NewToken], now: float) -> None:
        if not tokens:
            return
        measures = self._measures
        measures.counters["completion_tokens"] += len(tokens)
        if tokens[0].index == 0:
            measures.histograms["first_token_seconds"].add(now - ticket.arrived)
        else:
            measures.histograms["gap_seconds"].add(now - ticket.last)
        ticket.last = now
        self._say(ticket, *(Token(x.index, x.token, x.text, x.logprob, x.top) for x in tokens))

    def _finish(self, ticket: Ticket, reason: str, error: str = "") -> None:
        row = ticket.row
        new, cached, tail = (0, 0, "") if row is None else (len(row.new), row.cached, row.tail)
        measures = self._measures
        measures.counters[f"requests_{reason}"] += 1
        measures.counters["prompt_tokens"] += ticket.tokens
        measures.counters["cached_tokens"] += cached
        seconds = time.monotonic() - ticket.arrived
        measures.histograms["request_seconds"].add(seconds)
        if row is not None:
            self._running.pop(row, None)
            # Without the wait: whoever is told when to come again waits for the slots alone.
            self._mean += 0.1 * (time.monotonic() - ticket.admitted - self._mean)
        if ticket is self._job:
            self._job = None
        # A job that is cut short frees what it holds now, not when it is collected.
        close(ticket.slices)
        self._say(
            ticket, Finished(cast(Reason, reason), tail, Usage(ticket.tokens, new, cached), error)
        )

    def _lose(self, error: str) -> None:
        """End all rows with an error and begin an empty batch."""
        for ticket in list(self._running.values()):
            self._finish(ticket, "error", error)
        self._batch = self._make()

    def _end_all(self) -> None:
        """Finish whatever is left, so that nobody waits for an engine that is gone."""
        with self._changed:
            left = [*self._rows.take(lambda _: True), *self._jobs.take(lambda _: True)]
        # What a turn that failed could not send.
        for ticket in self._told:
            ticket.send()
        left += list(self._running.values())
        left += [self._job] if self._job is not None else []
        reason: Reason = "cancelled" if self._failure is None else "error"
        for ticket in left:
            if ticket.row is not None and not ticket.row.reason:
                ticket.row.end(reason)
            self._finish(ticket, reason, str(self._failure or ""))
            ticket.send()
