"""To which checkpoints a run goes back, what it leaves out there, and when that ends."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from mtnlg_jax.config import Config, TrainConfig
from mtnlg_jax.errors import Diverged
from mtnlg_jax.train import spikes

BATCH = 8


class State(NamedTuple):
    step: jax.Array
    samples: jax.Array
    extras: dict[str, Any]


@pytest.fixture(autouse=True)
def unnamed(monkeypatch):
    """Name no documents, which takes a model."""
    found = {"policy": "rewind"}
    monkeypatch.setattr(
        spikes.Spikes, "_described", lambda self, step, *_: found | {"step": step + 1}
    )
    monkeypatch.setattr(spikes, "described", lambda record, workdir: "")


def started(workdir, meta=None, **train):
    train = {"steps": 100, "spike_policy": "rewind"} | train
    config = Config(train=TrainConfig(**train))
    return spikes.Spikes(config, str(workdir), None, None, None, meta)


def run(judge, bad, kept, first=0, steps=70):
    """Go through the steps as a run does, and return those that are trained at its end. ``bad``
    ones are spikes, and after those of ``kept`` there is a checkpoint."""
    saved = {0: []}
    saved[first] = trained = list(range(1, first + 1))
    judge.begin(first)
    done = first
    while done < steps:
        left_out = judge.leaves_out(done, BATCH * done)
        if left_out:
            state = State(jnp.int32(done), jnp.int32(BATCH * done), {})
            assert judge.pass_over(state, BATCH).step == done + 1
        judge.note(done, BATCH * done)
        done += 1
        if not left_out and done in bad:
            assert judge.take((done - 1, {"spikes_in_a_row": 1}), None)
            done = max(step for step in saved if step < done)
            trained = saved[done]
            judge.begin(done)
            continue
        trained = trained if left_out else [*trained, done]
        if done in kept:
            saved[done] = trained
    return trained


SHIFTED = range(41, 71)


@pytest.mark.parametrize(
    ("bad", "kept", "spiked"),
    [
        # A copy after every step, also after those that are left out.
        (SHIFTED, range(1, 71), "41, 42, 43, 44, 45, 46"),
        # Every third: after that of step 42 all hold the parameters of step 40.
        (SHIFTED, range(0, 71, 3), "43, 44, 45, 46, 47, 48"),
        (SHIFTED, [20, 40, 60], "41, 42, 43, 44, 45, 46"),
        # Scattered behind one checkpoint.
        ([41, 45, 50, 52, 55, 58], [20, 40, 60], "41, 45, 50, 52, 55, 58"),
    ],
    ids=["every step", "every third", "one checkpoint", "scattered"],
)
def test_the_sixth_return_to_the_same_parameters_ends_a_start(tmp_path, bad, kept, spiked):
    with pytest.raises(Diverged, match=f" 6 times, for spikes at steps {spiked} .train.max_bad"):
        run(started(tmp_path), bad, kept)
    # The advice was followed, and this start goes back there once more.
    records = spikes.recorded(str(tmp_path), {})
    later = max(record["step"] for record in records) + 2
    out = {step for record in records for step, _ in record["left_out"]} | {later}
    trained = run(started(tmp_path, {"spikes": records}), [later], kept, first=39)
    assert trained == [step for step in range(1, 71) if step not in out]


def test_spikes_with_trained_steps_between_them_go_on(tmp_path):
    bad = range(10, 70, 2)
    trained = run(started(tmp_path), bad, range(1, 71))
    assert trained == [step for step in range(1, 71) if step not in bad]
    # Five scattered ones, and one after the next checkpoint.
    bad = [41, 45, 50, 52, 55, 61]
    (tmp_path / spikes.FILE).unlink()
    assert run(started(tmp_path), bad, [20, 40, 60])[-10:-8] == [60, 62]


def test_a_start_from_a_near_copy_leaves_out_the_same_batches(tmp_path):
    several = {"spike_leave_out": 5}
    whole = run(started(tmp_path / "whole", **several), [50], [40, 60])
    assert 46 not in whole and {45, 51} <= set(whole)
    before = started(tmp_path / "killed", **several)
    run(before, [], [40], steps=48)
    meta = json.loads(json.dumps(before.meta))
    again = started(tmp_path / "killed", meta, **several)
    # Back to the far checkpoint: the near copy of step 48 is gone.
    again.begin(48)
    for done in (48, 49):
        again.note(done, BATCH * done)
    assert again.take((49, {"spikes_in_a_row": 1}), None)
    near = Near()
    spikes.drop_near(str(tmp_path / "killed"), near)
    assert near.dropped
    assert run(again, [50], [40, 60], first=40) == whole
    near = Near()
    spikes.drop_near(str(tmp_path / "killed"), near)
    assert not near.dropped  # the run does not wait any more


class Near:
    """A near tier that notes whether its copies were removed."""

    dropped = False

    def drop(self, newest):
        assert newest > 10**9
        self.dropped = True


def test_a_single_batch_is_left_out_from_a_near_copy(tmp_path):
    judge = started(tmp_path)
    judge.note(49, BATCH * 49)
    assert judge.meta == {}
    judge.take((49, {"spikes_in_a_row": 1}), None)
    near = Near()
    spikes.drop_near(str(tmp_path), near)
    spikes.drop_near(str(tmp_path), None)
    assert not near.dropped
