"""What a run tells: metrics.jsonl, TensorBoard, loss.png, a progress bar; and how fast it goes."""

import json
import math
import os
import platform
import time
from importlib import metadata

import jax
import jax.numpy as jnp

from mtnlg_jax.parallel.hardware import CHIPS


def peak_flops() -> float:
    """FLOP/s of all devices together: the vendor's dense bf16 figure, or, on a CPU, what a float32 matrix product
    reaches here (the devices of a CPU share its cores)."""
    device = jax.devices()[0]
    for chip in CHIPS.values():
        if any(kind in device.device_kind for kind in chip.kinds):
            return chip.flops * jax.device_count()
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


def environment() -> dict:
    """On what this run runs: versions, devices, processes, and what the environment tells the compiler."""
    device = jax.devices()[0]
    told = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_", "NCCL_", "XLA_PYTHON_CLIENT_")
    packages = ("mtnlg_jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax",
                "orbax-checkpoint", "numpy")
    installed = {found.name.lower().replace("_", "-"): found.version for found in metadata.distributions()}
    return {
        "versions": {"python": platform.python_version()} | {
            name: installed[name.replace("_", "-")] for name in packages if name.replace("_", "-") in installed},
        "devices": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "processes": jax.process_count(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(told)},
    }


class MetricsLog:
    """metrics.jsonl and TensorBoard of a run folder; without ``writing``, only the records. A resume at ``step``
    forgets what was written after it: those steps will be taken, and written, again."""

    def __init__(self, workdir: str, step: int, writing: bool = True):
        self.path, self.writing = os.path.join(workdir, "metrics.jsonl"), writing
        self.records = [r for r in read_metrics(self.path) if r["step"] <= step]
        if not writing:
            return
        from tensorboardX import SummaryWriter

        beside = self.path + ".partial"
        with open(beside, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in self.records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self._file = open(self.path, "a", buffering=1)
        self._board = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=step + 1, flush_secs=30)

    def write(self, record: dict) -> None:
        """``record`` has "kind" (train | eval) and "step"; numbers go to TensorBoard under kind/name."""
        self.records.append(record)
        if not self.writing:
            return
        self._file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        if self.writing:
            self._file.close()
            self._board.close()

    def plot(self) -> None:
        """loss.png beside the records."""
        if self.writing:
            plot_loss(self.records, os.path.join(os.path.dirname(self.path), "loss.png"))


def read_metrics(path: str) -> list[dict]:
    """The whole records of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not os.path.exists(path):
        return []
    records = []
    with open(path) as file:
        for line in file:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def plot_loss(records: list[dict], path: str) -> None:
    """loss.png: training loss by objective, thin and smoothed, and the held-out losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    colours = {"causal": "tab:blue", "masked": "tab:orange"}
    for objective, colour in colours.items():
        points = [(r["step"], r["loss"]) for r in records
                  if r["kind"] == "train" and r["objective"] == objective and math.isfinite(r["loss"])]
        if points:
            steps, losses = zip(*points, strict=True)
            smooth, mean = [], losses[0]
            for loss in losses:
                mean += 0.1 * (loss - mean)
                smooth.append(mean)
            axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(steps, smooth, color=colour, label=f"{objective}, training")
        held_out = [(r["step"], r[f"{objective}_loss"]) for r in records if f"{objective}_loss" in r]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o--", color=colour, markersize=4, label=f"{objective}, held out")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.tight_layout()
    beside = path + ".partial.png"
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    os.replace(beside, path)
