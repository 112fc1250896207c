"""What follows a run: its trackers, opened by the first process, and the id that they share."""

import json
import math
import os
import time
import uuid
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from absl import logging

from mtnlg_jax.config import Config, to_json
from mtnlg_jax.config.privacy_rules import noise_keys
from mtnlg_jax.errors import Preempted
from mtnlg_jax.storage import write_file
from mtnlg_jax.train import processes
from mtnlg_jax.train.trackers import background, base
from mtnlg_jax.train.trackers.background import Background

FILE = "trackers.json"


class Trackers:
    """Context manager that hands the records of a run to its trackers; without ``writing`` it does
    nothing."""

    def __init__(self, config: Config, workdir: str, step: int, writing: bool) -> None:
        self._open: list[Background] = []
        if not writing or not config.train.trackers:
            return
        run = base.RunInfo(
            public_settings(config),
            os.path.basename(os.path.abspath(workdir)),
            run_id(workdir),
            config.train.tracker_project,
            workdir,
            step,
        )
        for name in config.train.trackers:
            self._open.append(Background(name, base.make(name), run))

    def log(self, record: dict[str, Any]) -> None:
        """Hand over the numbers of a record of metrics.jsonl, under kind/name.

        A list of numbers, such as one for each layer, has its position behind the name. A dict,
        such as norms by parameter, goes nowhere. Texts go with their prompts.
        """
        if not self._open:
            return
        step = record["step"]
        values = dict(_numbers(record))
        texts = [f"**{each['prompt']}**{each['text']}" for each in record.get("texts", ()) if each]
        for tracker in self._open:
            if values:
                tracker.log(step, values)
            if texts:
                tracker.text(step, record["kind"], "\n\n---\n\n".join(texts))

    def rewind(self, step: int) -> None:
        """Tell the trackers that the run went back to ``step`` within this start."""
        for tracker in self._open:
            tracker.rewind(step)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status: base.Status = "finished" if error is None else "failed"
        if isinstance(error, Preempted | KeyboardInterrupt):
            status = "stopped"
        deadline = time.monotonic() + background.FINISH_SECONDS
        for tracker in self._open:
            tracker.finish(status)
        # All end at once, so that several that hang take no longer than one.
        for tracker in self._open:
            tracker.wait(deadline)


def check(config: Config) -> None:
    """Check in the first process that the trackers of a run can work, before any work.

    Raise ValueError in every process otherwise.
    """
    processes.run_on_first(lambda: base.check(config))


def run_id(workdir: str) -> str:
    """Return the id of the run in ``workdir``, the same at every start: RUN/trackers.json.

    A new one is made where there is none; a disk on which it cannot be written does not stop the
    run.
    """
    try:
        with open(os.path.join(workdir, FILE), encoding="utf-8") as file:
            found = json.load(file)["id"]
            if isinstance(found, str) and found.isalnum():
                return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    made = uuid.uuid4().hex[:8]
    try:
        write_file(workdir, FILE, json.dumps({"id": made}).encode())
    except OSError as error:
        logging.warning("%s cannot be written (%s): a resume will have another id", FILE, error)
    return made


def public_settings(config: Config) -> dict[str, Any]:
    """Return all settings as JSON, without those of `noise_keys`."""
    settings = json.loads(to_json(config))
    for key in noise_keys(settings):
        section, _, name = key.partition(".")
        del settings[section][name]
    return settings


def _numbers(record: dict[str, Any]) -> Iterable[tuple[str, float]]:
    kind = record["kind"]
    for name, value in record.items():
        if name in ("step", "time"):
            continue
        if isinstance(value, list):
            for place, each in enumerate(value):
                if _is_finite(each):
                    yield f"{kind}/{name}/{place}", each
        elif _is_finite(value):
            yield f"{kind}/{name}", value


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
