"""Write metrics.jsonl and loss.png, and measure the devices' peak FLOP/s."""

import contextlib
import json
import math
import os
import platform
import time
import zlib
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mtnlg_jax.errors import is_passing
from mtnlg_jax.hardware import dense_flops
from mtnlg_jax.train import goodput, plots
from mtnlg_jax.train.statistics_plot import plot_statistics
from mtnlg_jax.train.trackers.following import Trackers


def peak_flops(device_flops: float | None = None) -> float | None:
    """Return the FLOP/s of all devices together; None where the speed of one is not known.

    One device reaches ``device_flops``, by default the value of `dense_flops` for its kind. On a
    CPU a float32 matrix product is timed instead, once per host: the devices of a CPU share its
    cores.
    """
    # All devices of a run are of one kind.
    device = jax.devices()[0]
    if device_flops is None and device.platform != "cpu":
        device_flops = dense_flops(device.device_kind)
    if device_flops is not None or device.platform != "cpu":
        return device_flops and device_flops * jax.device_count()
    return _timed_flops() * _hosts()


def _timed_flops() -> float:
    size = 1536
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    # The first call compiles.
    product(x, x).block_until_ready()
    seconds = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        # The best of five: other processes can only make it slower.
        seconds = min(seconds, time.perf_counter() - start)
    # A multiplication and an addition for each of size^3 terms.
    return 2 * size**3 / seconds


def _hosts() -> int:
    """Return the number of machines on which the processes of this run are."""
    if jax.process_count() == 1:
        return 1
    # Names cannot be gathered as arrays, but their checksums can.
    name = np.uint32(zlib.crc32(platform.node().encode()))
    return len(np.unique(multihost_utils.process_allgather(name)))


def environment() -> dict:
    """Return versions, devices, processes, and the environment variables that JAX and XLA read."""
    device = jax.devices()[0]
    prefixes = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_", "NCCL_", "XLA_PYTHON_CLIENT_")
    packages = (
        "mtnlg_jax jax jaxlib libtpu jax-cuda12-plugin jax-cuda13-plugin flax optax "
        "orbax-checkpoint numpy"
    ).split()
    # Read from what is installed, since importing a package to ask for its version takes seconds.
    installed = {
        found.name.lower().replace("_", "-"): found.version for found in metadata.distributions()
    }
    versions = {"python": platform.python_version()}
    for name in packages:
        if name.replace("_", "-") in installed:
            versions[name] = installed[name.replace("_", "-")]
    return {
        "versions": versions,
        "devices": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
        },
        "processes": jax.process_count(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)
        },
    }


