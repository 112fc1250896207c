"""Calls of a tracker in a thread of its own: none of them ends a run or slows it."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping

from absl import logging

from mtnlg_jax.train.trackers.base import RunInfo, Status, Tracker

# Calls that wait at most; later ones are dropped while the tracker hangs.
WAITING = 2000
# Between attempts to open a tracker that failed.
REOPEN_SECONDS = 60.0
# For the last calls of all trackers at the end of a run, such as an upload.
FINISH_SECONDS = 30.0


class Background:
    """Calls ``tracker`` in a daemon thread, in order.

    What fails is lost, with one warning for each kind of failure. Calls beyond `WAITING` are
    dropped, so the memory is bounded.
    """

    def __init__(self, name: str, tracker: Tracker, run: RunInfo) -> None:
        self._name = name
        self._tracker = tracker
        self._run = run
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING)
        self._status: Status = "finished"
        self._ended = False
        self._dropped = 0
        self._warned: set[str] = set()
        # The monotonic time of the next attempt to open; None once that succeeded.
        self._open_at: float | None = 0.0
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand ``values`` over, without waiting."""
        self._put(lambda: self._tracker.log(step, values))

    def text(self, step: int, name: str, text: str) -> None:
        """Hand a text over, without waiting."""
        self._put(lambda: self._tracker.text(step, name, text))

    def rewind(self, step: int) -> None:
        """Hand over that steps after ``step`` run again, to a tracker that can hide them."""
        hide = getattr(self._tracker, "rewind", None)
        if hide is not None:
            self._put(lambda: hide(step))

    def finish(self, status: Status) -> None:
        """Hand over the end, without waiting where there is room for it."""
        self._status = status
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)
            self._ended = True

    def wait(self, deadline: float) -> None:
        """Wait until all calls are done, or for the monotonic time ``deadline``."""
        if not self._ended:
            with contextlib.suppress(queue.Full):
                self._calls.put(None, timeout=max(0.0, deadline - time.monotonic()))
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn("end", f"has not taken everything within {FINISH_SECONDS:.0f} s")
        if self._dropped:
            self._warn("sum", f"lost {self._dropped:,} records; metrics.jsonl has all")

    def _put(self, call: Callable[[], None]) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._dropped += 1
            self._warn("full", f"is {WAITING:,} records behind; further ones are dropped")

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            ready = self._ready(last=call is None)
            if call is None:
                if ready:
                    self._try("finish", lambda: self._tracker.finish(self._status))
                return
            if ready:
                self._try("log", call)
            else:
                self._dropped += 1

    def _ready(self, last: bool) -> bool:
        """Return whether the tracker is open; it is opened if that is due, or now at the
        ``last`` call of a run that was too short for another attempt."""
        if self._open_at is None:
            return True
        first = self._open_at == 0.0
        if not first and (last or time.monotonic() < self._open_at):
            return False
        if self._try("open", lambda: self._tracker.open(self._run)):
            self._open_at = None
            return True
        self._open_at = time.monotonic() + REOPEN_SECONDS
        return False

    def _try(self, what: str, call: Callable[[], None]) -> bool:
        try:
            call()
        # SystemExit as well: a tracker must not end a run.
        except BaseException as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            self._warn(what, f"failed ({what}: {line})")
            return False
        return True

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logging.warning("tracker %s %s. The run goes on without it", self._name, text)
