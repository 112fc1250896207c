"""Save and restore checkpoints exactly on any mesh, and after kills, damage and full disks."""

import contextlib
import errno
import gc
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, to_json
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.errors import PassingError
from mtnlg_jax.parallel.mesh import make_mesh, shardings_of
from mtnlg_jax.train import manifest
from mtnlg_jax.train.checkpoint import Checkpoints, load_run
from mtnlg_jax.train.state import abstract_state

MODEL = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=384, max_position_embeddings=8
)
IDENTITY = {
    "model": {"num_layers": 2, "hidden_size": 16},
    "tokenizer": "t1",
    "data": {"corpus": "d1"},
}


def config_on(data: int, tensor: int) -> Config:
    return Config(model=MODEL, mesh=MeshConfig(data=data, tensor=tensor))


def abstract_on(data: int, tensor: int):
    config = config_on(data, tensor)
    return abstract_state(config, make_mesh(config.mesh, jax.devices()[: data * tensor]))


def state_of(step: int, abstract):
    """Return a training state whose every value follows from ``step``."""
    leaves, structure = jax.tree.flatten(abstract)
    made = []
    for index, leaf in enumerate(leaves):
        values = np.random.default_rng([step, index]).normal(size=leaf.shape) * 1000
        made.append(jax.device_put(values.astype(leaf.dtype), leaf.sharding))
    return jax.tree.unflatten(structure, made)


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def meta_of(step: int) -> dict:
    return {
        "config": json.loads(to_json(config_on(1, 1))),
        "identity": IDENTITY,
        "samples": 32 * step,
    }


def tree_of(folder) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()
    }


