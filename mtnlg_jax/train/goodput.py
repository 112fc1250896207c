"""Goodput: which share of a run's time was spent on steps that stay.

Each second of a start belongs to one class:

- other: imports, joining the processes, opening the data, making parameters, checks, profiling;
- compile: tracing and compiling the training step, or loading it compiled;
- restore: reading a checkpoint;
- data: the devices waited for a batch;
- steps: the training steps, with what overlaps them;
- evaluation: held-out losses, tasks and samples;
- saving: handing checkpoints over, and waiting for the disk;
- lost: steps whose results did not stay, since the run went back to a checkpoint.

Steps are dispatched ahead of the devices: "steps" is the time in which the loop waits for a
result, starts a step or makes a batch while the devices are busy. Of all starts together there is
one more class:

- down: between the last sign of life of a start and the beginning of the next one, and while the
  machine was suspended.

The idea of counting so: Google's ML Productivity Goodput (2024).
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

KIND = "goodput"  # of the records in metrics.jsonl
CLASSES = ("other", "compile", "restore", "data", "steps", "evaluation", "saving", "lost")
DOWN = "down"
# Keys of a record: shares of this start, and with this prefix of all starts of the run.
ALL_STARTS = "run_"

_process_began: float | None = None


def count_from_process_start() -> None:
    """Let the next `Clock` begin with this process, so that imports count; else it begins with
    itself."""
    global _process_began
    _process_began = time.time() - _process_age()


def _process_age() -> float:
    """Return the seconds since this process was started; 0 where the system does not tell."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            # Behind the name, which may contain spaces; 22nd field: ticks after the machine's boot.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="ascii") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


class Clock:
    """Seconds by class since ``began`` (seconds since 1970), which add up to those that passed."""

    def __init__(self) -> None:
        global _process_began
        now = time.time()
        self.began = now if _process_began is None else _process_began
        _process_began = None
        self.seconds = dict.fromkeys(CLASSES, 0.0)
        self.seconds["other"] = max(0.0, now - self.began)
        # Of making batches, whether or not a device waited for them; see `stragglers`.
        self.batch_seconds = 0.0
        self.batches = 0
        self._class = "other"
        self._since = time.perf_counter()
        # Seconds of `steps` and `data` when the state after a step was handed over for saving.
        self._saved: dict[int, float] = {}

    def enter(self, name: str) -> str:
        """Count from now on as class ``name``; return the class that ends."""
        now = time.perf_counter()
        before = self._class
        self.seconds[before] += now - self._since
        self._since = now
        self._class = name
        return before

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Count the body as class ``name``."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    @contextlib.contextmanager
    def batch(self, pending: tuple[int, Mapping[str, Any], int] | None) -> Iterator[None]:
        """Count the making of a batch: as data, unless the devices are busy with the ``pending``
        step (`Reporter.pending`) meanwhile.

        A step that ends meanwhile leaves half of it to each class, since nobody saw the moment.
        """
        busy_before = _is_busy(pending)
        with self.during("data"):
            # Inside, so that what is hidden is no more than what was counted.
            began = time.perf_counter()
            yield
            seconds = time.perf_counter() - began
        self.batch_seconds += seconds
        self.batches += 1
        hidden = (busy_before + _is_busy(pending)) / 2 * seconds
        self.seconds["data"] -= hidden
        self.seconds["steps"] += hidden

    def saved(self, step: int) -> None:
        """Remember when the state after ``step`` was saved."""
        self.enter(self._class)
        self._saved[step] = self.seconds["steps"] + self.seconds["data"]

    def rewound(self, step: int) -> None:
        """Count as lost what was spent on steps since the state after ``step`` was saved, because
        the run goes back to it; all steps of this start if it was not saved here."""
        self.enter(self._class)
        spent = self.seconds["steps"] + self.seconds["data"]
        lost = max(0.0, spent - self._saved.get(step, 0.0))
        for name in ("steps", "data"):
            # Of both classes in proportion: nobody knows which of them took it.
            part = lost * self.seconds[name] / spent if spent else 0.0
            self.seconds[name] -= part
            self.seconds["lost"] += part

    def total(self) -> dict[str, float]:
        """Return the seconds of each class until now."""
        self.enter(self._class)
        return dict(self.seconds)


