"""Runs with a planted bad batch: left out alike on every mesh and after every kill, and named."""

import dataclasses
import errno
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from planted_run import LENGTH, bad_batches, make_planted, planted_config, records_of

from mtnlg_jax import storage
from mtnlg_jax.config import Config, MeshConfig, StageConfig
from mtnlg_jax.errors import Diverged, Preempted
from mtnlg_jax.evaluate.why.run_why import Question, answer
from mtnlg_jax.train import checkpoint_arrays, loop, manifest, metrics, replicas, spikes
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.metrics import MetricsLog, read_metrics
from mtnlg_jax.train.trackers.following import Trackers

SEED = 27
SPIKE = 46  # the step that reads the bad document
ONE = MeshConfig(data=1)
RULE = {"spike_window": 16, "spike_deviations": 5.0}
SKIP = RULE | {"spike_policy": "skip"}
REWIND = RULE | {"spike_policy": "rewind"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = make_planted(tmp_path_factory.mktemp("planted"))
    (step,) = bad_batches(config_of(folder))
    assert step == SPIKE
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_device(compiled_once):
    """Give runs one device unless their config asks for more, because that compiles faster."""
    make = loop.make_mesh

    def made(mesh):
        return make(mesh, jax.devices()[:1] if mesh == ONE else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", made)
        yield


def config_of(folder, mesh=ONE, **train):
    return planted_config(folder, mesh, seed=SEED, **train)


def trained(folder, workdir, mesh=ONE, **train):
    return loop.train(config_of(folder, mesh, **train), str(workdir), show_progress=False)


def state_of(workdir, step=60):
    """Return the arrays of a checkpoint by name."""
    path = epath.Path(workdir) / "checkpoints" / str(step)
    record, _ = manifest.read_record(path)
    found = {}
    for name, shape in record["arrays"].items():
        kind, _, dims = shape.partition("[")
        abstract = jax.ShapeDtypeStruct(json.loads("[" + dims), jnp.dtype(kind))
        part = "params" if name.startswith("params.") else "rest"
        found.setdefault(part, {})[name.removeprefix("params.")] = abstract
    arrays = {}
    for part, abstract in found.items():
        for name, array in checkpoint_arrays.read(path / part, abstract).items():
            arrays[f"{part}.{name}"] = np.asarray(array)
    return arrays


def same_state(one, other, step=60):
    """Return whether two runs have the same state of ``step`` to every bit."""
    ours = state_of(one, step)
    theirs = state_of(other, step)
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[name], theirs[name]) for name in ours
    )


@pytest.fixture(scope="module")
def skipped(planted, tmp_path_factory):
    return trained(planted, tmp_path_factory.mktemp("skipped"), **SKIP)


@pytest.fixture(scope="module")
def rewound(planted, tmp_path_factory):
    return trained(planted, tmp_path_factory.mktemp("rewound"), **REWIND)


def check_named(record, folder):
    """Check that the record of the spike names the bad document first."""
    (document,) = bad_batches(config_of(folder)).values()
    first, second = record["documents"][:2]
    assert record["step"] == SPIKE and first["source"] == str(folder / "web")
    assert first["document"] == document.number
    assert first["loss"] > 4 * second["loss"]
    assert record["deviation_loss"] > 5 and record["deviation_grad_norm"] > 5
    assert {each["source"] for each in record["sources"]} == {
        str(folder / "books"),
        str(folder / "web"),
    }
    tokens = sum(each["tokens"] for each in record["sources"])
    assert tokens <= 8 * LENGTH


def test_a_bad_batch_is_skipped_and_named(planted, skipped, tmp_path):
    records = records_of(skipped.workdir)
    (spike,) = (record for (kind, _), record in records.items() if kind == "spike")
    check_named(spike, planted)
    before = records["train", SPIKE - 1]
    train = records["train", SPIKE]
    assert spike["loss"] == train["loss"] > 2 * before["loss"]
    assert (before["spikes_total"], train["spikes_total"]) == (0, 1) and skipped.spikes == 1
    assert records["train", 5]["deviation_loss"] is None  # too little history
    # The counters advance: the batch is read, and the run has all its steps.
    assert state_of(skipped.workdir)["rest.samples"] == 60 * 8
    assert ("train", 60) in records