@pytest.fixture(scope="module")
def one():
    return abstract_on(1, 1)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, one):
    """Make a run with the checkpoints 1 (of the lower metric) and 2, and its tokenizer. Tests copy
    it."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state_of(step, one), meta_of(step), metric=step)
    checkpoints.close()
    train_tokenizer(["a b c d e f g h i j"] * 20, 280).save(folder / "tokenizer")
    return folder


@pytest.fixture
def run(workdir, tmp_path):
    return Path(shutil.copytree(workdir, tmp_path / "run"))


def restore(folder, abstract, identity=IDENTITY):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(abstract, identity), checkpoints
    finally:
        checkpoints.close()


# --- exact restores


def test_any_mesh_restores_any_checkpoint(tmp_path):
    saved = state_of(7, abstract_on(4, 2))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, saved, meta_of(7), wait=True)
    layouts = set()
    for data, tensor in ((4, 2), (2, 4), (8, 1), (1, 1)):
        abstract = abstract_on(data, tensor)
        step, state, meta = checkpoints.restore(abstract, IDENTITY)
        assert step == 7 and meta == meta_of(7)
        assert jax.tree.structure(state) == jax.tree.structure(saved)
        assert bits(state) == bits(saved)
        assert jax.tree.map(lambda a: a.sharding, state) == jax.tree.map(
            lambda a: a.sharding, abstract
        )
        layouts.add(state.params["blocks"]["mlp"]["w_in_DF"].sharding.shard_shape((2, 16, 64)))
    checkpoints.close()
    assert len(layouts) == 4


def test_buffers_may_be_donated_at_once(tmp_path, one):
    state = state_of(1, one)
    expected = bits(jax.tree.map(lambda a: np.array(a, copy=True), state))
    advance = jax.jit(lambda s: jax.tree.map(lambda a: a * 2 + 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, meta_of(1))
    for _ in range(5):
        state = advance(state)
    jax.block_until_ready(state)
    _, restored, _ = checkpoints.restore(one, IDENTITY)
    checkpoints.close()
    assert bits(restored) == expected != bits(state)


def test_an_empty_folder_restores_nothing(tmp_path, one):
    assert restore(tmp_path / "new", one)[0] is None


def test_orbax_logs_nothing(tmp_path, one, capfd, recwarn):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1, one), meta_of(1), wait=True)
    checkpoints.restore(one, IDENTITY)
    checkpoints.close()
    assert "".join(capfd.readouterr()) == "" and not recwarn.list


# --- which checkpoints are kept


def test_the_last_and_the_best_are_kept(tmp_path, one):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step, metric in (
        (1, float("nan")),
        (2, 3.0),
        (3, 4.0),
        (4, float("nan")),
        (5, None),
        (6, 3.5),
    ):
        checkpoints.save(step, state_of(step, one), meta_of(step), metric)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 6] and checkpoints.best_step() == 2
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "5", "6", "lock"]


def test_without_a_best_only_the_last_are_kept(tmp_path, one):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=False)
    for step in (1, 2):
        checkpoints.save(step, state_of(step, one), meta_of(step), metric=step)
    checkpoints.close()
    assert checkpoints.steps() == [2]


def save(checkpoints, step, one, **settings):
    checkpoints.save(step, state_of(step, one), meta_of(step), wait=True, **settings)


def test_a_proven_checkpoint_is_not_removed_for_an_unproven_one(tmp_path, one):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1, one)
    save(checkpoints, 2, one, proven=False)
    assert checkpoints.steps() == [1, 2]
    checkpoints.prove()  # the next step was finite
    checkpoints.wait()
    assert checkpoints.steps() == [2]
    save(checkpoints, 3, one, proven=False)
    assert checkpoints.give_up() == 2  # it was not
    assert checkpoints.steps() == [2] and checkpoints.give_up() == 2
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3.diverged", "lock"]


def test_a_restart_knows_which_checkpoints_are_proven(tmp_path, one):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, one)
    save(checkpoints, 2, one, proven=False)  # and killed before the next step
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert restore_in(checkpoints, one) == 2 and checkpoints.give_up() == 1
    assert restore_in(checkpoints, one) == 1 and checkpoints.give_up() == 1
    checkpoints.prove()
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.diverged", "lock"]


def test_without_a_proven_checkpoint_a_run_starts_over(tmp_path, one):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, one, proven=False)
    assert checkpoints.give_up() is None and checkpoints.restore(one, IDENTITY) is None
    assert checkpoints.best_metric() == math.inf
    checkpoints.save(2, state_of(2, one), meta_of(2), metric=3.5, wait=True)
    assert checkpoints.best_metric() == 3.5
    checkpoints.close()


def restore_in(checkpoints, one) -> int:
    return checkpoints.restore(one, IDENTITY)[0]


def test_a_refused_config_raises_before_arrays_are_read(run, one, monkeypatch):
    monkeypatch.setattr(manifest, "damage", lambda *_: pytest.fail("hashed"))
    seen = []

    def refuse(meta, step, alone):
        seen.append((meta["samples"], step, alone))
        raise ValueError("not with these settings")

    checkpoints = Checkpoints(run / "checkpoints")
    with pytest.raises(ValueError, match="not with these settings"):
        checkpoints.restore(one, IDENTITY, refuse)
    checkpoints.close()
    assert seen == [(64, 2, False)]


def test_a_step_is_saved_once(run, one):
    before = tree_of(run / "checkpoints" / "2")
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save(2, state_of(99, one), meta_of(99), wait=True)
    checkpoints.close()
    assert tree_of(run / "checkpoints" / "2") == before


def test_keeping_no_checkpoint_raises_an_error(tmp_path):
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpoints(tmp_path, keep_last=0)


# --- kills


def test_a_kill_between_any_two_operations_loses_nothing(tmp_path, one, monkeypatch):
    """Copy the folder at every file operation of a save with pruning: a kill there leaves this
    copy."""
    taken = []
    live = tmp_path / "live"

    def snapshot(label):
        taken.append(tmp_path / f"{len(taken)}-{label}")
        with contextlib.suppress(
            shutil.Error
        ):  # Orbax's threads may be writing: then this is half of a save
            shutil.copytree(live, taken[-1])

    def around(owner, name, between=None):
        act = getattr(owner, name)

        def watched(*args, **options):
            path = Path(args[0]) if args and isinstance(args[0], os.PathLike) else live / "2"
            if live not in (
                path.parent,
                path.parent.parent,
            ):  # operations deep in a checkpoint are those of Orbax
                return act(*args, **options)
            snapshot(f"before-{name}")
            if between is not None:
                between(path)
                snapshot(f"in-{name}")
            return act(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    def half_delete(path):
        for file in [file for file in sorted(path.rglob("*")) if file.is_file()][::2]:
            file.unlink()

    checkpoints = Checkpoints(live, keep_last=1)
    checkpoints.save(1, state_of(1, one), meta_of(1), wait=True)
    around(checkpoints._orbax, "save")
    around(checkpoints._orbax, "wait_until_finished")
    around(manifest, "write_record")
    around(manifest, "write_file")
    path_type = type(checkpoints.folder)
    around(path_type, "touch")
    around(path_type, "unlink")
    around(path_type, "rmtree", half_delete)
    checkpoints.save(2, state_of(2, one), meta_of(2), wait=True)
    checkpoints.close()
    monkeypatch.undo()
    snapshot("end")

    assert len(taken) >= 10
    found = []
    for copy in taken:
        (step, state, meta), reopened = restore(copy, one)
        assert bits(state) == bits(state_of(step, one)) and meta["samples"] == 32 * step, copy.name
        assert not reopened.warnings, copy.name
        assert {p.name for p in copy.iterdir()} <= {"1", "2", "lock"}, copy.name
        found.append(step)
    assert found == sorted(found) and set(found) == {1, 2}


SAVER = """
    import sys
    sys.path[:0] = [sys.argv[2], sys.argv[3]]
    from test_checkpoint import IDENTITY, Checkpoints, abstract_on, bits, meta_of, state_of
    abstract = abstract_on(1, 1)
    checkpoints = Checkpoints(sys.argv[1], keep_last=1)
    restored = checkpoints.restore(abstract, IDENTITY)
    step = restored[0] if restored else 0
    if restored:
        assert bits(restored[1]) == bits(state_of(step, abstract)) and not checkpoints.warnings
    print("restored", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, state_of(step, abstract), meta_of(step), metric=-step)
        checkpoints.wait()
        print("saved", step, flush=True)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_kill_nine_in_the_middle_of_saves(tmp_path, kills):
    """Kill a process that only saves at seeded moments; the next one restores what it left."""
    moments = random.Random(kills)
    here = Path(__file__).resolve()
    command = [sys.executable, "-c", textwrap.dedent(SAVER), tmp_path, here.parents[2], here.parent]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    last = 0
    for _ in range(kills):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        restored = child.stdout.readline().split()
        assert restored[:1] == ["restored"] and int(restored[1]) >= last, (
            "its check of what it found failed"
        )
        first = child.stdout.readline()
        # From the middle of a save to a few saves later.
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(moments.uniform(0.0, 1.0))
        child.send_signal(signal.SIGKILL)
        lines = [first, *child.stdout.read().splitlines()]
        child.wait()
        child.stdout.close()
        last = max(int(line.split()[1]) for line in lines if line.startswith("saved"))
    abstract = abstract_on(1, 1)
    (step, state, _), checkpoints = restore(tmp_path, abstract)
    assert (
        step >= last > 0
        and bits(state) == bits(state_of(step, abstract))
        and not checkpoints.warnings
    )


