"""Windows of steps recorded by jax.profiler, by number (train.profile_steps) or at a signal
(train.profile_signal)."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from mtnlg_jax.config import TrainConfig
from mtnlg_jax.train import processes
from mtnlg_jax.train.watchdog import Watchdog

FOLDER = "profile"
# Windows that signals may open in one start: a trace takes megabytes for each step.
MOST_WINDOWS = 10


class Profiler:
    """Records windows of steps into RUN/profile/step_FIRST_process_P, for XProf.

    The first process records train.profile_steps; at the signal each process that got it records
    itself. A profiler that fails is reported and not used again; the run goes on.
    """

    def __init__(
        self,
        train: TrainConfig,
        workdir: str,
        requested: threading.Event,
        watchdog: Watchdog,
    ) -> None:
        self._train = train
        self._folder = os.path.join(workdir, FOLDER)
        self._requested = requested
        self._watchdog = watchdog
        # The steps of the open window; None between windows.
        self._window: range | None = None
        self._steps = train.profile_steps if processes.is_first() else None
        self._windows = 0
        self._failed = False

    @contextlib.contextmanager
    def step(self, number: int, before: Any) -> Iterator[None]:
        """Mark the body as step ``number``, counted from 1, and open a window ahead of it, or close
        one to which it does not belong.

        ``before`` are results of the step before: an open window waits for them before it closes,
        since a step is dispatched ahead of the devices.
        """
        # Before its first step again: a run that goes back must not record all of its way.
        if self._window is not None and number not in self._window:
            self._close(before)
        if self._window is None and not self._failed:
            self._open(number, before)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ended(self, number: int, after: Any) -> None:
        """Close a window whose last step is ``number``, once its results ``after`` are there: what
        the run does before its next step is not part of the window."""
        if self._window is not None and number == self._window[-1]:
            self._close(after)

    def close(self, before: Any = ()) -> None:
        """Close a window that is still open when the run ends, after ``before``; without waiting
        for anything where the run fails."""
        if self._window is not None:
            self._close(before)

    def _open(self, number: int, before: Any) -> None:
        if self._steps and self._steps[0] <= number <= self._steps[1]:
            last = self._steps[1]
            self._steps = None
        elif self._requested.is_set():
            self._requested.clear()
            if self._windows == MOST_WINDOWS:
                logging.warning(
                    "the profiler has recorded %d windows in this start; further signals do "
                    "nothing, to keep the disk free",
                    MOST_WINDOWS,
                )
                return
            self._windows += 1
            last = number + self._train.profile_signal_steps - 1
        else:
            return
        folder = os.path.join(self._folder, f"step_{number:06}_process_{jax.process_index()}")
        with self._recording("start"):
            # The step before is still running on the devices, and not part of the window.
            jax.block_until_ready(before)
            options = jax.profiler.ProfileOptions()
            # Python's own calls would make the trace large, and the steps slow.
            options.python_tracer_level = 0
            jax.profiler.start_trace(folder, profiler_options=options)
            self._window = range(number, last + 1)
            logging.info("the profiler records steps %d to %d into %s", number, last, folder)

    def _close(self, before: Any) -> None:
        self._window = None
        self._requested.clear()  # signals that came while a window was open
        with self._recording("stop"):
            jax.block_until_ready(before)
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _recording(self, what: str) -> Iterator[None]:
        """Report a failure of the profiler instead of raising it."""
        # To write a trace may take longer than a step may.
        self._watchdog.enter("profiling")
        with self._watchdog.clock.during("other"):
            try:
                yield
            except (RuntimeError, OSError, ValueError) as error:
                self._failed = True
                logging.warning(
                    "the profiler could not %s (%s) and is off; the run goes on",
                    what,
                    str(error).splitlines()[0] if str(error) else type(error).__name__,
                )