def test_going_back_leaves_out_the_same_batch(planted, skipped, rewound):
    records = records_of(rewound.workdir)
    spike = records["spike", SPIKE]
    check_named(spike, planted)
    assert spike["left_out"] == [SPIKE] and spike["back_to"] == 40 and rewound.spikes == 1
    assert ("train", SPIKE) not in records
    steps = [step for kind, step in records if kind == "train"]
    assert steps == [step for step in range(1, 61) if step != SPIKE]  # each once, in order
    lines = read_metrics(os.path.join(rewound.workdir, "metrics.jsonl"))
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    # Everything else is what skip does.
    others = records_of(skipped.workdir, "train")
    assert {key: records[key] for key in records if key[0] == "train"} == {
        key: others[key] for key in others if key[1] != SPIKE
    }
    ours = {k: x for k, x in state_of(rewound.workdir).items() if "streak" not in k}
    theirs = state_of(skipped.workdir)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    (saved,) = meta_of(rewound.workdir)["spikes"]
    content = storage.read_file(rewound.workdir, spikes.FILE)
    assert saved == json.loads(content) and saved["left_out"] == [[SPIKE, (SPIKE - 1) * 8]]


@pytest.mark.slow
def test_a_spike_before_a_comparison_of_replicas_is_judged(planted, tmp_path, monkeypatch):
    """The comparison reports the step before it, before the run judges that."""
    # One replica, whose bits are compared with its own.
    monkeypatch.setattr(replicas, "check_mesh", lambda config, mesh: None)
    trained(planted, tmp_path, verify_every=SPIKE + 1, **REWIND)
    records = records_of(tmp_path)
    assert ("replicas", SPIKE + 1) in records
    assert records["spike", SPIKE]["back_to"] == 40 and ("train", SPIKE) not in records


def test_going_back_to_a_near_copy_ends_in_the_same_state(planted, rewound, tmp_path):
    near = tmp_path / "near"
    run = tmp_path / "run"
    found = trained(planted, run, near_every=1, near_folder=str(near), **REWIND)
    records = records_of(run)
    # To the newest copy: one is left out while the last one is still being written.
    assert 20 < records["spike", SPIKE]["back_to"] < SPIKE and found.spikes == 1
    assert same_state(run, rewound.workdir)
    theirs = records_of(rewound.workdir, "train")
    assert {key: records[key] for key in records if key[0] == "train"} == theirs
    assert not list(near.rglob("*.*"))


@pytest.mark.slow
def test_near_copies_do_not_decide_which_batches_are_left_out(planted, tmp_path, monkeypatch):
    several = REWIND | {"spike_leave_out": 3}
    trained(planted, tmp_path / "far", **several)
    near = several | {"near_every": 1, "near_folder": str(tmp_path / "near")}
    trained(planted, tmp_path / "near run", **near)
    real = loop.batch_at
    stops = [SPIKE - 1, SPIKE]

    def failing(config, mesh, data, step, samples):
        if stops and step == stops[0]:
            stops.pop(0)
            raise Gone
        return real(config, mesh, data, step, samples)

    # Gone before the spike, which is then met after a start from a near copy, and once more when
    # the next step is due.
    monkeypatch.setattr(loop, "batch_at", failing)
    for _ in range(2):
        with pytest.raises(Gone):
            trained(planted, tmp_path / "killed", **near)
    trained(planted, tmp_path / "killed", **near)
    for name in ("near run", "killed"):
        spike = records_of(tmp_path / name)["spike", SPIKE]
        assert spike["left_out"] == [44, 45, 46] and spike["back_to"] == 40
        assert same_state(tmp_path / name, tmp_path / "far")


def meta_of(workdir, step=60):
    return manifest.read_record(epath.Path(workdir) / "checkpoints" / str(step))[0]["meta"]


