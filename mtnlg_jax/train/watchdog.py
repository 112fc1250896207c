"""End a process that no longer makes progress, after it has dumped its stacks."""

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
from mtnlg_jax.train.goodput import Clock

STEP_MEDIANS = 10  # a step may take this many times the median of recent steps
# After this many more seconds faulthandler dumps the stacks and exits by itself: something holds
# Python's lock, so the watchdog thread cannot run.
GRACE_SECONDS = 60
# The watchdog thread woke this many seconds late: the whole process was suspended, which is not a
# fault.
SUSPENDED_SECONDS = 10
STANDARD_ERROR = 2


class Watchdog:
    """Context manager: a thread that exits with code 4 when a phase takes too long.

    A step must end within ``seconds`` and within 10 times the median step; any other phase (start,
    compilation, restore, evaluation, save) within ``phase_seconds``. Before it exits, the thread
    dumps all stacks to standard error and to ``workdir``/stacks-PROCESS.txt. ``seconds=0`` disables
    it. ``clock`` counts the time of the same process by class.
    """

    def __init__(self, seconds: float, phase_seconds: float, workdir: str) -> None:
        self.seconds = seconds
        self.phase_seconds = phase_seconds
        self.clock = Clock()
        self.path = os.path.join(workdir, f"stacks-{jax.process_index()}.txt")
        self._phase = "start"
        self._since = time.monotonic()
        self._steps: deque[float] = deque(maxlen=99)
        self._over = threading.Event()

    def enter(self, phase: str) -> None:
        """Start ``phase``. "step" after "step" means that a step is done."""
        now = time.monotonic()
        # The first step of a series is not measured: it includes what came before it, such as a
        # compilation.
        if phase == self._phase == "step":
            self._steps.append(now - self._since)
        self._phase = phase
        self._since = now

    @property
    def limit(self) -> float:
        """Return the seconds that the current phase may take."""
        if self._phase != "step":
            return max(self.phase_seconds, self.seconds)
        # The median ignores a few slow steps; with long steps it raises the limit above
        # ``seconds``.
        return max(self.seconds, STEP_MEDIANS * statistics.median(self._steps or [0.0]))

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            with contextlib.suppress(OSError):
                os.remove(self.path)  # from an earlier start
            # A daemon, so that it does not keep a finished process alive.
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            left = self.limit - (time.monotonic() - self._since)
            if left <= 0:
                break
            if processes.several():
                # This works without Python's lock, unlike this thread.
                # Set again at every look, so it only fires when this thread cannot look any more.
                faulthandler.dump_traceback_later(
                    left + GRACE_SECONDS, exit=True, file=STANDARD_ERROR
                )
            # At most a second, so that a phase entered meanwhile with a shorter limit is noticed.
            pause = min(left, 1.0, self.seconds / 4)
            before = time.monotonic()
            if self._over.wait(pause):
                return
            late = time.monotonic() - before - pause
            if late > SUSPENDED_SECONDS:
                # A laptop's sleep or a stopped process is not counted as progress that is missing.
                self._since += late
        self._dump_and_exit()

    def _dump_and_exit(self) -> None:
        elapsed = time.monotonic() - self._since
        line = (
            f"process {jax.process_index()} of {jax.process_count()}: the phase {self._phase!r} "
            f"has taken {elapsed:.0f} s, its limit is {self.limit:.0f} (train.watchdog_seconds, "
            "train.phase_seconds); all stacks:\n"
        )
        # To a file first, since standard error may be a pipe that nobody reads.
        with contextlib.suppress(OSError), open(self.path, "w") as file:
            file.write(line)
            file.flush()
            faulthandler.dump_traceback(file)
        print(f"{line.rstrip()} in {self.path}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(STANDARD_ERROR)
        if processes.is_first() and processes.several():
            time.sleep(processes.EXIT_DELAY_SECONDS)  # the others report their stacks meanwhile
        processes.exit_now(errors.STUCK)
