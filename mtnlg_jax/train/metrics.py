"""What a run tells: metrics.jsonl, TensorBoard, loss.png, a progress bar; and how fast it goes."""

import contextlib
import functools
import json
import math
import os
import platform
import time
import zlib
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mtnlg_jax.errors import is_passing
from mtnlg_jax.hardware import dense_flops


def peak_flops(device_flops: float | None = None) -> float | None:
    """FLOP/s of all devices together; None where one device's speed is not known.

    One device does ``device_flops``, or what `dense_flops` says of its kind. On a CPU a float32
    matrix product is timed
    instead, once for each host: the devices of a CPU share its cores.
    """
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
    product(x, x).block_until_ready()
    seconds = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * size**3 / seconds


def _hosts() -> int:
    """On how many machines the processes of this run are."""
    if jax.process_count() == 1:
        return 1
    name = np.uint32(zlib.crc32(platform.node().encode()))
    return len(np.unique(multihost_utils.process_allgather(name)))


def environment() -> dict:
    """On what this run runs: versions, devices, processes, and what the environment tells the
    compiler."""
    device = jax.devices()[0]
    told = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_", "NCCL_", "XLA_PYTHON_CLIENT_")
    packages = (
        "mtnlg_jax",
        "jax",
        "jaxlib",
        "libtpu",
        "jax-cuda12-plugin",
        "jax-cuda13-plugin",
        "flax",
        "optax",
        "orbax-checkpoint",
        "numpy",
    )
    installed = {
        found.name.lower().replace("_", "-"): found.version for found in metadata.distributions()
    }
    return {
        "versions": {"python": platform.python_version()}
        | {
            name: installed[name.replace("_", "-")]
            for name in packages
            if name.replace("_", "-") in installed
        },
        "devices": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
        },
        "processes": jax.process_count(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(told)
        },
    }


class MetricsLog:
    """metrics.jsonl and TensorBoard of a run folder; without ``writing``, only the records. A
    resume at ``step``
    forgets what was written after it: those steps will be taken, and written, again. A damaged line
    is moved to metrics.jsonl.damaged, with a warning."""

    def __init__(self, workdir: str, step: int, writing: bool = True):
        self.path = os.path.join(workdir, "metrics.jsonl")
        self.writing = writing
        records, damaged = scan_metrics(self.path)
        self.records = [record for record in records if record["step"] <= step]
        if not writing:
            return
        from tensorboardX import SummaryWriter

        if damaged:
            self._set_aside(damaged)
        beside = self.path + ".partial"
        with open(beside, "w", encoding="utf-8") as file:
            file.writelines(_line(record) for record in self.records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self._file = open(self.path, "ab", buffering=0)
        self._unwritten = b""
        self._behind = False
        self._new_board = functools.partial(
            SummaryWriter, os.path.join(workdir, "tensorboard"), flush_secs=30
        )
        self._board = self._new_board(purge_step=step + 1)

    def write(self, record: dict) -> None:
        """``record`` has "kind" (train | eval) and "step"; numbers go to TensorBoard under
        kind/name, and what is not finite is null in the file, which JSON has no number for."""
        self.records.append(record)
        if not self.writing:
            return
        self._unwritten += _line(record).encode()
        with self._outlasting():
            self._write()
            # The writer's thread ends where it cannot write, and its queue would be full before
            # long.
            if not self._board.file_writer.event_writer._worker.is_alive():
                self._board = self._new_board()
        if self._behind:
            return
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        if self.writing:
            with self._outlasting():
                self._write()
            with self._outlasting(), self._file:
                self._board.close()

    def plot(self) -> None:
        """loss.png beside the records."""
        if self.writing:
            with self._outlasting():
                plot_loss(self.records, os.path.join(os.path.dirname(self.path), "loss.png"))

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        self._behind = False

    @contextlib.contextmanager
    def _outlasting(self):
        """A full disk and the like end no run for the sake of its log: what is left is written with
        the next line."""
        try:
            yield
        except Exception as error:
            if not is_passing(error):
                raise
            if not self._behind:
                logging.warning(
                    "%s falls behind (%s): tried again with the next line", self.path, error
                )
            self._behind = True

    def _set_aside(self, damaged: dict[int, bytes]) -> None:
        with open(self.path + ".damaged", "ab") as file:
            file.writelines(line + b"\n" for line in damaged.values())
            file.flush()
            os.fsync(file.fileno())
        numbers = ", ".join(map(str, list(damaged)[:8])) + (
            f" and {len(damaged) - 8} more" if len(damaged) > 8 else ""
        )
        which = f"lines {numbers} are" if len(damaged) > 1 else f"line {numbers} is"
        logging.warning(
            "%s: %s damaged and moved to %s.damaged; all others are kept",
            self.path,
            which,
            os.path.basename(self.path),
        )


def _line(record: dict) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: str) -> list[dict]:
    """The records of a metrics.jsonl; damaged lines are left out, as one that a kill cut short. []
    without a file."""
    return scan_metrics(path)[0]