MESHES = {
    "8": MeshConfig(data=8),
    "2x4": MeshConfig(data=2, tensor=4),
    "4x2": MeshConfig(data=4, tensor=2, zero=3),
    "pipe": MeshConfig(pipe=2, data=2, tensor=2, schedule="1f1b"),
}


@pytest.mark.slow  # eight runs on eight devices
@pytest.mark.parametrize("policy", [SKIP, REWIND], ids=["skip", "rewind"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_leaves_out_and_names_the_same(
    planted, skipped, rewound, tmp_path, mesh, policy
):
    found = trained(planted, tmp_path, MESHES[mesh], micro_batch_size=1, **policy)
    alone = skipped if policy is SKIP else rewound
    ours = records_of(tmp_path)
    theirs = records_of(alone.workdir)
    assert ours.keys() == theirs.keys() and found.spikes == 1
    check_named(ours["spike", SPIKE], planted)
    for key, record in ours.items():
        for name in ("loss", "grad_norm"):
            if name in record:
                assert record[name] == pytest.approx(theirs[key][name], rel=2e-3), key
    names = [(each["source"], each["document"]) for each in ours["spike", SPIKE]["documents"]]
    others = theirs["spike", SPIKE]["documents"]
    assert names[:2] == [(each["source"], each["document"]) for each in others][:2]


class Gone(Exception):
    """The machine is gone."""


def test_a_kill_in_the_middle_of_going_back_changes_nothing(
    planted, rewound, tmp_path, monkeypatch
):
    real = Checkpoints.restore
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:  # the first one is that of the start
            raise Gone
        return real(*args)

    monkeypatch.setattr(Checkpoints, "restore", failing)
    with pytest.raises(Gone):
        trained(planted, tmp_path, **REWIND)
    # The decision is on disk, and nothing else has happened.
    (line,) = (tmp_path / spikes.FILE).read_text().splitlines()
    assert json.loads(line)["back_to"] is None
    trained(planted, tmp_path, **REWIND)
    assert len(calls) == 3  # it does not go back again
    assert records_of(tmp_path) == records_of(rewound.workdir)
    assert same_state(tmp_path, rewound.workdir)
    assert meta_of(tmp_path)["spikes"] == meta_of(rewound.workdir)["spikes"]


@pytest.mark.slow
def test_a_resume_without_the_file_leaves_the_batch_out(planted, rewound, tmp_path, monkeypatch):
    # Stopped between going back and the spike: the checkpoint of step 42 names what is ahead.
    batch_at = loop.batch_at

    def stopping(config, mesh, data, step, samples):
        if step == 42 and (tmp_path / spikes.FILE).exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(config, mesh, data, step, samples)

    monkeypatch.setattr(loop, "batch_at", stopping)
    with pytest.raises(Preempted, match="after step 43"):
        trained(planted, tmp_path, **REWIND)
    monkeypatch.undo()
    os.remove(tmp_path / spikes.FILE)
    trained(planted, tmp_path)  # also where the policy is turned off
    kept = records_of(tmp_path, "train")
    assert [step for _, step in kept] == [step for step in range(1, 61) if step != SPIKE]
    theirs = records_of(rewound.workdir, "train")
    assert {step: kept["train", step]["loss"] for _, step in kept} == {
        step: theirs["train", step]["loss"] for _, step in theirs
    }


@pytest.mark.slow
def test_without_a_checkpoint_the_run_goes_back_to_its_start(planted, skipped, tmp_path):
    found = trained(planted, tmp_path, save_every=60, **REWIND)
    assert records_of(tmp_path)["spike", SPIKE]["back_to"] == 0
    assert found.final == pytest.approx({**skipped.final, "time": found.final["time"]}, abs=0)


@pytest.mark.slow
def test_batches_before_the_spike_are_left_out_as_far_as_the_checkpoint(planted, tmp_path):
    trained(planted, tmp_path, spike_leave_out=3, **REWIND)
    records = records_of(tmp_path)
    assert records["spike", SPIKE]["left_out"] == [44, 45, 46]
    assert records["left_out", 44]["spike"] == SPIKE and ("left_out", 45) in records
    assert not {44, 45, 46} & {step for kind, step in records if kind == "train"}
    # The batch behind them is met with the parameters of step 43.
    state = state_of(tmp_path)
    assert state["rest.extras.spikes.causal.count"] == 57 and state["rest.step"] == 60


@pytest.mark.slow
def test_a_stop_at_the_spike_is_resumed_without_it(planted, rewound, tmp_path, monkeypatch):
    real = loop.batch_at

    def stopping(config, mesh, data, step, samples):
        if step == SPIKE - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(config, mesh, data, step, samples)

    monkeypatch.setattr(loop, "batch_at", stopping)
    with pytest.raises(Preempted, match=f"after step {SPIKE}, a spike; the same command resumes"):
        trained(planted, tmp_path, profile_steps=(SPIKE, 60), **REWIND)
    assert list(tmp_path.glob("profile/**/*.xplane.pb"))  # the window was closed
    monkeypatch.undo()
    trained(planted, tmp_path, **REWIND)
    # The spike was named with other parameters: those before the next step.
    ours = records_of(tmp_path, "train", "eval", "left_out")
    assert ours == records_of(rewound.workdir, "train", "eval", "left_out")
    assert same_state(tmp_path, rewound.workdir)
    check_named(records_of(tmp_path)["spike", SPIKE], planted)


def worse_from(monkeypatch, first):
    """Give all steps from ``first`` done ones on random labels."""
    real = loop.batch_at

    def batch_at(config, mesh, data, step, samples):
        batch, micro, sequences = real(config, mesh, data, step, samples)
        if step >= first:
            labels = np.random.default_rng(step).integers(5, 250, batch["labels"].shape)
            labels = jax.device_put(labels.astype(np.int32), batch["labels"].sharding)
            batch = batch | {"labels": labels}
        return batch, micro, sequences

    monkeypatch.setattr(loop, "batch_at", batch_at)


def test_a_level_that_shifts_for_good_begins_a_new_history(planted, tmp_path, monkeypatch, caplog):
    worse_from(monkeypatch, 40)
    trained(planted, tmp_path, **SKIP)
    spiked = [step for kind, step in records_of(tmp_path, "spike")]
    assert spiked[:5] == [41, 42, 43, 44, 45] and len(spiked) == 5
    assert "5 causal steps in a row were spikes, up to step 45" in caplog.text
    # The next ones are applied, and their level is that of the new history.
    assert state_of(tmp_path)["rest.extras.spikes.causal.count"] == 15


@pytest.mark.slow
def test_a_run_goes_back_to_one_checkpoint_a_few_times(planted, tmp_path, monkeypatch):
    worse_from(monkeypatch, 40)
    words = "went back to the parameters of step 40 3 times, for spikes at steps 41, 42, 43"
    with pytest.raises(Diverged, match=words):
        trained(planted, tmp_path, max_bad_steps=2, **REWIND)
    lines = (tmp_path / spikes.FILE).read_text().splitlines()
    assert [json.loads(line)["back_to"] for line in lines] == [40, 40, 40]


@pytest.mark.slow
def test_a_mix_of_objectives_is_resumed_on_another_mesh(planted, tmp_path, monkeypatch):
    """Each objective has its own history: the masked loss is far above the causal one."""
    mix = {"stages": (StageConfig("mix", 1.0, masked=0.5),), "steps": 90, "save_every": 10}
    config = config_of(planted, MESHES["8"], **mix, **REWIND)
    loop.train(config, str(tmp_path / "whole"), show_progress=False)
    whole = records_of(tmp_path / "whole")
    real = loop.batch_at

    def failing(config, mesh, data, step, samples):
        if step == 75:
            raise Gone
        return real(config, mesh, data, step, samples)

    monkeypatch.setattr(loop, "batch_at", failing)
    with pytest.raises(Gone):
        loop.train(config, str(tmp_path / "moved"), show_progress=False)
    monkeypatch.undo()
    loop.train(
        dataclasses.replace(config, mesh=MESHES["2x4"]),
        str(tmp_path / "moved"),
        show_progress=False,
    )
    moved = records_of(tmp_path / "moved")
    assert moved.keys() == whole.keys()
    for key, record in moved.items():
        if "grad_norm" in record:
            assert record["objective"] == whole[key]["objective"]
            assert record["loss"] == pytest.approx(whole[key]["loss"], rel=1e-2), key
    counts = {
        name: int(state_of(tmp_path / "moved", 90)[f"rest.extras.spikes.{name}.count"])
        for name in ("causal", "masked")
    }
    spiked = [record["objective"] for (kind, _), record in whole.items() if kind == "spike"]
    assert SPIKE in [step for kind, step in whole if kind == "spike"]
    assert counts == {name: 45 - spiked.count(name) for name in counts}


@pytest.mark.slow
def test_a_replay_leaves_out_the_same_batches(planted, tmp_path):
    trained(planted, tmp_path, spike_leave_out=3, **REWIND)
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        result, _ = answer(Question(str(tmp_path), 50, replay=True, top=0, most=2))
        assert result["replay"]["equal"]
        # The spike itself, by its record, with the parameters that the run had when it met it.
        result, _ = answer(Question(str(tmp_path), SPIKE, top=1))
    first = result["documents"][0]
    assert first["source"] == str(planted / "web")
    assert result["deviations"]["loss"]["deviation"] > 5


def test_records_of_file_and_checkpoint_are_joined(tmp_path):
    one = {"step": 5, "left_out": [[5, 32]], "back_to": None}
    other = {"step": 9, "left_out": [[8, 56], [9, 64]], "back_to": 6}
    meta = {"spikes": [one]}
    assert spikes.recorded(str(tmp_path), meta) == [one]
    lines = [json.dumps(each) for each in (one | {"back_to": 4}, other)]
    (tmp_path / spikes.FILE).write_text("\n".join(lines) + "\n")
    assert spikes.recorded(str(tmp_path), meta) == [one | {"back_to": 4}, other]
    assert spikes.left_out([one, other]) == {(5, 32), (8, 56), (9, 64)}
    wrong_ones = ("[5]", "[]")
    lists = [f'{{"step": 5, "left_out": {pairs}, "back_to": 4}}' for pairs in wrong_ones]
    for wrong in ("{}", "[", *lists):
        (tmp_path / spikes.FILE).write_text(lines[0] + "\n" + wrong + "\n")
        with pytest.raises(ValueError, match="line 2 is not the record of a spike"):
            spikes.recorded(str(tmp_path), meta)


def test_the_log_drops_steps_that_are_done_again(tmp_path):
    with Trackers(Config(), str(tmp_path), 0, writing=True) as trackers:
        log = MetricsLog(str(tmp_path), 0, trackers=trackers)
        for step in range(1, 6):
            log.write({"kind": "train", "step": step, "loss": float(step)})
        log.drop_after(3)
        log.write({"kind": "train", "step": 4, "loss": 40.0})
        log.close()
    expected = {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0}
    assert {r["step"]: r["loss"] for r in read_metrics(log.path)} == expected
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    purges = [
        event.session_log.status == 1 and event.step
        for event in events_of(tmp_path / "tensorboard")
    ]
    assert 4 in purges


def test_a_disk_that_is_full_while_steps_are_dropped_ends_nothing(tmp_path, monkeypatch, caplog):
    log = MetricsLog(str(tmp_path), 0)
    for step in range(1, 6):
        log.write({"kind": "train", "step": step, "loss": float(step)})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics.os, "fsync", full)
    log.drop_after(3)
    log.write({"kind": "train", "step": 4, "loss": 40.0})
    later = MetricsLog(str(tmp_path), 5, writing=False)
    assert len(later.records) == 5  # all or nothing
    log.close()
    assert "is behind" in caplog.text
    monkeypatch.undo()
    log.close()
    assert [r["loss"] for r in read_metrics(log.path)] == [1.0, 2.0, 3.0, 40.0]


def events_of(folder):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            yield Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
