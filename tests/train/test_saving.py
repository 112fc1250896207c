"""Save and log through transient failures of the file system."""

import errno
import json
import os
import types
from concurrent.futures import Future

import pytest

from mtnlg_jax import errors
from mtnlg_jax.train import metrics, saving


class Disk:
    """Replaces `Checkpoints`; ``fails`` gives the result of each save, at once or in the
    background."""

    def __init__(self, *fails):
        self.fails = list(fails)
        self.saved = []
        self.pending = []

    def save(self, step):
        self.wait()
        where, number = self.fails.pop(0) if self.fails else (None, 0)
        error = OSError(number, os.strerror(number)) if where else None
        if where == "at once":
            raise error
        future = Future()
        future.set_exception(error) if error else (future.set_result(None), self.saved.append(step))
        self.pending.append(future)

    def wait(self):
        while self.pending:
            self.pending.pop(0).result()

    def is_settled(self):
        return all(future.done() for future in self.pending)


@pytest.fixture
def clock(monkeypatch):
    """Replace time by seconds that pass only by sleeping, or by hand."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    # Of this module alone: the servers of other tests run on, and ask for the time.
    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(saving, "time", clock)
    return now


@pytest.mark.parametrize("where", ["at once", "in the background"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ESTALE, errno.EIO])
def test_a_failed_save_is_retried_at_a_later_step(clock, where, number):
    disk = Disk((where, number), (where, number))
    saver = saving.Saver(disk)
    for step in range(1, 9):
        if step == 1 or saver.is_due():
            saver.save(lambda step=step: disk.save(step))
        clock[0] += 1
    saver.finish(None)
    # After a pause of 1 s, and then of 2; a failure in the background is noticed a step later.
    assert disk.saved == [4 if where == "at once" else 6]
    assert not saver.is_due()


def test_saves_within_a_pause_are_one_attempt(clock):
    disk = Disk(("at once", errno.ENOSPC))
    saver = saving.Saver(disk)
    for step in range(20):  # within the pause
        saver.save(lambda step=step: disk.save(step))
    assert disk.saved == []
    saver.finish(lambda: disk.save(20))
    assert disk.saved == [20] and clock[0] == saving.PAUSES[0]


def test_the_last_state_is_saved_before_a_run_ends(clock):
    disk = Disk(*[("in the background", errno.ENOSPC)] * 3)
    saver = saving.Saver(disk)
    saver.save(lambda: disk.save(7))
    saver.finish(lambda: disk.save(7))
    assert disk.saved == [7] and clock[0] == sum(saving.PAUSES[:3])


@pytest.mark.parametrize("where", ["at once", "in the background"])
def test_a_permanent_failure_ends_the_run(clock, where):
    saver = saving.Saver(Disk(*[(where, errno.ENOSPC)] * 99))
    with pytest.raises(OSError, match="No space") as caught:
        saver.save(lambda: saver.checkpoints.save(1))
        saver.finish(lambda: saver.checkpoints.save(1))
    assert errors.explain(caught.value)[1] == errors.PASSING and clock[0] == sum(saving.PAUSES)
    saver = saving.Saver(Disk((where, errno.EACCES)))
    with pytest.raises(PermissionError):
        saver.save(lambda: saver.checkpoints.save(1))
        saver.finish(None)


def test_with_several_processes_a_failure_is_raised_at_once(clock, monkeypatch):
    monkeypatch.setattr(saving.processes, "several", lambda: True)
    saver = saving.Saver(Disk(("at once", errno.ENOSPC)))
    assert not saver.is_due()
    with pytest.raises(OSError, match="No space"):
        saver.save(lambda: saver.checkpoints.save(1))


class Full:
    """A file on a disk that is full for a while and then takes three bytes."""

    def __init__(self, file):
        self.file = file
        self.full = False

    def write(self, data):
        if self.full is None:
            raise PermissionError(errno.EACCES, "denied")
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data[:3])

    def close(self):
        self.file.close()


def test_a_log_on_a_full_disk_loses_no_line(tmp_path):
    log = metrics.MetricsLog(str(tmp_path), 0)
    log._file = disk = Full(log._file)
    for step, disk.full in enumerate([False, True, True, False, True], 1):
        log.write({"kind": "train", "step": step, "loss": 1.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    disk.full = False
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_log_that_cannot_be_written_is_reported(tmp_path):
    log = metrics.MetricsLog(str(tmp_path), 0)
    real = log._file
    log._file = Full(log._file)
    log._file.full = None
    with pytest.raises(PermissionError):
        log.write({"kind": "train", "step": 1, "loss": 1.0})
    real.close()
