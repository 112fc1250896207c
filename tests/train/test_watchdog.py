"""A process that makes no progress dumps its stacks and exits."""

import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from mtnlg_jax import errors
from mtnlg_jax.train.watchdog import Watchdog

STUCK = """
    import sys, time
    from mtnlg_jax.train.watchdog import Watchdog
    def waits_forever():
        time.sleep(60)
    with Watchdog(0.5, 1.0, sys.argv[1]) as watchdog:
        if sys.argv[2] == "step":
            for _ in range(3):
                watchdog.enter("step")
        else:
            watchdog.enter("step")
            watchdog.enter(sys.argv[2])
        waits_forever()
"""


@pytest.mark.parametrize("phase", ["step", "saving"])
def test_all_stacks_are_dumped(tmp_path, phase):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STUCK), tmp_path, phase],
        text=True,
        timeout=50,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == errors.STUCK, done.stderr
    written = (tmp_path / "stacks-0.txt").read_text()
    for text in (done.stderr, written):
        assert f"process 0 of 1: the phase '{phase}' has taken" in text and "waits_forever" in text


def test_time_limits(tmp_path, monkeypatch):
    now = [0.0]
    # Of this module alone: the servers of other tests run on, and ask for the time.
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("mtnlg_jax.train.watchdog.time", clock)
    watchdog = Watchdog(30.0, 600.0, str(tmp_path))
    assert watchdog.limit == 600
    watchdog.enter("compilation")
    now[0] = 400.0
    watchdog.enter("step")
    assert watchdog.limit == 30  # the compilation does not count as a step
    for seconds in (5, 7, 100):
        now[0] += seconds
        watchdog.enter("step")
    assert watchdog.limit == 70  # ten times the median
    watchdog.enter("evaluation or saving")
    assert watchdog.limit == 600


def test_a_disabled_watchdog_starts_no_thread(tmp_path):
    import threading

    before = threading.active_count()
    with Watchdog(0.0, 600.0, str(tmp_path)):
        assert threading.active_count() == before
    with Watchdog(5.0, 600.0, str(tmp_path)):
        assert threading.active_count() == before + 1