def test_a_leftover_without_a_writer_is_removed(run, one):
    folder = run / "checkpoints"
    shutil.copytree(folder / "2", folder / "3")
    (folder / "3" / "record.json").unlink()
    (folder / "3.unfinished").touch()
    (folder / "4.orbax-checkpoint-tmp-17").mkdir()
    (folder / "4.unfinished").touch()
    (folder / "2.unfinished").touch()  # killed after the record, before the marker went
    (restored, *_), _ = restore(folder, one)
    assert restored == 2
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "lock"]


def test_the_folder_of_another_run_is_not_changed(run):
    folder = run / "checkpoints"
    (folder / "4.orbax-checkpoint-tmp-17").mkdir()
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, folder / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(BlockingIOError, match=r"another run .*another --workdir"):
            Checkpoints(folder)
        assert (folder / "4.orbax-checkpoint-tmp-17").exists()
        other.communicate(b"\n")
    Checkpoints(folder).close()
    assert not (folder / "4.orbax-checkpoint-tmp-17").exists()


# --- damage


def flip(path: Path, position: int | None = None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 4
    path.write_bytes(content)


def largest(folder: Path, item: str) -> Path:
    return max(
        (f for f in (folder / item).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )


DAMAGES = {
    "flipped byte of a parameter": lambda f: flip(largest(f, "params")),
    "flipped byte of a moment": lambda f: flip(largest(f, "rest")),
    "truncated": lambda f: os.truncate(largest(f, "rest"), 100),
    "emptied": lambda f: os.truncate(largest(f, "params"), 0),
    "missing file": lambda f: largest(f, "params").unlink(),
    "missing folder": lambda f: shutil.rmtree(f / "rest"),
    "missing record": lambda f: (f / "record.json").unlink(),
    "flipped byte of the record": lambda f: flip(f / "record.json"),
    "truncated record": lambda f: os.truncate(f / "record.json", 200),
    "empty record": lambda f: os.truncate(f / "record.json", 0),
    "record that is no text": lambda f: (f / "record.json").write_bytes(b"\xff\xfe" * 50),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_restored(run, one, kind):
    folder = run / "checkpoints"
    DAMAGES[kind](folder / "2")
    left = tree_of(folder / "2")
    (step, state, _), checkpoints = restore(folder, one)
    assert step == 1 and bits(state) == bits(state_of(1, one))
    assert len(checkpoints.warnings) == 1 and f"{folder}/2 is damaged" in checkpoints.warnings[0]
    assert tree_of(folder / "2.damaged") == left and not (folder / "2").exists()
    assert checkpoints.steps() == [1]


def test_a_change_of_any_byte_is_detected(run):
    path = epath.Path(run / "checkpoints" / "2")
    record, damage = manifest.read_record(path)
    assert damage is None and manifest.damage(path, record) is None
    names = [name for name in tree_of(path) if name not in ("record.json", "finite")]
    assert sorted(record["files"]) == sorted(names)
    for name in names:
        file = Path(path / name)
        content = file.read_bytes()
        for position in {0, len(content) // 3, len(content) - 1}:
            flip(file, position)
            assert name in manifest.damage(path, record)
            file.write_bytes(content)
    text = Path(path / "record.json").read_bytes()
    for position in range(0, len(text), 97):
        flip(Path(path / "record.json"), position)
        assert manifest.read_record(path)[0] is None
        Path(path / "record.json").write_bytes(text)
    assert manifest.read_record(path)[0] == record


def test_only_damaged_checkpoints_raise_an_error(run, one):
    folder = run / "checkpoints"
    flip(largest(folder / "1", "rest"))
    largest(folder / "2", "params").unlink()
    with pytest.raises(
        OSError, match=r"2 \(params.* is missing\), 1 \(rest.*\); .*another --workdir"
    ):
        restore(folder, one)
    with pytest.raises(OSError, match=r"1\.damaged, 2\.damaged; .*another --workdir"):
        restore(folder, one)


def test_damage_twice_at_one_step_keeps_both(run, one):
    folder = run / "checkpoints"
    shutil.copytree(folder / "2", folder / "2.damaged")
    (folder / "2" / "record.json").unlink()
    restore(folder, one)
    assert (folder / "2.damaged").exists() and (folder / "2.damaged-2").exists()


# --- another run


@pytest.mark.parametrize(
    "change, shown",
    [
        ({"model": {"num_layers": 4, "hidden_size": 16}}, "model.num_layers: 2 -> 4"),
        ({"tokenizer": "t2"}, "tokenizer: t1 -> t2"),
        ({"data": {"other": "d2"}}, "data.corpus: d1 -> absent, data.other: absent -> d2"),
    ],
)
def test_another_identity_raises_an_error(run, one, change, shown):
    before = tree_of(run / "checkpoints")
    with pytest.raises(ValueError, match=shown + ".*another --workdir"):
        restore(run / "checkpoints", one, IDENTITY | change)
    assert tree_of(run / "checkpoints") == before | {
        "lock": (run / "checkpoints" / "lock").read_bytes()
    }


def test_other_arrays_raise_an_error(run, one):
    wider = one._asdict() | {"step": jax.ShapeDtypeStruct((3,), jnp.float32), "more": one.step}
    shown = (
        r"arrays .*step: int32\[\] -> float32\[3\], more: absent -> int32\[\]; .*another --workdir"
    )
    with pytest.raises(ValueError, match=shown):
        restore(run / "checkpoints", wider)


# --- full disks and permissions


def assert_full_disk_is_told(folder, one, checkpoints, amount=""):
    with pytest.raises(
        OSError, match=f"checkpoint 2 .*{folder}: the disk is full.*{amount}.* from step 1"
    ):
        checkpoints.save(2, state_of(2, one), meta_of(2))
        checkpoints.save(3, state_of(3, one), meta_of(3))
    checkpoints.wait()  # told once
    assert checkpoints.steps() == [1]
    assert sorted(p.name for p in Path(folder).iterdir() if p.name not in ("1", "ballast")) == [
        "lock"
    ]
    assert bits(checkpoints.restore(one, IDENTITY)[1]) == bits(state_of(1, one))


def test_full_disk_at_the_record(tmp_path, one, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1, one), meta_of(1), wait=True)
    write = manifest.write_file

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_file", full)
    assert_full_disk_is_told(tmp_path, one, checkpoints)
    monkeypatch.setattr(manifest, "write_file", write)
    checkpoints.save(2, state_of(2, one), meta_of(2), wait=True)
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_a_failed_save_raises_once(tmp_path, one, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_file", full)
    checkpoints.save(1, state_of(1, one), meta_of(1), proven=False)
    checkpoints.prove()
    with pytest.raises(PassingError, match="the disk is full"):
        checkpoints.wait()
    checkpoints.wait()
    checkpoints.close()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# When one array fails, Orbax drops the coroutines that would have written the others.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("announced", [True, False])
def test_full_disk_at_the_arrays(small_disk, one, capfd, monkeypatch, recwarn, announced):
    checkpoints = Checkpoints(small_disk)
    checkpoints.save(1, state_of(1, one), meta_of(1), wait=True)
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize - 60_000))
    if not announced:  # another program takes the space while the arrays are written
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10**9)
        )
        first = itertools.count()
        remove = type(checkpoints.folder).rmtree

        def rmtree(path, *args, **kwargs):
            if not next(first):  # another array is still being written
                raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
            remove(path, *args, **kwargs)

        monkeypatch.setattr(type(checkpoints.folder), "rmtree", rmtree)
    amount = "0.1 MB are free, 0.2 MB needed" if announced else ""
    assert_full_disk_is_told(small_disk, one, checkpoints, amount)
    warned = [str(each.message) for each in recwarn.list]
    assert "".join(capfd.readouterr()) == ""
    assert not [message for message in warned if not message.endswith("was never awaited")]
    (small_disk / "ballast").unlink()
    checkpoints.save(2, state_of(2, one), meta_of(2), wait=True)
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()
    gc.collect()  # here, and not in a later test that would be blamed for them


