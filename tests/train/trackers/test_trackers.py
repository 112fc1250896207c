"""Check what trackers are given, that none of them ends or slows a run, and the real packages."""

import contextlib
import dataclasses
import glob
import json
import os
import struct
import sys
import threading
import time
from pathlib import Path

import pytest

from mtnlg_jax.config import Config, OptimizerConfig, TrainConfig, validate
from mtnlg_jax.errors import Preempted
from mtnlg_jax.train.metrics import MetricsLog, read_metrics
from mtnlg_jax.train.trackers import background, base, following
from mtnlg_jax.train.trackers.tensorboard import TensorBoard

SPEC = f"{__name__}:Remembers"


class Remembers:
    """A user's tracker."""

    calls: list = []
    fails: tuple = ()

    def check(self):
        self.do("check")

    def open(self, run):
        self.do("open", run)

    def log(self, step, values):
        self.do("log", step, dict(values))

    def text(self, step, name, text):
        self.do("text", step, name, text)

    def finish(self, status):
        self.do("finish", status)

    def do(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.fails:
            raise RuntimeError(f"no {name} today")


class Again(Remembers):
    pass


class Third(Remembers):
    pass


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(Remembers, "calls", [])
    monkeypatch.setattr(Remembers, "fails", ())
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Remembers.__module__])
    return Remembers.calls


def config_of(*trackers, **optimizer):
    return Config(
        optimizer=OptimizerConfig(**optimizer),
        train=TrainConfig(trackers=trackers, tracker_project="whales"),
    )


def train(step, loss=1.5):
    return {"kind": "train", "step": step, "loss": loss, "stage": "one", "skipped": 0}


def follow(workdir, records, step=0, config=None):
    with following.Trackers(config or config_of(SPEC), str(workdir), step, True) as trackers:
        log = MetricsLog(str(workdir), step, True, trackers)
        for record in records:
            log.write(record)
        log.close()


def test_a_tracker_is_given_the_run_its_numbers_and_its_texts(tmp_path, calls):
    texts = [{"prompt": "the whale", "text": " swam"}]
    stats = {"kind": "stats", "step": 2, "grads": [0.5, None, 2.0]}
    follow(tmp_path, [train(1), {"kind": "samples", "step": 2, "texts": texts}, stats])
    (_, run), *rest = calls
    assert (run.name, run.project, run.step) == (tmp_path.name, "whales", 0)
    assert run.config["train"]["steps"] == 1000
    assert rest == [
        ("log", 1, {"train/loss": 1.5, "train/skipped": 0}),
        ("text", 2, "samples", "**the whale** swam"),
        ("log", 2, {"stats/grads/0": 0.5, "stats/grads/2": 2.0}),
        ("finish", "finished"),
    ]
    # Another start: the same id, after another step.
    calls.clear()
    follow(tmp_path, [train(2)], step=1)
    assert calls[0][1].id == run.id and calls[0][1].step == 1


@pytest.mark.parametrize(
    ("error", "status"), [(Preempted("stop"), "stopped"), (ValueError("bad"), "failed")]
)
def test_the_end_of_a_start_is_told(tmp_path, calls, error, status):
    with pytest.raises(type(error)):
        with following.Trackers(config_of(SPEC), str(tmp_path), 0, True):
            raise error
    assert calls[-1] == ("finish", status)


def test_only_the_first_process_tracks(tmp_path, calls):
    with following.Trackers(config_of(SPEC), str(tmp_path), 0, False) as trackers:
        trackers.log(train(1))
    assert calls == [] and os.listdir(tmp_path) == []


def test_no_secret_reaches_a_tracker():
    private = {"dp_noise_multiplier": 1.0}
    named = following.public_settings(config_of(**private, dp_secret="/keys/secret"))
    assert "secret" not in json.dumps(named) and named["train"]["seed"] == 0
    # Without a file the noise is drawn from the seed.
    assert "seed" not in following.public_settings(config_of(**private))["train"]


@pytest.mark.parametrize("fails", ["open", "log", "finish"])
def test_a_tracker_that_fails_ends_nothing(tmp_path, calls, monkeypatch, caplog, fails):
    monkeypatch.setattr(Remembers, "fails", (fails,))
    follow(tmp_path, [train(1), train(2), train(3)])
    assert [record["step"] for record in read_metrics(str(tmp_path / "metrics.jsonl"))] == [1, 2, 3]
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if f"failed ({fails}: no {fails} today)" in line]) == 1
    # It is not opened again for each record.
    assert len([call for call in calls if call[0] == "open"]) == 1


