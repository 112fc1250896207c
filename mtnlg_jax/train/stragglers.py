"""Find the process that is slower than the others.

All processes wait for each other in every step, so a step takes equally long everywhere. Two things
are a process's own: the time in which it makes its part of a batch, and that of a probe, a fixed
product on its devices without collectives. Both are gathered every train.compare_every steps.
"""

import math
import os
import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mtnlg_jax.train import processes
from mtnlg_jax.train.goodput import Clock

KIND = "processes"  # of the records in metrics.jsonl
# A process is slow if it takes this many times the median of the others, twice in a row: one hiccup
# is not a fault.
SLOW = 1.5
# Slow batches matter from this share of a step on.
SHARE_OF_STEP = 0.05
_NAME_BYTES = 64
_REPEATS = 3
# (size, products in a row) of the probe, about a millisecond: (on a CPU, on an accelerator).
_SIZES = {"cpu": (192, 4), "accelerator": (2048, 16)}


class Judgement(NamedTuple):
    """The slowest of several processes: its number, its time, and the median of the others."""

    slowest: int
    seconds: float
    median: float

    @property
    def factor(self) -> float:
        """The time of the slowest over the median of the others."""
        return self.seconds / self.median if self.median > 0 else math.inf


def judge(seconds: Sequence[float]) -> Judgement | None:
    """Return the slowest of ``seconds``, one for each process; None if fewer than two are known.

    The median is that of the others, so that one slow process among two does not raise it.
    """
    known = [number for number, each in enumerate(seconds) if math.isfinite(each)]
    if len(known) < 2:
        return None
    slowest = max(known, key=lambda number: seconds[number])
    others = [seconds[number] for number in known if number != slowest]
    return Judgement(slowest, float(seconds[slowest]), float(statistics.median(others)))


class Probe:
    """A product on each device of this process, alone and without collectives."""

    def __init__(self) -> None:
        devices = jax.local_devices()
        kind = "cpu" if devices[0].platform == "cpu" else "accelerator"
        size, products = _SIZES[kind]
        dtype = jnp.float32 if kind == "cpu" else jnp.bfloat16

        def chain(x):
            return jax.lax.fori_loop(0, products, lambda _, y: y @ x, x)

        self._chain = jax.jit(chain)
        one = np.full((size, size), 1 / size, np.float32)
        self._inputs = [jax.device_put(jnp.asarray(one, dtype), device) for device in devices]
        for x in self._inputs:  # compiles
            self._chain(x).block_until_ready()

    def __call__(self) -> list[float]:
        """Return the seconds of each local device, the best of three, one device at a time."""
        seconds = []
        for x in self._inputs:
            best = math.inf
            for _ in range(_REPEATS):
                began = time.perf_counter()
                self._chain(x).block_until_ready()
                best = min(best, time.perf_counter() - began)
            seconds.append(best)
        return seconds


class Stragglers:
    """Compares the processes of a run; ``clock`` knows what batches took."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._probe: Probe | None = None
        self._hosts: list[str] = []
        self._before = (0, 0.0, 0.0)
        # By measure: the process that was beyond the limit at the last comparison.
        self._suspects: dict[str, int] = {}
        self._reported: set[tuple[str, int]] = set()

    def compare(self, step: int) -> dict[str, Any]:
        """Return the record of metrics.jsonl after ``step`` steps; all processes call this.

        Warn, in the first process, of one that was beyond the limit twice in a row.
        """
        with self._clock.during("other"):
            batch, step_seconds = self._since_before()
            probes = self._probed()
            slowest_device = int(np.argmax(probes))
            mine = np.array([batch, probes[slowest_device], slowest_device], np.float32)
            everyone = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, 3)
            self._hosts = self._hosts or _gather_hosts()
        record: dict[str, Any] = {"kind": KIND, "step": step, "step_seconds": step_seconds}
        for column, measure in enumerate(("batch", "probe")):
            found = judge(everyone[:, column].tolist())
            if found is None:
                continue
            record |= {
                f"{measure}_slowest": found.slowest,
                f"{measure}_host": self._hosts[found.slowest],
                f"{measure}_seconds": round(found.seconds, 6),
                f"{measure}_median": round(found.median, 6),
            }
            if measure == "probe":
                record["probe_device"] = int(everyone[found.slowest, 2])
            matters = measure == "probe" or (
                found.seconds - found.median > SHARE_OF_STEP * step_seconds
            )
            self._warn(measure, found, step, matters and found.factor > SLOW)
        return record

    def _since_before(self) -> tuple[float, float]:
        """Return the seconds of a batch and of a step, means since the last comparison."""
        clock = self._clock
        spent = clock.total()
        # Also what was lost: a run that goes back moves seconds of steps there, and their sum never
        # falls.
        steps = spent["steps"] + spent["data"] + spent["lost"]
        now = (clock.batches, clock.batch_seconds, steps)
        number, batch, steps = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        return (batch / number, round(steps / number, 6)) if number else (math.nan, 0.0)

    def _probed(self) -> list[float]:
        # A process whose probe fails, for example for want of memory, takes part all the same: the
        # others wait for it.
        try:
            self._probe = self._probe or Probe()
            return self._probe()
        except jax.errors.JaxRuntimeError as error:
            logging.warning("the probe of this process failed: %s", str(error).splitlines()[0])
            return [math.nan]

    def _warn(self, measure: str, found: Judgement, step: int, slow: bool) -> None:
        again = self._suspects.pop(measure, None) == found.slowest
        if slow:
            self._suspects[measure] = found.slowest
        if (
            slow
            and again
            and processes.is_first()
            and (measure, found.slowest) not in self._reported
        ):
            # Once: the records go on to tell it.
            self._reported.add((measure, found.slowest))
            what = "making its part of a batch" if measure == "batch" else "a probe on its devices"
            logging.warning(
                "after step %d process %d on %s is slow: %s took %.4g s, %.1f times the median "
                "%.4g s of the others",
                step,
                found.slowest,
                self._hosts[found.slowest],
                what,
                found.seconds,
                found.factor,
                found.median,
            )


def _gather_hosts() -> list[str]:
    """Return the name of the host of each process."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    sent = np.frombuffer(name.encode()[:_NAME_BYTES].ljust(_NAME_BYTES), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(sent), np.uint8)
    rows = everyone.reshape(-1, _NAME_BYTES)
    return [row.tobytes().decode(errors="replace").rstrip() for row in rows]
