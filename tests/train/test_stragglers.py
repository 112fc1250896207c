"""Find the slow process: the judgement, the warning, and two processes of which one is slowed."""

import math
import textwrap

import numpy as np
import pytest
from test_processes import run_all

from mtnlg_jax.train import goodput, stragglers


@pytest.mark.parametrize(
    ("seconds", "slowest", "median"),
    [
        ([1.0, 1.1, 5.0, 0.9], 2, 1.0),
        ([2.0, 1.0], 0, 1.0),  # the median of the other one
        ([1.0, 1.0, math.nan, 3.0], 3, 1.0),
    ],
)
def test_the_slowest_is_judged_by_the_median_of_the_others(seconds, slowest, median):
    found = stragglers.judge(seconds)
    assert found.slowest == slowest and found.median == median
    assert found.factor == max(x for x in seconds if math.isfinite(x)) / median


def test_one_process_is_not_judged():
    assert stragglers.judge([1.0]) is None and stragglers.judge([math.nan, 1.0]) is None


class Gathered:
    """Gathers the values of four processes, given those of the others."""

    def __init__(self, others):
        self.others = others
        self.calls = []

    def __call__(self, mine):
        if mine.dtype == np.uint8:
            names = [b"host-%d" % number for number in range(4)]
            return np.stack([np.frombuffer(name.ljust(64), np.uint8) for name in names])
        self.calls.append(mine)
        return np.stack([mine, *self.others.pop(0)])


@pytest.fixture
def comparing(monkeypatch):
    """Return a comparison of four processes, of which this one is the first."""

    def make(*others):
        gathered = Gathered([np.array(each, np.float32) for each in others])
        monkeypatch.setattr(stragglers.multihost_utils, "process_allgather", gathered)
        clock = goodput.Clock()
        made = stragglers.Stragglers(clock)
        monkeypatch.setattr(made, "_probed", lambda: [0.001, 0.002])
        return made, clock, gathered

    return make


def measured(clock):
    clock.batches += 10
    clock.batch_seconds += 0.1
    clock.seconds["steps"] += 1.0


SLOW_BATCH = [[0.011, 0.002, 0], [0.05, 0.002, 0], [0.009, 0.002, 0]]
SLOW_DEVICE = [[0.011, 0.002, 0], [0.01, 0.002, 0], [0.009, 0.009, 3]]
EVEN = [[0.011, 0.002, 0], [0.01, 0.002, 0], [0.009, 0.0021, 1]]


def test_a_process_that_is_slow_twice_in_a_row_is_named(comparing, caplog):
    made, clock, gathered = comparing(SLOW_BATCH, EVEN, *[SLOW_BATCH] * 3)
    told = []
    for step in (100, 200, 300, 400, 500):
        measured(clock)
        record = made.compare(step)
        told.append([each.getMessage() for each in caplog.records])
        caplog.clear()
    assert record["batch_slowest"] == 2 and record["batch_host"] == "host-2"
    assert record["batch_seconds"] == pytest.approx(0.05)
    assert record["batch_median"] == pytest.approx(0.01)
    assert record["step_seconds"] == pytest.approx(0.1, rel=0.05)
    # The slowest device of this process, and which one it is.
    assert gathered.calls[0].tolist() == pytest.approx([0.01, 0.002, 1])
    assert [len(lines) for lines in told] == [0, 0, 0, 1, 0]
    assert (
        "process 2 on host-2 is slow: making its part of a batch took 0.05 s, 5.0 times"
        in (told[3][0])
    )


def test_a_slow_device_is_named_and_a_short_batch_does_not_matter(comparing, caplog):
    made, clock, _ = comparing(SLOW_DEVICE, SLOW_DEVICE)
    for step in (100, 200):
        measured(clock)
        record = made.compare(step)
    assert record["probe_slowest"] == 3 and record["probe_device"] == 3
    (line,) = [each.getMessage() for each in caplog.records]
    assert "process 3 on host-3 is slow: a probe on its devices took 0.009 s, 4.5 times" in line

    tiny = [[0.00001, 0.002, 0], [0.0002, 0.002, 0], [0.00001, 0.002, 0]]
    caplog.clear()
    made, clock, _ = comparing(tiny, tiny)
    for step in (100, 200):
        clock.batches += 10
        clock.batch_seconds += 0.0001
        clock.seconds["steps"] += 1.0
        made.compare(step)
    assert not caplog.records  # a fifth of a thousandth of the step


def test_a_run_that_goes_back_makes_no_process_slow(comparing, caplog):
    # A fiftieth of a step more than the others: too little to matter.
    little = [[0.001, 0.002, 0], [0.003, 0.002, 0], [0.001, 0.002, 0]]
    made, clock, _ = comparing(little, little, little)
    for step in (100, 200, 300):
        clock.batches += 10
        clock.batch_seconds += 0.01
        clock.seconds["steps"] += 1.0
        if step > 100:
            clock.rewound(0)
        record = made.compare(step)
        assert record["step_seconds"] == pytest.approx(0.1, rel=0.05)
    assert not caplog.records


def test_a_probe_that_fails_leaves_the_comparison_whole(comparing, monkeypatch):
    import jax

    made, clock, gathered = comparing(EVEN)
    monkeypatch.undo()
    monkeypatch.setattr(stragglers.multihost_utils, "process_allgather", gathered)

    class Full:
        def __call__(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(stragglers, "Probe", Full)
    measured(clock)
    record = made.compare(100)
    assert record["probe_slowest"] == 3 and record["batch_slowest"] == 1


def test_the_probe_times_each_local_device():
    import jax

    found = stragglers.Probe()()
    assert len(found) == len(jax.local_devices()) and all(0 < x < 10 for x in found)


SLOWED = """
    import sys, time
    from mtnlg_jax import command
    from mtnlg_jax.config import load_config
    from mtnlg_jax.train import loop, processes, stragglers

    me, port, tiny, data, workdir = int(sys.argv[1]), *sys.argv[2:]
    real = loop.batch_at
    def batch_at(*arguments):
        if me == 1:
            time.sleep(0.1)  # as if the disk of this host were slow
        return real(*arguments)
    loop.batch_at = batch_at
    def main():
        processes.start(f"localhost:{port}", 2, me, 60, local_devices=4)
        changes = [f"data.path={data}", "train.compare_every=4", "train.eval_every=0",
                   "train.steps=12", "mesh.tensor=2"]
        loop.train(load_config(tiny, changes), workdir)
    sys.argv[1:] = []
    command.run(main)
"""


@pytest.mark.slow
def test_the_slower_of_two_processes_is_named_in_a_run(tmp_path, prepared_words):
    from pathlib import Path

    from mtnlg_jax.train.metrics import read_metrics

    data = prepared_words("the whale swam north while the old captain slept".split())
    tiny = Path(__file__).resolve().parents[2] / "configs" / "tiny.py"
    ended = run_all(textwrap.dedent(SLOWED), 2, tiny, data, tmp_path / "run")
    assert [code for code, _ in ended] == [0, 0], ended
    records = read_metrics(str(tmp_path / "run" / "metrics.jsonl"))
    found = [record for record in records if record["kind"] == stragglers.KIND]
    assert [record["step"] for record in found] == [4, 8, 12]
    for record in found:
        assert record["batch_slowest"] == 1 and record["batch_seconds"] > 0.1
        assert record["batch_median"] < record["batch_seconds"] / stragglers.SLOW
    assert "process 1 on" in ended[0][1] and "making its part of a batch" in ended[0][1]
    assert "is slow" not in ended[1][1]  # told once