def test_a_tracker_that_hangs_slows_nothing(tmp_path, calls, monkeypatch, caplog):
    going = threading.Event()
    monkeypatch.setattr(Remembers, "log", lambda self, step, values: going.wait(20))
    monkeypatch.setattr(background, "WAITING", 5)
    monkeypatch.setattr(background, "FINISH_SECONDS", 0.2)
    began = time.monotonic()
    follow(tmp_path, [train(step) for step in range(1, 100)])
    assert time.monotonic() - began < 10
    going.set()
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "is 5 records behind" in told and "has not taken everything" in told
    assert len(read_metrics(str(tmp_path / "metrics.jsonl"))) == 99


def test_trackers_that_hang_share_the_wait_at_the_end(tmp_path, calls, monkeypatch):
    going = threading.Event()
    monkeypatch.setattr(Remembers, "finish", lambda self, status: going.wait(20))
    monkeypatch.setattr(background, "FINISH_SECONDS", 0.5)
    several = f"{__name__}:Again", f"{__name__}:Remembers", f"{__name__}:Third"
    began = time.monotonic()
    with following.Trackers(config_of(*several), str(tmp_path), 0, True):
        pass
    took = time.monotonic() - began
    going.set()
    assert 0.4 < took < 1.2


def test_a_tracker_that_could_not_be_opened_is_opened_later(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(Remembers, "fails", ("open",))
    monkeypatch.setattr(background, "REOPEN_SECONDS", 0.0)
    with following.Trackers(config_of(SPEC), str(tmp_path), 0, True) as trackers:
        trackers.log(train(1))
        deadline = time.monotonic() + 20
        while not calls and time.monotonic() < deadline:
            time.sleep(0.01)
        monkeypatch.setattr(Remembers, "fails", ())
        trackers.log(train(2))
    assert ("log", 2, {"train/loss": 1.5, "train/skipped": 0}) in calls


def test_the_id_of_a_run_stays_and_a_damaged_one_is_made_again(tmp_path):
    first = following.run_id(str(tmp_path))
    assert following.run_id(str(tmp_path)) == first and len(first) == 8
    (tmp_path / following.FILE).write_text("{")
    assert following.run_id(str(tmp_path)) != first


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        (("wandbb",), "unknown train.trackers='wandbb'"),
        (("wandb", "wandb"), "names a tracker twice"),
    ],
)
def test_wrong_names_are_refused_by_the_config(trackers, message):
    with pytest.raises(ValueError, match=message):
        validate(Config(train=TrainConfig(trackers=trackers)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at:All", "No module named 'nowhere'"),
        ("mtnlg_jax.config:Nothing", "has no attribute 'Nothing'"),
        ("threading:Thread", "lacks check, open, log, text, finish"),
        ("own_tracker_with_a_typo:Own", "invalid syntax .own_tracker_with_a_typo.py, line 1."),
        ("own_tracker_with_a_name:Own", "name 'nothing' is not defined; give module:Class"),
    ],
)
def test_an_own_tracker_that_cannot_work_is_refused(tmp_path, monkeypatch, name, message):
    (tmp_path / "own_tracker_with_a_typo.py").write_text("class Own(:")
    (tmp_path / "own_tracker_with_a_name.py").write_text("Own = nothing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        following.check(config_of(name))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_missing_is_named_with_its_installation(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf'pip install "mtnlg_jax\[{name}\]"'):
        following.check(config_of(name))


# --- TensorBoard


def events(folder):
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(glob.glob(f"{folder}/tensorboard/*")):
        with open(path, "rb") as file:
            data = file.read()
        # A record: its length, a checksum of that, the event, a checksum of it.
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event()
            event.ParseFromString(data[12 : 12 + length])
            found.append(event)
            data = data[16 + length :]
    return found


def test_tensorboard_hides_the_steps_that_a_resume_does_again(tmp_path):
    config = config_of("tensorboard")
    follow(tmp_path, [train(step) for step in (1, 2, 3, 4)], config=config)
    time.sleep(1.1)  # a file is named by its second
    follow(tmp_path, [train(3, loss=2.5)], step=2, config=config)
    assert losses_shown(tmp_path) == {1: 1.5, 2: 1.5, 3: 2.5}


def test_tensorboard_hides_the_steps_that_a_rewind_does_again(tmp_path):
    with following.Trackers(config_of("tensorboard"), str(tmp_path), 0, True) as trackers:
        for step in (1, 2, 3, 4):
            trackers.log(train(step))
        trackers.rewind(2)
        trackers.log(train(3, loss=2.5))
    assert losses_shown(tmp_path) == {1: 1.5, 2: 1.5, 3: 2.5}


def losses_shown(folder):
    """Return the losses of training by step as TensorBoard shows them."""
    shown = {}
    for event in events(folder):
        if event.HasField("session_log"):
            # Points from this step on are gone.
            shown = {key: x for key, x in shown.items() if key[1] < event.step}
        for value in event.summary.value:
            shown[value.tag, event.step] = value.simple_value
    return {step: x for (tag, step), x in shown.items() if tag == "train/loss"}


def test_a_tensorboard_writer_that_died_is_replaced(tmp_path):
    board = TensorBoard()
    board.open(base.RunInfo({}, "run", "id", "project", str(tmp_path), 0))
    board._board.file_writer.event_writer._worker.stop()
    for step in range(1, 40):  # its queue takes ten
        board.log(step, {"train/loss": 1.0})
    board.finish("finished")
    assert len(os.listdir(tmp_path / "tensorboard")) >= 1


# --- the real packages, where they are installed


@pytest.fixture
def away(tmp_path, monkeypatch):
    """Keep the keys and files of whoever runs the tests out of them."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "run"


def records_of(path):
    """Return the records in a file of wandb, once its service has written the last one."""
    deadline = time.monotonic() + 30
    found = parsed(path)
    while not any(each.HasField("exit") for each in found) and time.monotonic() < deadline:
        time.sleep(0.1)
        found = parsed(path)
    return found


def parsed(path):
    """Return the records in a file: a head of 7 bytes, then a log as LevelDB writes it."""
    from wandb.proto.wandb_internal_pb2 import Record

    with open(path, "rb") as file:
        data = file.read()
    place = 7
    whole = b""
    found = []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # padding up to the next block
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def test_wandb_offline_goes_on_with_its_run(away, monkeypatch):
    pytest.importorskip("wandb")

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_of("wandb", dp_secret="")
    config = dataclasses.replace(config, name="whales")
    following.check(config)
    away.mkdir()
    samples = {"kind": "samples", "step": 2, "texts": [{"prompt": "a", "text": "<b>"}]}
    follow(away, [train(1), train(2), samples], config=config)
    time.sleep(1.1)  # a folder is named by its second
    # Step 2 is done again: W&B would refuse a step that is smaller than its last one.
    follow(away, [train(2), train(3)], step=1, config=config)

    run = following.run_id(str(away))
    files = sorted(glob.glob(f"{away}/wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and all(path.endswith(f"run-{run}.wandb") for path in files)
    steps = []
    axes = set()
    for path in files:
        records = records_of(path)
        assert [each.run.run_id for each in records if each.HasField("run")][0] == run
        axes |= {each.metric.step_metric for each in records if each.HasField("metric")}
        for each in records:
            items = {
                item.nested_key[0] if item.nested_key else item.key: item.value_json
                for item in each.history.item
            }
            if "train/loss" in items:
                steps.append(int(items["step"]))
    assert steps == [1, 2, 2, 3] and "step" in axes
    assert not any(b"dp_secret" in Path(path).read_bytes() for path in files)


def test_wandb_gives_up_before_the_run_does(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    given = {}

    class Opened(Exception):
        pass

    def init(**arguments):
        given.update(arguments)
        raise Opened

    monkeypatch.setattr(wandb, "init", init)
    tracker = base.make("wandb")
    with pytest.raises(Opened):
        tracker.open(base.RunInfo({}, "run", "id", "project", str(tmp_path), 0))
    settings = given["settings"]
    assert 0 < settings.finish_timeout < background.FINISH_SECONDS
    assert 0 < settings.init_timeout < background.FINISH_SECONDS


def test_wandb_online_needs_a_login(away):
    pytest.importorskip("wandb")
    import wandb

    wandb.teardown()
    with pytest.raises(ValueError, match="nobody is logged in to .*WANDB_MODE=offline"):
        following.check(config_of("wandb"))


def test_trackio_goes_on_with_its_run(away, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(away / "trackio"))
    if "trackio" in sys.modules:
        pytest.skip("trackio reads TRACKIO_DIR when it is imported")
    pytest.importorskip("trackio")
    import sqlite3

    config = config_of("trackio")
    following.check(config)
    away.mkdir()
    follow(away, [train(1), train(2)], config=config)
    follow(away, [train(2), train(3)], step=1, config=config)
    with contextlib.closing(sqlite3.connect(away / "trackio" / "whales.db")) as store:
        rows = store.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {f"run-{following.run_id(str(away))}"}
    assert [step for _, step, _ in rows] == [1, 2, 2, 3]
    assert json.loads(rows[0][2])["train/loss"] == 1.5
