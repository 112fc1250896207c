"""TensorBoard: event files in RUN/tensorboard, written by tensorboardX."""

import functools
import os
from collections.abc import Mapping
from typing import Any

from mtnlg_jax.train.trackers.base import RunInfo, Status

FOLDER = "tensorboard"


class TensorBoard:
    """Writes event files. It survives a full disk: what comes meanwhile is lost."""

    def check(self) -> None:
        """Always works: tensorboardX comes with this package."""

    def open(self, run: RunInfo) -> None:
        """Open a new file beside those of earlier starts."""
        from tensorboardX import SummaryWriter

        self._new_board: Any = functools.partial(
            SummaryWriter, os.path.join(run.folder, FOLDER), flush_secs=30
        )
        # TensorBoard hides what an earlier start wrote for the steps that run again.
        self._board = self._new_board(purge_step=run.step + 1)
        self._rewinds = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers as scalars."""
        self._revive()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Add a text, which TensorBoard shows as Markdown."""
        self._revive()
        self._board.add_text(name, text, step)

    def rewind(self, step: int) -> None:
        """Hide what was written for steps after ``step``, which run again in this start."""
        self._board.close()
        self._rewinds += 1
        # A name behind those of all files before it, also within one second: TensorBoard reads
        # files in the order of their names.
        suffix = f".{self._rewinds:06}"
        self._board = self._new_board(purge_step=step + 1, filename_suffix=suffix)

    def finish(self, status: Status) -> None:
        """Close the file."""
        self._board.close()

    def _revive(self) -> None:
        # The writer's thread ends after a failed write, and then its queue would fill up.
        if not self._board.file_writer.event_writer._worker.is_alive():
            self._board = self._new_board()
