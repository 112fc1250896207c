"""Ends a process in which nothing moves, after it has said where it stands."""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque

import jax

from mtnlg_jax import errors
from mtnlg_jax.train import processes

MEDIANS = 10  # a step may take so many times the median of the last ones
# seconds after which faulthandler dumps the stacks and exits by itself: something holds Python's
# lock
GRACE = 60
# seconds that this thread was not woken for: the whole process was stopped, which is no fault
SUSPENDED = 10
STANDARD_ERROR = 2


class Watchdog:
    """While it is entered, a thread that dumps all stacks to standard error and to
    ``workdir``/stacks-PROCESS.txt and exits with code 4, when a step is not done within ``seconds``
    and 10 times the median step, or another phase (start, compilation, restore, evaluation, save)
    within ``phase_seconds``. ``seconds=0``: nothing of all that."""

    def __init__(self, seconds: float, phase_seconds: float, workdir: str):
        self.seconds = seconds
        self.phase_seconds = phase_seconds
        self.path = os.path.join(workdir, f"stacks-{jax.process_index()}.txt")
        self._phase = "start"
        self._since = time.monotonic()
        self._steps = deque(maxlen=99)
        self._over = threading.Event()

    def enter(self, phase: str) -> None:
        """From now on ``phase``; "step" again means that another one is done."""
        now = time.monotonic()
        if phase == self._phase == "step":
            self._steps.append(now - self._since)
        self._phase = phase
        self._since = now

    @property
    def limit(self) -> float:
        """Seconds that the present phase may take."""
        if self._phase != "step":
            return max(self.phase_seconds, self.seconds)
        return max(self.seconds, MEDIANS * statistics.median(self._steps or [0.0]))

    def __enter__(self):
        if self.seconds:
            with contextlib.suppress(OSError):
                os.remove(self.path)  # of a run before
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_):
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            left = self.limit - (time.monotonic() - self._since)
            if left <= 0:
                break
            if processes.several():
                faulthandler.dump_traceback_later(left + GRACE, exit=True, file=STANDARD_ERROR)
            asked = min(left, 1.0, self.seconds / 4)
            before = time.monotonic()
            if self._over.wait(asked):
                return
            asleep = time.monotonic() - before - asked
            if asleep > SUSPENDED:
                self._since += asleep
        phase = self._phase
        since = time.monotonic() - self._since
        line = (
            f"process {jax.process_index()} of {jax.process_count()}: the phase {phase!r} takes {since:.0f} s, its "
            f"limit is {self.limit:.0f} (train.watchdog_seconds, train.phase_seconds); all stacks:\n"
        )
        with contextlib.suppress(OSError), open(self.path, "w") as file:
            file.write(line)
            file.flush()
            faulthandler.dump_traceback(file)
        print(f"{line.rstrip()} in {self.path}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(STANDARD_ERROR)
        if processes.is_first() and processes.several():
            time.sleep(processes.LAST_WORDS)  # for the others to say where they stand
        processes.leave(errors.STUCK)
