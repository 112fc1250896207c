"""Which nodes of a run can be used, and the flags that fit them, for launch.py --replan."""

import json
import os
import subprocess
import sys

from mtnlg_jax import errors

TIMEOUT = 60  # seconds that a health check may take


class Nodes:
    """The nodes 0 to ``count`` - 1.

    ``health`` is a shell command that exits with 0 where node $MTNLG_NODE can be used; it is asked
    before every start, so that nodes return. Without it, a node is lost once its process has ended
    by itself ``strikes`` times in a row before the run did a step. A failure that all processes
    share does not count against a node, nor does one of a disk or a store, nor a signal.
    """

    def __init__(self, count: int, health: str | None, strikes: int, workdir: str) -> None:
        self.count = count
        self.health = health
        self.strikes = strikes
        self.workdir = workdir
        self._failures = dict.fromkeys(range(count), 0)
        self._starts = self._look()[0]

    def usable(self) -> list[int]:
        """Return the nodes to start on."""
        if self.health:
            return [node for node in range(self.count) if self._is_healthy(node)]
        return [node for node, failures in self._failures.items() if failures < self.strikes]

    def _is_healthy(self, node: int) -> bool:
        environment = os.environ | {"MTNLG_NODE": str(node)}
        try:
            done = subprocess.run(
                str(self.health), shell=True, env=environment, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def ended(self, codes: dict[int, int], used: int) -> None:
        """Count a start on ``used`` nodes; ``codes`` are the exit codes of the processes that ended
        by themselves, by node."""
        starts, first, last = self._look()
        if starts > self._starts and last > first:
            self._failures = dict.fromkeys(self._failures, 0)
        elif len(codes) < used:
            for node, code in codes.items():
                self._failures[node] += code not in (errors.PASSING, errors.PREEMPTED)
        self._starts = starts

    def _look(self) -> tuple[int, int, int]:
        """Return (number of starts of the run, step from which the last one went on, last step)."""
        found = []
        for name in ("starts.jsonl", "metrics.jsonl"):
            try:
                with open(os.path.join(self.workdir, name), "rb") as file:
                    lines = file.read().splitlines()
                found.append((len(lines), json.loads(lines[-1])["step"] if lines else 0))
            except (OSError, ValueError, KeyError):  # not there, or cut short
                found.append((0, 0))
        (starts, first), (_, last) = found
        return starts, first, last


def fitted(
    given: list[str], nodes: list[int], node: int, kind: str | None, whole: int
) -> tuple[int, list]:
    """Return (number of ``nodes`` to use, flags of their mesh), each of ``node`` devices.

    ``given`` are the flags of the run, which has ``whole`` nodes. Raise ValueError where no mesh
    fits.
    """
    wanted = [flag for flag in given if flag.startswith(("--config=", "--set=", "--workdir="))]
    wanted += [f"--devices={len(nodes) * node}", f"--node={node}", f"--whole={whole * node}"]
    wanted += [f"--kind={kind}"] if kind else []
    done = subprocess.run(
        [sys.executable, "-m", "mtnlg_jax.cli.processes.replan", *wanted],
        text=True,
        capture_output=True,
        check=False,
    )
    told = done.stderr.strip().splitlines()
    if done.returncode:
        raise ValueError((told or ["the planner failed"])[-1].removeprefix("error: "))
    count, *flags = done.stdout.split()
    print(f"the run goes on with {told[-1]}", file=sys.stderr, flush=True)
    return int(count), flags