class MetricsLog:
    """metrics.jsonl of a run folder; without ``writing``, only the records.

    What it is given goes to ``trackers`` as well. A resume at ``step`` drops the records of later
    steps, which will be run and written again. A damaged line is moved to metrics.jsonl.damaged,
    with a warning.
    """

    def __init__(
        self, workdir: str, step: int, writing: bool = True, trackers: Trackers | None = None
    ) -> None:
        self.trackers = trackers
        self.path = os.path.join(workdir, "metrics.jsonl")
        self.writing = writing
        self._drawn = False  # whether the plots show all records
        records, damaged = scan_metrics(self.path)
        # An evaluation after step n is part of the state of step n, so it stays.
        self.records = [record for record in records if record["step"] <= step]
        if not writing:
            return
        if damaged:
            self._set_aside(damaged)
        self._rewrite()
        self._behind = False

    def drop_after(self, step: int) -> None:
        """Drop the records of the steps after ``step``, which will be run and written again."""
        self.records = [record for record in self.records if record["step"] <= step]
        self._drawn = False
        if not self.writing:
            return
        self._stale = True
        with self._outlasting():
            self._file.close()
            self._write()
        if self.trackers:
            self.trackers.rewind(step)

    def write(self, record: dict) -> None:
        """Append ``record``, which has "kind" (such as train, eval, tasks) and "step", with its
        "time".

        That is in seconds since 1970 (UTC); with the dates of starts.jsonl it tells how long the
        run took. The other numbers go to the trackers under kind/name, those of statistics by layer
        under stats/name/layer, those by parameter nowhere. A number that is not finite is null in
        the file, because JSON cannot express it.
        """
        record = record | {"time": round(time.time(), 3)}
        self.records.append(record)
        self._drawn &= record["kind"] == goodput.KIND
        if not self.writing:
            return
        # The disk may have been full before: older lines go first.
        self._unwritten += _line(record).encode()
        with self._outlasting():
            self._write()
        if self.trackers:
            self.trackers.log(record)

    def has(self, kind: str, step: int) -> bool:
        """Return whether there is a record of ``kind`` after ``step``."""
        return any(record["step"] == step for record in self.records if record["kind"] == kind)

    def evaluations(self) -> list[dict]:
        """Return the records of all evaluations, those of earlier starts as well."""
        return [record for record in self.records if record["kind"] == "eval"]

    def close(self) -> None:
        """Write what is left and close the file."""
        if self.writing:
            with self._outlasting():
                try:
                    self._write()
                finally:
                    self._file.close()  # it may be closed, where records could not be dropped

    def plot(self) -> None:
        """Draw loss.png beside the records, and stats.png where there are statistics.

        Do nothing where nothing that they show came since the last call.
        """
        if self.writing and not self._drawn:
            folder = os.path.dirname(self.path)
            with self._outlasting():
                plot_loss(self.records, os.path.join(folder, "loss.png"))
                stats = [record for record in self.records if record["kind"] == "stats"]
                if stats:
                    plot_statistics(stats, os.path.join(folder, "stats.png"))
                self._drawn = True

    def _rewrite(self) -> None:
        # Whole and renamed, so that a kill leaves either the old or the new file.
        beside = self.path + ".partial"
        with open(beside, "w", encoding="utf-8") as file:
            file.writelines(_line(record) for record in self.records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        # Unbuffered: a record is with the system as soon as it is written, whatever happens to the
        # process.
        self._file = open(self.path, "ab", buffering=0)
        self._unwritten = b""
        self._stale = False

    def _write(self) -> None:
        if self._stale:  # with records that were dropped
            self._rewrite()
        while self._unwritten:
            # An unbuffered write may write a part; the rest follows, so that no line is torn.
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        self._behind = False

    @contextlib.contextmanager
    def _outlasting(self) -> Iterator[None]:
        """Suppress transient failures: a full disk must not end a run because of its log.

        What is left is written with the next record.
        """
        try:
            yield
        except Exception as error:
            if not is_passing(error):
                raise
            if not self._behind:
                logging.warning(
                    "%s is behind (%s): retrying with the next record", self.path, error
                )
            self._behind = True

    def _set_aside(self, damaged: dict[int, bytes]) -> None:
        with open(self.path + ".damaged", "ab") as file:
            file.writelines(line + b"\n" for line in damaged.values())
            file.flush()
            os.fsync(file.fileno())
        numbers = ", ".join(map(str, list(damaged)[:8]))
        if len(damaged) > 8:
            numbers += f" and {len(damaged) - 8} more"
        which = f"lines {numbers} are" if len(damaged) > 1 else f"line {numbers} is"
        logging.warning(
            "%s: %s damaged and moved to %s.damaged; all others are kept",
            self.path,
            which,
            os.path.basename(self.path),
        )


def _line(record: dict) -> str:
    finite = {
        # NaN would make a line that other JSON readers refuse.
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: str) -> list[dict]:
    """Return the records of a metrics.jsonl; [] without a file.

    Damaged lines, for example one that a kill cut short, are left out.
    """
    return scan_metrics(path)[0]


def scan_metrics(path: str) -> tuple[list[dict], dict[int, bytes]]:
    """Return (records, {number of a damaged line, from 1: its bytes}) of a metrics.jsonl.

    A record is an object with "kind" and an integer "step". Zero bytes, which a crash of the
    machine can leave between lines, are ignored.
    """
    if not os.path.exists(path):
        return [], {}
    records = []
    # Numbers of lines, because the warning names them.
    damaged = {}
    # Bytes, since a damaged line need not be UTF-8.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.strip(b"\0 \t\r\n")
            if not line:
                continue
            record = _record(line)
            if record is None:
                damaged[number] = line
            else:
                records.append(record)
    return records, damaged


def _record(line: bytes) -> dict | None:
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    whole = (
        isinstance(found, dict)
        and isinstance(found.get("kind"), str)
        # Not isinstance: a bool is an int as well.
        and type(found.get("step")) is int
    )
    return found if whole else None


# Names of training losses in metrics.jsonl, and what they are. The first can be compared with the
# held-out losses, the others only with themselves.
TRAINING_LOSSES = {
    "loss": "cross entropy, nats a token",
    "smoothed_loss": "training objective:\ncross entropy with label smoothing",
    "distillation_loss": "training objective:\ndistillation",
    "nonprivate_loss": "training loss, not private:\nmean over the examples of a step",
}
_LONG_GAP = 3  # in usual distances between records; above it some are missing


def training_loss(record: dict) -> tuple[str | None, float]:
    """Return (name in `TRAINING_LOSSES`, loss) of a training record.

    The loss is nan where it was not finite; the name is None where the record has no loss.
    """
    name = next((name for name in TRAINING_LOSSES if name in record), None)
    value = record[name] if name is not None else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return name, math.nan
    return name, float(value)


def curves(records: list[dict], objective: str, name: str) -> list[list[tuple[int, float]]]:
    """Return the (step, loss) pairs of ``objective``, in uninterrupted pieces.

    A stage without the objective, or missing records, begin another piece.
    """
    train = [record for record in records if record["kind"] == "train"]
    distances = sorted(
        later["step"] - earlier["step"] for earlier, later in zip(train, train[1:], strict=False)
    )
    # The median distance is log_every, unless that changed between starts.
    usual = distances[len(distances) // 2] if distances else 1
    pieces: list[list[tuple[int, float]]] = []
    # A counter that grows at each break; a piece ends where it has grown by more than one.
    stages = 0
    last: int | None = None
    before: dict | None = None
    for record in train:
        if before is not None:
            stages += record.get("stage") != before.get("stage")
            # Missing records count as a stage in between, so that no line is drawn across them.
            stages += 2 * (record["step"] - before["step"] > _LONG_GAP * usual)
        before = record
        found, loss = training_loss(record)
        if record.get("objective") != objective or found != name:
            continue
        if last is None or stages - last > 1:
            pieces.append([])
        pieces[-1].append((record["step"], loss))
        last = stages
    return pieces


def plot_loss(records: list[dict], path: str) -> None:
    """Plot the losses of training (thin and smoothed) and of held-out text, by objective.

    A training objective other than the cross entropy of the text has its own panel, and so have the
    held-out losses of several sources and the scores of tasks. Steps that were not finite are
    marked.
    """
    import matplotlib

    # Draws into a file and needs no display.
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    used = {training_loss(record)[0] for record in records if record["kind"] == "train"}
    # The panel of the cross entropy is always there, for the held-out losses.
    panels = [name for name in TRAINING_LOSSES if name == "loss" or name in used]
    more = plots.panels_of(records)
    heights = [3.0] * len(panels) + [plots.height_of(each.curves) for each in more]
    figure, rows = pyplot.subplots(
        len(heights),
        # Wider where a legend stands beside a panel.
        figsize=(11 if more else 8, 1.5 + sum(heights)),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
    )
    for panel, axes in zip(more, rows[len(panels) :, 0], strict=True):
        plots.draw(axes, panel)
    for name, axes in zip(panels, rows[: len(panels), 0], strict=True):
        for objective, color in {"causal": "tab:blue", "masked": "tab:orange"}.items():
            _plot_training(axes, curves(records, objective, name), color, f"{objective}, training")
            if name == "loss":
                _plot_held_out(axes, records, objective, color)
        _mark_skipped(axes, records, name)
        axes.set_ylabel(TRAINING_LOSSES[name])
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    rows[-1, 0].set_xlabel("step")
    figure.tight_layout()
    # A viewer that refreshes never sees half a picture.
    beside = path + ".partial.png"
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    os.replace(beside, path)


def _plot_held_out(axes: Any, records: list[dict], objective: str, color: str) -> None:
    points = []
    for record in records:
        loss = record.get(f"{objective}_loss")
        if isinstance(loss, int | float) and math.isfinite(loss):
            points.append((record["step"], loss))
    if points:
        steps, losses = zip(*points, strict=True)
        label = f"{objective}, held out"
        axes.plot(steps, losses, "o--", color=color, markersize=4, label=label)


def _mark_skipped(axes: Any, records: list[dict], name: str) -> None:
    train = [record for record in records if record["kind"] == "train"]
    losses = {record["step"]: training_loss(record) for record in train}
    skipped = [step for step, (found, loss) in losses.items() if found == name and math.isnan(loss)]
    if skipped:
        axes.plot(
            skipped,
            # A height on the axes and not in nats, since these steps have no loss.
            [0.02] * len(skipped),
            "x",
            color="tab:red",
            transform=axes.get_xaxis_transform(),
            label="not finite: step skipped",
        )


def _plot_training(
    axes: Any, pieces: list[list[tuple[int, float]]], color: str, label: str
) -> None:
    for number, piece in enumerate(pieces):
        steps, losses = zip(*piece, strict=True)
        marker = "." if len(piece) < 10 else None  # a line through one point would be invisible
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8, marker=marker)
        axes.plot(
            steps,
            plots.smoothed(losses),
            color=color,
            marker=marker,
            label=label if number == 0 else None,
        )
