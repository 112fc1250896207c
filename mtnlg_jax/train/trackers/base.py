"""The interface of a tracker, and which ones there are.

A tracker shows the numbers of a run elsewhere; metrics.jsonl has them in any case. Its methods are
called in a thread of its own (`background`), one at a time, so they may be slow, block or fail.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from mtnlg_jax.config import Config

Status = Literal["finished", "stopped", "failed"]

# Imported when a run names them, since their packages take up to seconds.
_BUILT_IN = {
    "tensorboard": "mtnlg_jax.train.trackers.tensorboard:TensorBoard",
    "wandb": "mtnlg_jax.train.trackers.weights_and_biases:WeightsAndBiases",
    "trackio": "mtnlg_jax.train.trackers.trackio_store:Trackio",
}


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """The run that a tracker shows.

    ``config`` holds its settings as JSON, without secrets. ``id`` is the same at every start of the
    run; this one goes on after ``step``, and the numbers of later steps come again.
    """

    config: dict[str, Any]
    name: str
    id: str
    project: str
    folder: str
    step: int


class Tracker(Protocol):
    """Shows the numbers of a run; it is made without arguments.

    One that can hide numbers may have a method rewind(step) as well: the run went back to ``step``
    within this start, and the numbers of later steps come again.
    """

    def check(self) -> None:
        """Raise ValueError, in one line with a way out, where the tracker cannot work: its package
        is missing, or nobody is logged in. It is called before any work."""

    def open(self, run: RunInfo) -> None:
        """Begin, or go on with, the record of ``run``."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take finite numbers by name, such as "train/loss", after ``step`` steps."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a text, such as a sample of the model's."""

    def finish(self, status: Status) -> None:
        """End the record of this start."""


def make(name: str) -> Tracker:
    """Return the tracker ``name``: one of this package, or the class of the user's "module:Class".

    Raises ValueError where the class cannot be imported or lacks a method.
    """
    path = _BUILT_IN.get(name, name)
    module, _, attribute = path.partition(":")
    try:
        tracker = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # whatever the user's module raises
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"train.trackers={name}: {what}; give module:Class of a class that Python can import "
            f"and make without arguments, or one of {', '.join(_BUILT_IN)}"
        ) from None
    missing = [
        method
        for method in ("check", "open", "log", "text", "finish")
        if not callable(getattr(tracker, method, None))
    ]
    if missing:
        raise ValueError(
            f"train.trackers={name} lacks {', '.join(missing)}; see Tracker in "
            "mtnlg_jax/train/trackers/base.py"
        )
    return tracker


def check(config: Config) -> None:
    """Raise ValueError where a tracker of ``config`` cannot be made or cannot work."""
    for name in config.train.trackers:
        make(name).check()


def check_installed(name: str, package: str, extra: str | None = None) -> None:
    """Raise ValueError if ``package`` of the tracker ``name`` cannot be imported; ``extra`` is the
    extra of this package that installs it."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        install = f'"mtnlg_jax[{extra}]"' if extra else package
        raise ValueError(
            f"train.trackers={name} needs the package {package} ({error}); install it with: pip "
            f"install {install}, or leave {name} out of train.trackers"
        ) from None
