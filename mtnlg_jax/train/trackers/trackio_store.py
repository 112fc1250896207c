"""Trackio, which keeps runs in a local SQLite file and needs neither network nor account.

The file is below TRACKIO_DIR, by default Trackio's own folder, so that "trackio show" compares the
runs of a project. TRACKIO_SPACE_ID sends them to a Hugging Face Space.
"""

import os
from collections.abc import Mapping
from typing import Any

from mtnlg_jax.train.trackers.base import RunInfo, Status, check_installed


class Trackio:
    """Writes a run of Trackio: its name ends with the id of the run, by which a start goes on."""

    def check(self) -> None:
        """Raise ValueError if trackio is not installed or, for a Space, nobody is logged in."""
        check_installed("trackio", "trackio", "trackio")
        if os.environ.get("TRACKIO_SPACE_ID"):
            from huggingface_hub import get_token

            if not get_token():
                raise ValueError(
                    "train.trackers=trackio: TRACKIO_SPACE_ID is set and nobody is logged in to "
                    "Hugging Face; run: hf auth login, or unset it to write to local files"
                )

    def open(self, run: RunInfo) -> None:
        """Begin the run, or go on with it."""
        import trackio

        self._run: Any = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.id}",
            resume="allow",
            config=run.config,
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers; a step that is done again has two rows, in the order of time."""
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text as Markdown."""
        import trackio

        self._run.log({name: trackio.Markdown(text)}, step=step)

    def finish(self, status: Status) -> None:
        """Write what is left."""
        self._run.finish()
