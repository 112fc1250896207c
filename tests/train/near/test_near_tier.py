"""The near tier in one process: copies restored on any mesh, damage, room, what counts as good."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from near_states import state_of

from mtnlg_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    to_json,
    validate,
)
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import moments
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.near import agree, opening, starts
from mtnlg_jax.train.near.files import Copy
from mtnlg_jax.train.state import abstract_state

MODEL = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=384, max_position_embeddings=8
)
IDENTITY = {"tokenizer": "t1"}
TRAIN = TrainConfig(near_every=2)


def config_on(data: int, tensor: int, zero: int = 1, moments_dtype="float32") -> Config:
    return Config(
        model=MODEL,
        mesh=MeshConfig(data=data, tensor=tensor, zero=zero),
        optimizer=OptimizerConfig(moments_dtype=moments_dtype),
    )


@pytest.fixture
def opened(tmp_path):
    """Return opened(data, tensor) -> (checkpoints with a near tier, abstract state); all are closed
    at the end."""
    made = []

    def open_on(data: int, tensor: int, zero: int = 1, moments_dtype="float32"):
        while made:
            made.pop().close()
        config = config_on(data, tensor, zero, moments_dtype)
        mesh = make_mesh(config.mesh, jax.devices()[: data * tensor])
        abstract = abstract_state(config, mesh)
        train = dataclasses.replace(TRAIN, near_folder=str(tmp_path / "host"))
        folder = str(tmp_path / "run/checkpoints")
        made.append(
            Checkpoints(folder, near=lambda: opening.open_near(train, folder, abstract, mesh))
        )
        return made[0], abstract

    yield open_on
    for checkpoints in made:
        checkpoints.close()


def shardings_of(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def meta_of(step: int, identity=None) -> dict:
    config = json.loads(to_json(config_on(1, 1)))
    return {"config": config, "identity": identity or IDENTITY, "samples": 32 * step}


def save(checkpoints, abstract, *steps: int, proven: bool = True) -> None:
    for step in steps:
        checkpoints.near.wait()
        checkpoints.near.save(step, state_of(step, abstract), meta_of(step))
        if proven:
            checkpoints.prove()
    checkpoints.near.wait()


def files(tmp_path, ending: str) -> list[Path]:
    """Return the files of near copies, the oldest first."""
    found = (tmp_path / "host").rglob(f"*{ending}")
    return sorted(found, key=lambda path: int(path.parent.name.partition("-")[0]))


@pytest.mark.parametrize(("data", "tensor"), [(2, 4), (1, 1)])
def test_any_mesh_restores_any_copy(opened, data, tensor):
    checkpoints, abstract = opened(4, 2)
    save(checkpoints, abstract, 6)
    checkpoints, abstract = opened(data, tensor, zero=0)
    step, state, meta = checkpoints.restore(abstract, IDENTITY)
    assert step == 6 and meta == meta_of(6)
    assert bits(state) == bits(state_of(6, abstract))
    assert shardings_of(state) == shardings_of(abstract)
    assert "goes on from the copy of step 6" in checkpoints.lines()[0]
    # Who deletes the run must know it.
    assert f"in {checkpoints.near.files.folder}: " in checkpoints.lines()[0]


def held(data: int, tensor: int, zero: int, dtype: str, offload: str = "none", ema: float = 0.0):
    """Return (train settings, mesh, abstract state) of a run with such moments and averages."""
    config = config_on(data, tensor, zero)
    config = dataclasses.replace(
        config,
        optimizer=OptimizerConfig(moments_dtype=dtype),
        train=TrainConfig(near_every=2, offload=offload, ema_decay=ema, spike_policy="skip"),
    )
    mesh = make_mesh(config.mesh, jax.devices()[: data * tensor])
    return config, mesh, abstract_state(config, mesh)


@pytest.mark.parametrize(
    ("old", "new", "offload"),
    [
        ("float32", "int8", "none"),
        ("int8", "float32", "none"),
        ("int8", "int8", "moments"),
    ],
)
def test_a_copy_is_restored_as_its_checkpoint_is(tmp_path, old, new, offload):
    """Averages, spikes, and moments of any type and in any memory, on another mesh."""

    def opened(config, mesh, abstract, name, near):
        folder = str(tmp_path / name / "checkpoints")
        train = dataclasses.replace(config.train, near_folder=str(tmp_path / "host"))
        make = functools.partial(opening.open_near, train, folder, abstract, mesh)
        return contextlib.closing(Checkpoints(folder, near=make if near else None))

    config, mesh, abstract = held(4, 2, 1, old, offload, ema=0.9)
    state = state_of(2, abstract)
    with opened(config, mesh, abstract, "near", True) as checkpoints:
        save(checkpoints, abstract, 2)
    with opened(config, mesh, abstract, "far", False) as checkpoints:
        checkpoints.save(2, state, meta_of(2), wait=True)
    config, mesh, abstract = held(2, 2, 3, new, offload, ema=0.9)
    found = []
    for name, near in (("near", True), ("far", False)):
        with opened(config, mesh, abstract, name, near) as checkpoints:
            found.append(checkpoints.restore(abstract, IDENTITY))
            assert not checkpoints.lacking
    (_, copy, _), (_, checkpoint, _) = found
    assert bits(copy) == bits(checkpoint)
    places = [jax.tree.map(lambda x: x.sharding, each) for each in (copy, checkpoint, abstract)]
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize(
    ("before", "after"),
    [("bfloat16", "float32"), pytest.param("int8", "bfloat16", marks=pytest.mark.slow)],
)
def test_moments_may_have_another_type(opened, before, after):
    checkpoints, abstract = opened(2, 2, moments_dtype=before)
    # Not of `state_of`: second moments are not below 0.
    ones = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype)), abstract)
    checkpoints.near.save(2, jax.device_put(ones, shardings_of(abstract)), meta_of(2))
    checkpoints, wanted = opened(4, 1, moments_dtype=after)
    state = checkpoints.restore(wanted, IDENTITY)[1]
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, wanted)
    assert shardings_of(state) == shardings_of(wanted)
    expected = moments.encode(moments.decode(ones.opt_state), after, seed=0)
    assert all(np.asarray(leaf, np.float32).all() for leaf in jax.tree.leaves(expected))
    assert bits(state.opt_state) == bits(expected)


def test_copies_outlive_the_arrays(opened):
    """The next step reuses the memory of a state that was just copied."""
    checkpoints, abstract = opened(2, 1)
    state = state_of(2, abstract)
    advance = jax.jit(lambda s: jax.tree.map(lambda a: a * 2 + 1, s), donate_argnums=0)
    checkpoints.near.wait()
    checkpoints.near.save(2, state, meta_of(2))
    for _ in range(3):
        state = advance(state)
    jax.block_until_ready(state)
    checkpoints, abstract = opened(2, 1)
    assert bits(checkpoints.restore(abstract, IDENTITY)[1]) == bits(state_of(2, abstract))


def test_two_copies_are_kept(opened, tmp_path):
    checkpoints, abstract = opened(2, 1)
    save(checkpoints, abstract, 2, 4, 6)
    assert [path.parent.name[:2] for path in files(tmp_path, ".json")] == ["4-", "6-"]


@pytest.mark.parametrize("how", ["truncated", "changed", "removed", "manifest"])
def test_a_damaged_copy_is_found_and_the_one_before_is_taken(opened, tmp_path, how):
    checkpoints, abstract = opened(2, 2)
    save(checkpoints, abstract, 2, 4)
    path = files(tmp_path, ".json" if how == "manifest" else ".data")[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(content[:-7] if how == "truncated" else content)
    checkpoints, abstract = opened(2, 2)
    step, state, _ = checkpoints.restore(abstract, IDENTITY)
    assert step == 2 and bits(state) == bits(state_of(2, abstract))
    assert how in ("removed", "manifest") or "step 4" in checkpoints.near.warnings[0]
    # What comes after it will be computed again.
    assert [path.parent.name[:2] for path in files(tmp_path, ".json")] == ["2-"]


def test_a_file_that_goes_meanwhile_counts_as_damaged(opened, tmp_path):
    checkpoints, abstract = opened(2, 2)
    save(checkpoints, abstract, 2, 4)
    near = opened(2, 2)[0].near
    candidates = near.candidates()
    files(tmp_path, ".json")[-1].unlink()
    arrays = candidates[0].about["arrays"]
    found = near.newest(candidates, 0, IDENTITY, arrays, lambda *_: None)
    assert found.copy.step == 2
    assert near._inventory.warnings[0].endswith("0.own is missing")


def test_the_newer_tier_is_restored(opened, tmp_path):
    checkpoints, abstract = opened(2, 1)
    checkpoints.save(4, state_of(4, abstract), meta_of(4), wait=True)
    save(checkpoints, abstract, 2, 6)
    assert checkpoints.restore(abstract, IDENTITY)[0] == 6
    checkpoints.save(8, state_of(8, abstract), meta_of(8), wait=True)
    assert checkpoints.restore(abstract, IDENTITY)[0] == 8
    assert not files(tmp_path, ".json")
    save(checkpoints, abstract, 6)
    shutil.rmtree(tmp_path / "run/checkpoints/8/params")  # damaged: what is left is older
    assert checkpoints.restore(abstract, IDENTITY)[0] == 6


def test_a_copy_without_a_finite_loss_is_given_up(opened, tmp_path):
    checkpoints, abstract = opened(2, 1)
    save(checkpoints, abstract, 2)
    save(checkpoints, abstract, 4, proven=False)
    assert checkpoints.give_up() == 2
    checkpoints, abstract = opened(2, 1)
    assert checkpoints.restore(abstract, IDENTITY)[0] == 2
    # Also one that was restored before any loss of it was known.
    save(checkpoints, abstract, 4, proven=False)
    checkpoints, abstract = opened(2, 1)
    assert checkpoints.restore(abstract, IDENTITY)[0] == 4
    # A start makes a copy of its own of that step.
    assert checkpoints.near.goes_on_from_earlier
    save(checkpoints, abstract, 4, proven=False)
    assert checkpoints.give_up() is None and not files(tmp_path, ".json")


def test_copies_after_the_last_comparison_are_distrusted(opened, tmp_path):
    checkpoints, abstract = opened(2, 1)
    checkpoints.save(2, state_of(2, abstract), meta_of(2), wait=True)
    save(checkpoints, abstract, 4)
    checkpoints.near.save(6, state_of(6, abstract), meta_of(6))  # perhaps on its way still
    assert checkpoints.distrust(4) == 4
    checkpoints, abstract = opened(2, 1)
    assert checkpoints.restore(abstract, IDENTITY)[0] == 4  # also one of an earlier start
    save(checkpoints, abstract, 6)
    assert checkpoints.distrust(3) == 2
    assert not files(tmp_path, ".json") and not files(tmp_path, ".data")
    assert checkpoints.distrust(1) is None
    assert (tmp_path / "run/checkpoints/2.suspect").is_dir()


def test_a_near_copy_is_taken_where_every_checkpoint_is_damaged(opened, tmp_path):
    checkpoints, abstract = opened(2, 1)
    save(checkpoints, abstract, 2)
    checkpoints.save(4, state_of(4, abstract), meta_of(4), wait=True)
    shutil.rmtree(tmp_path / "run/checkpoints/4/params")
    assert checkpoints.restore(abstract, IDENTITY)[0] == 2
    shutil.rmtree(tmp_path / "host")
    with pytest.raises(OSError, match="holds damaged checkpoints only: 4.damaged"):
        checkpoints.restore(abstract, IDENTITY)


def test_a_checkpoint_of_the_same_step_is_proven_and_given_up_as_well(opened, tmp_path):
    checkpoints, abstract = opened(2, 1)
    folder = tmp_path / "run/checkpoints"
    checkpoints.save(2, state_of(2, abstract), meta_of(2), wait=True)
    for step in (4, 6):
        save(checkpoints, abstract, step, proven=False)
        checkpoints.save(step, state_of(step, abstract), meta_of(step), wait=True, proven=False)
        checkpoints, abstract = opened(2, 1)
        assert checkpoints.restore(abstract, IDENTITY)[0] == step
        assert "near copy" not in str(checkpoints.warnings)
        assert not (folder / f"{step}/finite").exists()
        if step == 4:
            checkpoints.prove()
            checkpoints.wait()
            assert (folder / "4/finite").exists()
    assert checkpoints.give_up() == 4
    assert (folder / "6.diverged").is_dir()


def test_a_copy_that_a_later_start_has_left_behind_is_not_taken(opened, tmp_path, caplog):
    """Its host was away, or the later start had no near tier."""
    checkpoints, abstract = opened(2, 1)
    assert checkpoints.restore(abstract, IDENTITY) is None
    checkpoints.save(2, state_of(2, abstract), meta_of(2), wait=True)
    save(checkpoints, abstract, 8)
    checkpoints.close()
    with contextlib.closing(Checkpoints(tmp_path / "run/checkpoints")) as without:
        assert without.restore(abstract, IDENTITY)[0] == 2
        without.save(4, state_of(4, abstract), meta_of(4), wait=True)
    checkpoints, abstract = opened(2, 1)
    assert checkpoints.restore(abstract, IDENTITY)[0] == 4
    assert "near copies of step 8 are left out: a later start went on from" in caplog.text
    assert not files(tmp_path, ".json")
    # One of a start behind that counts.
    save(checkpoints, abstract, 6)
    assert opened(2, 1)[0].restore(abstract, IDENTITY)[0] == 6


def test_starts_leave_copies_behind():
    def current(known) -> dict[str, list[int]]:
        steps = (20, 30, 33, 36, 60, 61)
        return {
            start: [step for step in steps if starts.is_current(known, Copy(step, start))]
            for start in "abcx"
        }

    known: starts.Starts = []
    assert current(known)["x"] == [20, 30, 33, 36, 60, 61]  # of before there were records
    for start, step in (("a", 0), ("b", 30), ("b", 35), ("c", 60)):  # b went back once
        known = starts.going_on(known, start, step)
    assert current(known) == {
        "a": [20, 30],
        "b": [20, 30, 33, 36, 60],
        "c": [20, 30, 33, 36, 60, 61],
        "x": [],
    }
    known = starts.going_on(known, "d", 34)
    assert current(known) == {"a": [20, 30], "b": [20, 30, 33], "c": [], "x": []}
    assert starts.going_on(known, "e", 0) == [("a", 0), ("e", 0)]
    # Starts that go on from one step have copies of it, of which a later one may find the middle's.
    for start in ("f", "g", "g"):
        known = starts.going_on(known, start, 34)
    assert known[-3:] == [("d", 34), ("f", 34), ("g", 34)]
    assert starts.is_current(known, Copy(34, "f")) and not starts.is_current(known, Copy(35, "f"))


def test_a_run_without_a_near_tier_has_no_file_of_starts(opened, tmp_path):
    _, abstract = opened(2, 1)
    with contextlib.closing(Checkpoints(tmp_path / "other")) as without:
        assert without.restore(abstract, IDENTITY) is None
    assert not (tmp_path / "other/near_starts").exists()


def test_a_copy_passes_the_checks_of_a_checkpoint(opened):
    checkpoints, abstract = opened(2, 1)
    save(checkpoints, abstract, 2)
    with pytest.raises(ValueError, match="tokenizer: t1 -> t2"):
        checkpoints.restore(abstract, {"tokenizer": "t2"})

    def refuse(meta, step, alone):
        raise ValueError(f"not from {step} with {meta['samples']}")

    with pytest.raises(ValueError, match="not from 2 with 64"):
        checkpoints.restore(abstract, IDENTITY, refuse)
    assert checkpoints.restore(abstract, IDENTITY)[0] == 2


def test_another_run_in_the_same_folder_has_copies_of_its_own(opened, tmp_path):
    checkpoints, abstract = opened(2, 1)
    save(checkpoints, abstract, 2)
    checkpoints.close()
    shutil.rmtree(tmp_path / "run")
    checkpoints, abstract = opened(2, 1)
    assert checkpoints.restore(abstract, IDENTITY) is None
    assert files(tmp_path, ".json")


def test_a_copied_run_folder_is_another_run(opened, tmp_path):
    checkpoints, abstract = opened(2, 1)
    save(checkpoints, abstract, 2)
    checkpoints.close()
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "run")
    assert opened(2, 1)[0].restore(abstract, IDENTITY)[0] == 2
    train = dataclasses.replace(TRAIN, near_folder=str(tmp_path / "host"))
    folder = str(tmp_path / "moved/checkpoints")
    config = config_on(2, 1)
    mesh = make_mesh(config.mesh, jax.devices()[:2])
    with contextlib.closing(
        Checkpoints(folder, near=lambda: opening.open_near(train, folder, abstract, mesh))
    ) as moved:
        assert moved.restore(abstract, IDENTITY) is None


def test_a_copy_every_step_is_never_left_out(opened, caplog):
    """The mark of the one before is not a reason."""
    checkpoints, abstract = opened(2, 1)
    checkpoints.near.wait()
    for step in (1, 2, 3):
        checkpoints.prove()
        checkpoints.near.save(step, state_of(step, abstract), meta_of(step))
        checkpoints.near._writing.result()
    assert not caplog.text
    checkpoints.near.wait()
    assert checkpoints.restore(abstract, IDENTITY)[0] == 3


def test_a_run_with_a_near_copy_alone_is_not_fresh(opened, tmp_path):
    """So it goes on where the run of train.init is gone."""
    checkpoints, abstract = opened(2, 1)
    assert not checkpoints.has_any()
    save(checkpoints, abstract, 2)
    assert not checkpoints.steps() and opened(2, 1)[0].has_any()


def test_copies_go_once_the_run_is_saved(opened, tmp_path):
    checkpoints, abstract = opened(2, 1)
    save(checkpoints, abstract, 2)
    checkpoints.drop_near()
    assert files(tmp_path, ".json")  # newer than any checkpoint
    checkpoints.save(2, state_of(2, abstract), meta_of(2), wait=True)
    checkpoints.drop_near()
    assert not files(tmp_path, ".json") and not files(tmp_path, ".data")


def test_a_busy_tier_leaves_a_copy_out(opened, caplog, monkeypatch):
    checkpoints, abstract = opened(2, 1)
    near = checkpoints.near
    near.wait()
    monkeypatch.setattr(near, "_writing", types.SimpleNamespace(done=lambda: False))
    near.save(2, state_of(2, abstract), meta_of(2))
    assert "the near copy of step 2 is left out" in caplog.text
    monkeypatch.undo()
    assert checkpoints.restore(abstract, IDENTITY) is None


def test_a_full_disk_costs_copies_and_not_the_run(opened, tmp_path, caplog, monkeypatch):
    checkpoints, abstract = opened(2, 1)
    save(checkpoints, abstract, 2)
    near = checkpoints.near

    def fail(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(near.files, "_write_parts", fail)
    save(checkpoints, abstract, 4, 6)
    assert caplog.text.count("could not be written to") == 1
    monkeypatch.undo()
    assert [path.parent.name[:2] for path in files(tmp_path, ".json")] == ["2-"]
    save(checkpoints, abstract, 8)
    checkpoints, abstract = opened(2, 1)
    assert checkpoints.restore(abstract, IDENTITY)[0] == 8


def test_a_disk_without_room_is_refused_with_the_bytes(opened, tmp_path, monkeypatch, caplog):
    checkpoints, abstract = opened(2, 1)
    need = checkpoints.near._own_bytes
    free = [need - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free[0]))
    message = f"has {need - 1:,} bytes free, and one copy of this run takes {need:,} there"
    with pytest.raises(ValueError, match=message):
        opened(2, 1)
    free[0] = need
    opened(2, 1)
    assert "has room for one copy" in caplog.text


def test_an_empty_folder_goes_once_every_process_has_looked(opened, tmp_path, monkeypatch):
    """Others may have just made it."""
    there = []
    real = agree.gather

    def gather(value):
        there.append(len(list((tmp_path / "host").glob("*"))))
        return real(value)

    monkeypatch.setattr(agree, "gather", gather)
    opened(2, 1)
    assert 1 in there and not list((tmp_path / "host").iterdir())


def test_a_folder_has_one_name_whatever_its_path(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert agree.folder(tmp_path / "a") == agree.folder(tmp_path / "b") != agree.folder(tmp_path)


def test_folders_that_are_no_near_folder_are_refused(opened, tmp_path):
    for folder, message in (("", "needs train.near_folder"), ("gs://b/near", "is an object store")):
        train = dataclasses.replace(TRAIN, near_folder=folder)
        with pytest.raises(ValueError, match=message):
            validate(Config(model=MODEL, train=train))
    inside = dataclasses.replace(TRAIN, near_folder=str(tmp_path / "run/near"))
    with pytest.raises(ValueError, match="is inside the run folder, which is the far tier"):
        opening.open_near(inside, str(tmp_path / "run/checkpoints"), None, None)
    (tmp_path / "host").write_text("")
    with pytest.raises(ValueError, match="cannot be written to"):
        opened(2, 1)


class Grid:
    """A mesh over devices of which only the processes are known."""

    axis_names = ("pipe", "data", "expert", "context", "tensor")

    def __init__(self, *sizes: int, of_a_process: int) -> None:
        count = int(np.prod(sizes))
        devices = [types.SimpleNamespace(process_index=i // of_a_process) for i in range(count)]
        self.devices = np.array(devices).reshape(sizes)


@pytest.mark.parametrize(
    ("sizes", "devices", "hosts", "expected"),
    [
        ((1, 8, 1, 1, 1), 4, "ab", {0: 1, 1: 0}),
        ((1, 2, 1, 1, 4), 4, "ab", {0: 1, 1: 0}),
        ((2, 4, 1, 1, 1), 4, "ab", {}),  # each stage, and so each replica, is within a process
        ((1, 8, 1, 1, 1), 8, "a", {}),
        ((1, 4, 1, 1, 2), 2, "aabb", {0: 2, 1: 3, 2: 0, 3: 1}),  # a card is a process
        ((1, 4, 1, 1, 2), 2, "aaaa", {0: 1, 1: 2, 2: 3, 3: 0}),
        ((2, 2, 1, 1, 2), 2, "abcd", {0: 1, 1: 0, 2: 3, 3: 2}),
        ((1, 2, 1, 1, 4), 2, "aabb", {0: 2, 1: 3, 2: 0, 3: 1}),  # a replica spans processes
        ((2, 2, 1, 1, 2), 2, "aabb", {0: 2, 1: 3, 2: 0, 3: 1}),  # replicas are within a host
        ((1, 3, 1, 1, 2), 2, "aab", {0: 1, 1: 2, 2: 0}),  # one has to be on the same host
    ],
)
def test_peers_are_in_the_next_replica_on_another_host(sizes, devices, hosts, expected):
    assert agree.peers_of(Grid(*sizes, of_a_process=devices), list(hosts)) == expected


def test_the_start_says_how_many_peers_are_on_the_same_host(opened, monkeypatch):
    near = opened(2, 1)[0].near
    monkeypatch.setattr(near, "_peers", {0: 1, 1: 2, 2: 0})
    for hosts, said in (("aab", "; 1 of 3 peers are on"), ("aaa", "; peers are on"), ("abc", None)):
        monkeypatch.setattr(near, "_hosts", list(hosts))
        line = near.lines()[0]
        assert f"{said} the same host" in line if said else "the same host" not in line


def test_what_another_host_holds_is_not_sent():
    assert agree.holds_alone(0, {0}, ["a", "b"]) and agree.holds_alone(0, {0, 1}, ["a", "a", "b"])
    assert not agree.holds_alone(0, {0, 1}, ["a", "b"])
    assert not agree.holds_alone(1, {0, 1}, ["a", "a", "b"])  # the first of a host sends
    assert not agree.holds_alone(0, {0, 1}, ["a", "a"])  # no other host: another process will do
