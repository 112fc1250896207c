"""Check when windows of the profiler open and close, and that a failure ends nothing."""

import threading

import jax
import pytest

from mtnlg_jax.config import Config, TrainConfig, validate
from mtnlg_jax.train import profiler
from mtnlg_jax.train.watchdog import Watchdog


@pytest.fixture
def traced(monkeypatch):
    """Record starts and stops in place of traces."""
    found = []

    def start(folder, profiler_options):
        found.append(("start", folder.rpartition("/")[2]))

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append(("stop",)))
    return found


def profiler_of(tmp_path, **train):
    requested = threading.Event()
    watchdog = Watchdog(0, 100, str(tmp_path))
    config = TrainConfig(steps=20, **train)
    return profiler.Profiler(config, str(tmp_path), requested, watchdog), requested


def run(made, steps, traced):
    for number in steps:
        with made.step(number, ()):
            traced.append(number)


def test_a_window_by_number_holds_its_steps(tmp_path, traced):
    made, _ = profiler_of(tmp_path, profile_steps=(3, 4))
    run(made, range(1, 7), traced)
    assert traced == [1, 2, ("start", "step_000003_process_0"), 3, 4, ("stop",), 5, 6]


def test_a_resume_in_a_window_records_the_rest_of_it(tmp_path, traced):
    made, _ = profiler_of(tmp_path, profile_steps=(3, 4))
    run(made, range(4, 6), traced)
    assert traced == [("start", "step_000004_process_0"), 4, ("stop",), 5]


def test_a_window_that_is_open_at_the_end_is_closed(tmp_path, traced):
    made, _ = profiler_of(tmp_path, profile_steps=(3, 9))
    run(made, range(1, 5), traced)
    made.close(())
    made.close(())
    assert traced.count(("stop",)) == 1 and traced[-1] == ("stop",)


def test_a_window_ends_with_its_last_step(tmp_path, traced):
    made, _ = profiler_of(tmp_path, profile_steps=(3, 4))
    for number in range(1, 6):
        run(made, [number], traced)
        made.ended(number, ())
        traced.append("saved")
    opens = ("start", "step_000003_process_0")
    assert traced[4:] == [opens, 3, "saved", 4, ("stop",), "saved", 5, "saved"]


def test_a_run_that_goes_back_before_a_window_closes_it(tmp_path, traced):
    made, _ = profiler_of(tmp_path, profile_steps=(3, 9))
    run(made, [3, 4, 5, 3, 4, 2, 3], traced)
    assert traced[1:] == [3, 4, 5, 3, 4, ("stop",), 2, 3]


def test_a_signal_opens_a_window_of_the_next_steps(tmp_path, traced):
    made, requested = profiler_of(tmp_path, profile_signal="SIGUSR1", profile_signal_steps=2)
    run(made, [1], traced)
    requested.set()
    run(made, [2], traced)
    requested.set()  # while it is open: nothing more
    run(made, [3, 4], traced)
    assert traced == [1, ("start", "step_000002_process_0"), 2, 3, ("stop",), 4]


def test_windows_by_signal_are_bounded(tmp_path, traced, caplog):
    made, requested = profiler_of(tmp_path, profile_signal="SIGUSR1", profile_signal_steps=1)
    for number in range(1, 31):
        requested.set()
        run(made, [number], traced)
    assert len([each for each in traced if each == ("stop",)]) == profiler.MOST_WINDOWS
    assert any("has recorded 10 windows" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("what", ["start", "stop"])
def test_a_profiler_that_fails_is_off_and_ends_nothing(tmp_path, traced, monkeypatch, caplog, what):
    def fail(*_, **__):
        raise RuntimeError("another session is open")

    monkeypatch.setattr(jax.profiler, f"{what}_trace", fail)
    made, requested = profiler_of(tmp_path, profile_steps=(2, 3), profile_signal="SIGUSR1")
    run(made, range(1, 6), traced)
    requested.set()
    run(made, [6], traced)
    assert [each for each in traced if isinstance(each, int)] == [1, 2, 3, 4, 5, 6]
    told = [record.getMessage() for record in caplog.records]
    assert [line for line in told if f"could not {what} (another session is open)" in line]
    assert len([each for each in traced if each == ("start", "step_000006_process_0")]) == 0


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"profile_steps": (0, 3)}, r"profile_steps=\(0, 3\) is not a first and a last step"),
        ({"profile_steps": (5, 3)}, "is not a first and a last step"),
        ({"profile_steps": (2000, 2001)}, "begins after the last step, train.steps=1000"),
        ({"profile_signal": "SIGTERM"}, "unknown train.profile_signal='SIGTERM'"),
        ({"profile_signal_steps": 9}, "is for train.profile_signal=none"),
    ],
)
def test_windows_that_cannot_be_are_refused(train, message):
    with pytest.raises(ValueError, match=message):
        validate(Config(train=TrainConfig(**train)))
