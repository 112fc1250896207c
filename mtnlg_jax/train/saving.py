"""Saves that outlast a passing failure: another one follows, of the state that is then the
newest."""

import time
from collections.abc import Callable

from absl import logging

from mtnlg_jax import errors
from mtnlg_jax.train import processes
from mtnlg_jax.train.checkpoint import Checkpoints

# Seconds before a save is tried again after the first failure, the second, ...; after the last the
# run ends.
PAUSES = (1, 2, 5, 10, 30, 60)


class Saver:
    """Saves by ``checkpoints``. Where a save fails for a reason that may pass, in the background
    too, the run goes on and saves again after a pause. With several processes any failure is
    raised: they end, and whoever started them starts them again."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self._failures = 0  # since the last save that stands
        self._again_at = None  # when to save again

    def is_due(self) -> bool:
        """Whether a save that failed is to be tried again now. Raises what will not pass, or did
        not."""
        if processes.several():
            return False
        if self.checkpoints.is_settled():
            self._settle()
        return self._again_at is not None and time.monotonic() >= self._again_at

    def save(self, save: Callable[[], None]) -> bool:
        """Calls ``save``, which calls ``checkpoints.save`` with the newest state; after a failure
        not before its pause is over, so that saves in quick succession do not use up all tries.
        Returns whether it was called and has not failed so far."""
        self._settle()
        if self._again_at is not None and time.monotonic() < self._again_at:
            return False
        try:
            save()
        except Exception as error:
            self._take(error)
        else:
            self._again_at = None
        return self._again_at is None

    def finish(self, save: Callable[[], None] | None) -> None:
        """Returns when all saves stand on the disk. ``save`` is called again where the last one
        failed; None where the newest state is not to be saved."""
        self._settle()
        while self._again_at is not None and save is not None:
            time.sleep(max(0.0, self._again_at - time.monotonic()))
            self.save(save)
            self._settle()

    def _settle(self) -> None:
        try:
            self.checkpoints.wait()
        except Exception as error:
            self._take(error)
        else:
            if self._again_at is None:
                self._failures = 0

    def _take(self, error: Exception) -> None:
        if processes.several() or not errors.is_passing(error) or self._failures == len(PAUSES):
            raise error
        pause = PAUSES[self._failures]
        self._failures += 1
        self._again_at = time.monotonic() + pause
        logging.warning("%s. The run goes on and saves again in %d s", error, pause)