def test_an_unwritable_folder_raises_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written to .*another --workdir"):
        Checkpoints(tmp_path / "file" / "checkpoints")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_raises_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot be written to .*another --workdir"):
        Checkpoints(tmp_path)


# --- load_run


def test_load_run_reads_the_best_or_the_last(run, one):
    for which, step in (("best", 1), ("last", 2)):
        loaded = load_run(run, which)
        assert (
            loaded.step == step
            and loaded.config == config_on(1, 1)
            and loaded.meta == meta_of(step)
        )
        assert bits(loaded.params) == bits(state_of(step, one).params)
        assert jax.tree.structure(loaded.params) == jax.tree.structure(one.params)
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("a b c")) == "a b c"
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded.params)} == {
        jax.sharding.SingleDeviceSharding(jax.devices()[0])
    }


def test_load_run_reads_no_optimizer(run, one):
    for step in (1, 2):
        shutil.rmtree(run / "checkpoints" / str(step) / "rest")
    before = tree_of(run)
    assert bits(load_run(run).params) == bits(state_of(1, one).params)
    assert tree_of(run) == before


def test_load_run_on_a_mesh(run, one):
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    params = load_run(run, mesh=mesh).params
    assert bits(params) == bits(state_of(1, one).params)
    assert jax.tree.map(lambda a: a.sharding, params) == shardings_of(params, mesh, zero=0)