def _is_busy(pending: tuple[int, Mapping[str, Any], int] | None) -> bool:
    # A step whose batch is left out has no metrics.
    return pending is not None and not all(x.is_ready() for x in pending[1].values())


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each class; they add up to 1."""
    total = sum(seconds.values())
    return {name: value / total if total else 0.0 for name, value in seconds.items()}


class History:
    """Seconds by class of the earlier starts of a run.

    ``starts`` are the lines of starts.jsonl up to the one before this start's, which is ``now``;
    ``records`` those of metrics.jsonl that are left. What a start did after its last record that is
    left was done again: it counts as lost, up to its last sign of life.
    """

    def __init__(self, starts: list[dict], records: Iterable[dict], now: dict | None) -> None:
        kept = {
            record["start"]: record
            for record in records
            if record["kind"] == KIND and isinstance(record.get("start"), int)
        }
        self.number = len(starts)
        self.began: float | None = None
        self.seconds = dict.fromkeys(CLASSES, 0.0)
        self._end: float | None = None
        later = [*starts, now or {}][1:]
        self._down = 0.0
        for number, (start, following) in enumerate(zip(starts, later, strict=True)):
            record = kept.get(number)
            began = record["began"] if record else _date(start)
            if began is None:
                continue
            self._open(began)
            counted = began
            at = began
            if record:
                counted += record["seconds"]
                # By the time of day, as what follows. Where that is ahead of the seconds
                # counted, the machine was suspended, or its clock was set.
                at = record.get("time", counted)
                self._down += max(0.0, at - counted)
                for name in CLASSES:
                    self.seconds[name] += record["seconds"] * record.get(name, 0.0)
            reached = (following.get("reached") or {}).get("time")
            # A start that wrote no record shows the time of the start before it.
            self._end = max(at, reached or at)
            self.seconds["lost"] += self._end - at

    def _open(self, began: float) -> None:
        if self.began is None:
            self.began = began
        if self._end is not None:
            self._down += max(0.0, began - self._end)

    def total(self, clock: Clock) -> dict[str, float]:
        """Return the seconds of each class, and those down, with this start's ``clock``."""
        own = clock.total()
        down = self._down
        if self._end is not None:
            down += max(0.0, clock.began - self._end)
        return {name: own[name] + self.seconds[name] for name in CLASSES} | {DOWN: down}


def _date(start: dict) -> float | None:
    try:
        return datetime.fromisoformat(start["date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def read_starts(workdir: str) -> list[dict]:
    """Return the lines of starts.jsonl; damaged ones are left out, and [] without a file."""
    try:
        with open(os.path.join(workdir, "starts.jsonl"), "rb") as file:
            return starts_of(file.read())
    except OSError:
        return []


def starts_of(content: bytes) -> list[dict]:
    """Return the lines of a starts.jsonl without damaged ones: a start whose line is torn has done
    nothing, and the next line repeats what it changed."""
    found = []
    # Bytes, since a line may be torn within a letter.
    for line in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            start = json.loads(line.strip(b"\0"))
            if isinstance(start, dict):
                found.append(start)
    return found


def history_of(workdir: str, records: Iterable[dict]) -> History:
    """Return what the earlier starts of the run took; the last line of starts.jsonl is that of
    this start."""
    starts = read_starts(workdir)
    return History(starts[:-1], records, starts[-1] if starts else None)


def record_of(clock: Clock, history: History, step: int) -> dict[str, Any]:
    """Return the record of metrics.jsonl after ``step`` steps: shares of this start by class, and
    those of all starts under `ALL_STARTS`."""
    own = clock.total()
    everything = history.total(clock)
    return {
        "kind": KIND,
        "step": step,
        "start": history.number,
        "began": round(clock.began, 3),
        "seconds": round(sum(own.values()), 3),
        **{name: round(share, 6) for name, share in shares(own).items()},
        f"{ALL_STARTS}seconds": round(sum(everything.values()), 3),
        **{f"{ALL_STARTS}{name}": round(share, 6) for name, share in shares(everything).items()},
    }


def described(record: Mapping[str, Any]) -> str:
    """Return the shares of a record as text, the largest first."""
    line = f"time of this start, {_duration(record['seconds'])}: {_listed(record, '', CLASSES)}"
    if not record["start"]:
        return line
    everything = _listed(record, ALL_STARTS, (*CLASSES, DOWN))
    seconds = record[f"{ALL_STARTS}seconds"]
    return f"{line}\nsince the first start, {_duration(seconds)}: {everything}"


def _listed(record: Mapping[str, Any], prefix: str, names: tuple[str, ...]) -> str:
    found = sorted(names, key=lambda name: -record[prefix + name])
    shown = [name for name in found if record[prefix + name] >= 0.0005]
    return ", ".join(f"{name} {record[prefix + name]:.1%}" for name in shown)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
