"""Check that each second of a run belongs to one class, over one start and over all of them."""

import json
import time

import pytest

from mtnlg_jax.train import goodput


class Fake:
    """A clock that tests turn."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "time", lambda: self.now)
        monkeypatch.setattr(goodput.time, "perf_counter", lambda: self.now)

    def __call__(self, seconds):
        self.now += seconds


@pytest.fixture
def passes(monkeypatch):
    return Fake(monkeypatch)


class Step:
    """The loss of a step on the devices, which ends after some looks."""

    def __init__(self, *ready):
        self.ready = list(ready)

    def is_ready(self):
        return self.ready.pop(0)


def pending(*ready):
    return (0, {"loss": Step(*ready)}, 8)


def test_every_second_has_one_class(passes):
    clock = goodput.Clock()
    passes(3)
    with clock.during("restore"):
        passes(2)
    clock.enter("steps")
    passes(10)
    with clock.during("evaluation"):
        passes(4)
        with clock.during("saving"):
            passes(1)
        passes(0.5)
    passes(5)
    found = clock.total()
    assert found == {
        **dict.fromkeys(goodput.CLASSES, 0.0),
        "other": 3,
        "restore": 2,
        "steps": 15,
        "evaluation": 4.5,
        "saving": 1,
    }
    assert sum(found.values()) == passes.now - clock.began


def test_a_failure_ends_its_class(passes):
    clock = goodput.Clock()
    with pytest.raises(ValueError), clock.during("restore"):
        passes(1)
        raise ValueError
    passes(2)
    assert clock.total()["restore"] == 1 and clock.total()["other"] == 2


@pytest.mark.parametrize(
    ("before", "waited"),
    [
        (None, 4.0),  # nothing runs
        ((0, {}, 8), 4.0),  # nor where a batch was left out
        (pending(True, True), 4.0),
        (pending(False, False), 0.0),  # the step outlasts the batch
        (pending(False, True), 2.0),
    ],
)
def test_a_batch_counts_as_data_where_the_devices_wait_for_it(passes, before, waited):
    clock = goodput.Clock()
    clock.enter("steps")
    with clock.batch(before):
        passes(4)
    found = clock.total()
    assert found["data"] == waited and found["steps"] == 4 - waited
    assert clock.batch_seconds == 4 and clock.batches == 1


def test_data_that_devices_did_not_wait_for_take_no_less_than_no_time(monkeypatch):
    looks = iter(range(1000, 2000))  # each look at the clock takes a second
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: next(looks))
    clock = goodput.Clock()
    with clock.batch(pending(False, False)):
        pass
    assert clock.seconds["data"] >= 0 and clock.seconds["steps"] > 0


def test_steps_after_the_checkpoint_of_a_rewind_are_lost(passes):
    clock = goodput.Clock()
    passes(7)
    clock.enter("steps")
    passes(10)
    clock.saved(10)
    with clock.batch(None):
        passes(1)
    passes(3)
    clock.rewound(10)
    found = clock.total()
    assert found["lost"] == pytest.approx(4)
    assert found["steps"] + found["data"] == pytest.approx(10) and sum(found.values()) == 21
    # Twice to the same one: only what came since.
    passes(2)
    clock.rewound(10)
    assert clock.total()["lost"] == pytest.approx(6)
    # To a checkpoint of an earlier start: everything.
    clock.rewound(3)
    assert clock.total()["lost"] == pytest.approx(16)


def record(start, began, seconds, step=0, **shares):
    return {
        "kind": "goodput",
        "step": step,
        "start": start,
        "began": began,
        "seconds": seconds,
    } | shares


def test_lost_steps_and_gaps_of_earlier_starts_are_counted(passes):
    # Start 0: saved at step 10 after 40 of its seconds, killed 15 s later. Start 1: killed before
    # it saved anything, 20 s after it began. This start is the third.
    records = [
        record(0, 100.0, 30.0, step=5, steps=0.5, compile=0.5),
        record(0, 100.0, 40.0, step=10, steps=0.75, compile=0.25),
    ]
    starts = [
        {"date": "1970-01-01T00:01:45+00:00"},
        {"date": "1970-01-01T00:03:20+00:00", "reached": {"step": 14, "time": 155.0}},
    ]
    now = {"reached": {"step": 12, "time": 220.0}}
    passes.now = 250.0
    clock = goodput.Clock()
    clock.enter("steps")
    passes(50)
    found = goodput.History(starts, records, now).total(clock)
    assert found == {
        **dict.fromkeys(goodput.CLASSES, 0.0),
        "compile": 10,
        "steps": 30 + 50,
        "lost": 15 + 20,
        "down": (200 - 155) + (250 - 220),
    }
    assert sum(found.values()) == 300 - 100  # since the first start
    assert sum(goodput.shares(found).values()) == pytest.approx(1)


def test_time_in_which_the_machine_was_suspended_is_down_and_not_lost(passes):
    # 40 of the seconds of start 0 had passed when it was stopped, and 100 of the day's.
    records = [record(0, 100.0, 40.0, step=10, steps=1.0, time=200.0)]
    now = {"step": 10, "reached": {"step": 10, "time": 200.0}}
    passes.now = 250.0
    clock = goodput.Clock()
    passes(50)
    found = goodput.History([{}], records, now).total(clock)
    assert found["lost"] == 0 and found["steps"] == 40 and found["down"] == 60 + 50
    assert sum(found.values()) == 300 - 100
    # A clock that was set back takes nothing away.
    records[0]["time"] = now["reached"]["time"] = 120.0
    found = goodput.History([{}], records, now).total(clock)
    assert found["lost"] == 0 and found["steps"] == 40 and found["down"] == 130
    assert sum(goodput.shares(found).values()) == pytest.approx(1)


def test_a_line_that_is_torn_within_a_letter_is_left_out(tmp_path):
    torn = '{"step": 4, "command": "鲸'.encode()[:-1]
    whole = '{"step": 4, "command": "鲸"}'.encode()
    path = tmp_path / "starts.jsonl"
    path.write_bytes(b"\n".join([b'{"step": 0}', torn, b"\0\0" + whole, b"[1]", b""]))
    found = goodput.read_starts(str(tmp_path))
    assert found == [{"step": 0}, {"step": 4, "command": "鲸"}]
    assert goodput.read_starts(str(tmp_path / "elsewhere")) == []


def test_a_clean_stop_loses_nothing(passes):
    records = [record(0, 100.0, 40.0, step=10, steps=1.0)]
    now = {"step": 10, "reached": {"step": 10, "time": 140.0}}
    passes.now = 150.0
    found = goodput.History([{}], records, now).total(goodput.Clock())
    assert found["lost"] == 0 and found["down"] == 10 and found["steps"] == 40


def test_a_record_has_shares_that_add_up_to_one(tmp_path, passes):
    first = record(0, 900.0, 60.0, step=4, steps=1.0)
    lines = [{"step": 0}, {"step": 4, "reached": {"step": 6, "time": 965.0}}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "starts.jsonl").write_text(text + "{damaged")
    clock = goodput.Clock()
    passes(11)
    clock.enter("steps")
    passes(22)
    history = goodput.history_of(str(tmp_path), [first])
    made = goodput.record_of(clock, history, 8)
    assert made["start"] == 1 and made["step"] == 8 and made["seconds"] == 33
    own = sum(made[name] for name in goodput.CLASSES)
    everything = sum(made[f"run_{name}"] for name in (*goodput.CLASSES, "down"))
    assert own == pytest.approx(1, abs=1e-5) and everything == pytest.approx(1, abs=1e-5)
    assert made["run_seconds"] == 1033 - 900
    text = goodput.described(made)
    assert text.startswith("time of this start, 33.0 s: steps 66.7%, other 33.3%\n")
    assert "since the first start, 2.2 min: steps 61.7%, down 26.3%" in text


def test_imports_count_once_they_are_asked_for():
    plain = goodput.Clock()
    assert plain.total()["other"] < 1
    goodput.count_from_process_start()
    clock = goodput.Clock()
    # pytest and JAX were imported before.
    assert time.time() - clock.began > 0.5
    assert clock.total()["other"] == pytest.approx(time.time() - clock.began, abs=0.5)
    assert goodput.Clock().total()["other"] < 1  # for one start alone