def test_load_run_skips_damage_and_moves_nothing(run):
    flip(largest(run / "checkpoints" / "1", "params"))
    assert load_run(run).step == 2
    flip(largest(run / "checkpoints" / "2", "params"))
    before = tree_of(run)
    with pytest.raises(OSError, match=r"1 \(params.*\), 2 \(params"):
        load_run(run)
    assert tree_of(run) == before


def test_load_run_of_an_empty_folder_raises_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_run(tmp_path / "none")
    with pytest.raises(ValueError, match="which='first'"):
        load_run(tmp_path, "first")


def test_load_run_without_metrics_takes_the_newest(tmp_path, workdir, one):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state_of(step, one), meta_of(step))
    checkpoints.close()
    shutil.copytree(workdir / "tokenizer", tmp_path / "tokenizer")
    assert load_run(tmp_path).step == 2
    assert jnp.isfinite(load_run(tmp_path).params["tokens_VD"][...]).all()


def test_metrics_of_another_order_of_samples_are_not_compared(tmp_path):
    # Version 0.1.0 evaluated other rows and named no order.
    for step, metric, meta in [
        (1, 1.0, {}),
        (2, 3.0, {"order_of_samples": "2"}),
        (3, 2.5, {"order_of_samples": "2"}),
    ]:
        folder = epath.Path(tmp_path) / str(step)
        folder.mkdir()
        manifest.write_record(folder, {"step": step, "metric": metric, "meta": meta})
    assert (
        manifest.best(epath.Path(tmp_path)) == 3
        and manifest.best_metric(epath.Path(tmp_path)) == 2.5
    )


def test_counters_keep_their_names_on_disk(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    one = abstract_on(1, 1)
    checkpoints.save(1, state_of(1, one), meta_of(1), wait=True)
    arrays = manifest.read_record(epath.Path(tmp_path) / "1")[0]["arrays"]
    checkpoints.close()
    names = {name for name in arrays if not name.startswith(("params.", "opt_state."))}
    assert names == {"step", "samples", "bad", "skipped"}