def scan_metrics(path: str) -> tuple[list[dict], dict[int, bytes]]:
    """(records, {number of a damaged line, from 1: its bytes}) of a metrics.jsonl. A record is an
    object with "kind" and a whole "step"; zero bytes, which a crash of the machine leaves between
    lines, do not count."""
    if not os.path.exists(path):
        return [], {}
    records = []
    damaged = {}
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
        and type(found.get("step")) is int
    )
    return found if whole else None


# How a training loss is called in metrics.jsonl, and what it is. The first is what the held-out
# losses are; the others are only ever compared with themselves.
TRAINING_LOSSES = {
    "loss": "cross entropy, nats a token",
    "smoothed_loss": "training objective:\ncross entropy with label smoothing",
    "distillation_loss": "training objective:\ndistillation",
}
_DECAY = 0.9  # of a neighbor's weight in the smoothed line, with each record that it is away
_REACH = 60  # records on either side
_LONG_GAP = 3  # usual distances between records, above which some are missing


def training_loss(record: dict) -> tuple[str | None, float]:
    """(its name in `TRAINING_LOSSES`, the loss of a record of training); nan where it was not
    finite, no name where the record has none."""
    name = next((name for name in TRAINING_LOSSES if name in record), None)
    value = record.get(name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return name, float(value) if number and math.isfinite(value) else math.nan


def curves(records: list[dict], objective: str, name: str) -> list[list[tuple[int, float]]]:
    """The (step, loss) of training with ``objective``, in pieces within which it went on: a stage
    without it, or records that are missing, begin another piece."""
    train = [record for record in records if record["kind"] == "train"]
    distances = sorted(
        later["step"] - earlier["step"] for earlier, later in zip(train, train[1:], strict=False)
    )
    usual = distances[len(distances) // 2] if distances else 1
    pieces = []
    stages = 0
    last = None
    before = None
    for record in train:
        if before is not None:
            stages += record.get("stage") != before.get("stage")
            # As a stage in between, so that nothing is drawn across.
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


def smoothed(losses: list[float]) -> np.ndarray:
    """[n]: at each loss the straight line through those around it, which count less the farther
    away they are. Unlike a running mean it does not lag behind where the loss falls, nor at the
    beginning; nan stays so and counts for nothing."""
    values = np.array(losses, float)
    known = np.isfinite(values).astype(float)
    values = np.where(known > 0, values, 0.0)
    reach = min(len(values) - 1, _REACH)
    away = np.arange(-reach, reach + 1)

    def around(numbers, power):
        """Sum over the neighbors of their weight x distance^power x number."""
        return np.convolve(numbers, (_DECAY ** np.abs(away) * away**power)[::-1], "full")[
            reach : reach + len(values)
        ]

    s0, s1, s2 = (around(known, power) for power in range(3))
    t0, t1 = (around(known * values, power) for power in range(2))
    spread = s0 * s2 - s1**2
    line = np.where(
        spread > 1e-9,
        (s2 * t0 - s1 * t1) / np.where(spread > 1e-9, spread, 1),
        t0 / np.maximum(s0, 1e-9),
    )
    return np.where(known > 0, line, np.nan)


def plot_loss(records: list[dict], path: str) -> None:
    """loss.png: losses of training, thin and smoothed, and of held-out text, by objective. A
    training objective that is not the cross entropy of the text has a panel of its own; steps that
    were not finite are marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    used = {training_loss(record)[0] for record in records if record["kind"] == "train"}
    panels = [name for name in TRAINING_LOSSES if name == "loss" or name in used]
    figure, rows = pyplot.subplots(
        len(panels), figsize=(8, 1.5 + 3 * len(panels)), sharex=True, squeeze=False
    )
    for name, axes in zip(panels, rows[:, 0], strict=True):
        for objective, color in {"causal": "tab:blue", "masked": "tab:orange"}.items():
            _plot_training(axes, curves(records, objective, name), color, f"{objective}, training")
            evaluations = [
                (r["step"], value)
                for r in records
                if isinstance(value := r.get(f"{objective}_loss"), int | float)
                and math.isfinite(value)
            ]
            if evaluations and name == "loss":
                axes.plot(
                    *zip(*evaluations, strict=True),
                    "o--",
                    color=color,
                    markersize=4,
                    label=f"{objective}, held out",
                )
        lost = [
            r["step"]
            for r in records
            if r["kind"] == "train"
            and training_loss(r)[0] == name
            and math.isnan(training_loss(r)[1])
        ]
        if lost:
            axes.plot(
                lost,
                [0.02] * len(lost),
                "x",
                color="tab:red",
                transform=axes.get_xaxis_transform(),
                label="not finite: no step taken",
            )
        axes.set_ylabel(TRAINING_LOSSES[name])
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    rows[-1, 0].set_xlabel("step")
    figure.tight_layout()
    beside = path + ".partial.png"
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    os.replace(beside, path)


def _plot_training(axes, pieces: list[list[tuple[int, float]]], color: str, label: str) -> None:
    for number, piece in enumerate(pieces):
        steps, losses = zip(*piece, strict=True)
        marker = "." if len(piece) < 10 else None  # a line through one point is not to be seen
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8, marker=marker)
        axes.plot(
            steps,
            smoothed(losses),
            color=color,
            marker=marker,
            label=label if number == 0 else None,
        )
