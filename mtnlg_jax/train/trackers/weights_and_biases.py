"""Weights & Biases, online or offline.

WANDB_MODE=offline, or the command "wandb offline", writes to RUN/wandb alone; "wandb sync" uploads
that later. Keys come from WANDB_API_KEY or from "wandb login", and never from a config.
"""

import netrc
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlparse

from mtnlg_jax.train.trackers.base import RunInfo, Status, check_installed

_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
# For wandb to begin a run, and for uploads at its end; less than `background.FINISH_SECONDS`.
TIMEOUT_SECONDS = 25.0
# Of the process, as wandb shows them: 1 is a failure.
_CODES = {"finished": 0, "stopped": 1, "failed": 1}


class WeightsAndBiases:
    """Writes a run of W&B, whose id is that of the run at every start.

    W&B refuses a step that is smaller than the last one, so each record carries "step" as a number
    of its own, which is the axis of all others. Steps that are done again are there twice, at the
    same place of the axis; "start_step" tells from which step a start went on.
    """

    def check(self) -> None:
        """Raise ValueError if wandb is not installed or, online, nobody is logged in."""
        check_installed("wandb", "wandb", "wandb")
        import wandb

        settings = wandb.setup().settings
        mode = os.environ.get("WANDB_MODE") or settings.mode
        if mode in ("offline", "disabled", "dryrun"):
            return
        if any(map(os.environ.get, _KEYS)) or settings.api_key or _in_netrc(settings.base_url):
            return
        raise ValueError(
            f"train.trackers=wandb: nobody is logged in to {settings.base_url}; run: wandb login, "
            "or set WANDB_API_KEY, or write to the run's folder alone with WANDB_MODE=offline"
        )

    def open(self, run: RunInfo) -> None:
        """Begin the run ``run.id``, or go on with it."""
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            # The command line and the paths of this machine stay here.
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            # Otherwise wandb waits at the end, and when Python exits, for as long as there is no
            # network. What was not uploaded is in the run's folder for "wandb sync".
            finish_timeout=TIMEOUT_SECONDS,
            # wandb also waits for this one when Python exits. `Background` tries again.
            init_timeout=TIMEOUT_SECONDS,
        )
        self._run: Any = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=run.folder,
            config=run.config,
            settings=settings,
        )
        self._run.config.update({"start_step": run.step}, allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers with their step."""
        self._run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text as a page."""
        import html

        import wandb

        page = wandb.Html(f"<pre style='white-space:pre-wrap'>{html.escape(text)}</pre>")
        self._run.log({name: page, "step": step})

    def finish(self, status: Status) -> None:
        """End the run; a stopped one counts as preempted."""
        if status == "stopped" and not self._run.offline:
            self._run.mark_preempting()
        self._run.finish(exit_code=_CODES[status])


def _in_netrc(url: str) -> bool:
    """Return whether the file in which "wandb login" keeps keys has one for ``url``."""
    host = urlparse(url).hostname or ""
    named = os.environ.get("NETRC")
    for path in [named] if named else ["~/.netrc", "~/_netrc"]:
        try:
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
