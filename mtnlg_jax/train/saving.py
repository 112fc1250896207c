"""Retry failed saves, each time with the newest state."""

import time
from collections.abc import Callable

from absl import logging

from mtnlg_jax import errors
from mtnlg_jax.train import processes
from mtnlg_jax.train.checkpoint import Checkpoints

# Seconds before the retry after the first failure, the second, ...; after the last the run ends.
PAUSES = (1, 2, 5, 10, 30, 60)


class Saver:
    """Save through ``checkpoints``, and retry after a pause where a failure may pass.

    The run continues meanwhile; this includes failures in the background. With several processes
    any failure is raised: they end, and whoever started them starts them again.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._failures = 0  # since the last successful save
        self._retry_at: float | None = None  # on the monotonic clock
        self._left_out = False  # whether the last save was

    def is_due(self) -> bool:
        """Return whether a failed save should be retried now.

        Raise a failure that will not pass, or that came after the last pause.
        """
        # A retry would have to be agreed on by all processes at the same step.
        if processes.several():
            return False
        # Never wait here: this is called in every step, while a save is written in the background.
        if self.checkpoints.is_settled():
            self._settle()
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def save(self, save: Callable[[], None], must: bool = True) -> bool:
        """Call ``save``, which calls ``checkpoints.save`` with the newest state.

        Unless it ``must``, leave it out while an upload goes on: steps do not wait for a store, and
        no second state waits in memory.
        After a failure do nothing until its pause is over, so that saves in quick succession do not
        use up all retries. Return whether it was called and has not failed so far.
        """
        if not must and self.checkpoints.is_uploading():
            if not self._left_out:
                logging.warning(
                    "a checkpoint is left out, since the last one is still on its way to %s; "
                    "raise train.save_every",
                    self.checkpoints.folder,
                )
            self._left_out = True
            return False
        self._left_out = False
        self._settle()
        if self._retry_at is not None and time.monotonic() < self._retry_at:
            return False
        try:
            save()
        except Exception as error:
            self._take(error)
        else:
            # What may still fail in the background sets it again.
            self._retry_at = None
        return self._retry_at is None

    def finish(self, save: Callable[[], None] | None) -> None:
        """Return once all saves are on disk.

        ``save`` is called again if the last one failed; None if the newest state is not to be
        saved.
        """
        self._settle()
        # `_take` raises after the last pause, so this ends.
        while self._retry_at is not None and save is not None:
            time.sleep(max(0.0, self._retry_at - time.monotonic()))
            self.save(save)
            self._settle()

    def _settle(self) -> None:
        try:
            self.checkpoints.wait()
        except Exception as error:
            self._take(error)
        else:
            # A success counts only if no retry is due: `wait` also returns after a failure that was
            # taken.
            if self._retry_at is None:
                self._failures = 0

    def _take(self, error: Exception) -> None:
        if processes.several() or not errors.is_passing(error) or self._failures == len(PAUSES):
            raise error
        pause = PAUSES[self._failures]
        self._failures += 1
        self._retry_at = time.monotonic() + pause
        logging.warning("%s. The run goes on and saves again in %d s", error, pause)
