"""Keep compiled steps and start from them: what decides a program, damaged files, whole runs."""

import dataclasses
import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mtnlg_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
    override,
    to_json,
)
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import (
    changes,
    evaluate,
    executable_file,
    executables,
    loop,
    program_key,
)
from mtnlg_jax.train.batch import abstract_batch
from mtnlg_jax.train.executable_file import Program
from mtnlg_jax.train.executables import Executables, KeptStep
from mtnlg_jax.train.metrics import read_metrics
from mtnlg_jax.train.processes import fingerprint
from mtnlg_jax.train.program_key import CODE, FREE, differences, key_of, program_options
from mtnlg_jax.train.state import abstract_state
from mtnlg_jax.train.step import make_train_step

WORDS = "the whale swam north while the old captain slept and nobody on the ship dared".split()
CONFIG = Config(
    model=ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=16,
        vocab_size=384,
    ),
    mesh=MeshConfig(data=4, tensor=2),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    train=TrainConfig(
        steps=3, global_batch_size=8, compute_dtype="float32", eval_every=0, eval_batches=1
    ),
)
# Another value of each setting that is free, and of one that decoding reads.
OTHERS = {
    "name": "other",
    "model.init_method_std": 0.1,
    "model.vocab_size_divisible_by": 8,
    "data.path": "other",
    "data.blend": (("a", 1.0), ("b", 2.0)),
    "data.tokenizer": "other",
    "data.heldout": 0.2,
    "data.masking.word_share": 0.2,
    "data.masking.mask_share": 0.5,
    "data.masking.random_share": 0.2,
    "optimizer.dp_accountant": "rdp",
    "optimizer.dp_secret": "other",
    "train.init": "other",
    "train.stages": (StageConfig(name="other", learning_rate_scale=0.5),),
    "train.log_every": 7,
    "train.eval_every": 7,
    "train.eval_batches": 7,
    "train.eval_tasks": ("other",),
    "train.eval_tasks_every": 7,
    "train.eval_tasks_rows": 7,
    "train.eval_tasks_fewshot": 7,
    "train.eval_tasks_data": "other",
    "train.save_every": 7,
    "train.keep_last": 7,
    "train.keep_best": False,
    "train.max_bad_steps": 7,
    "train.watchdog_seconds": 7,
    "train.phase_seconds": 7,
    "train.heartbeat_seconds": 77,
    "train.stats_every": 7,
    "train.spike_leave_out": 7,
    "train.near_every": 7,
    "train.near_folder": "other",
    "train.trackers": (),
    "train.tracker_project": "other",
    "train.profile_steps": (7, 8),
    "train.profile_signal": "SIGUSR1",
    "train.profile_signal_steps": 7,
    "train.sample_prompts": ("other",),
    "train.sample_every": 7,
    "train.sample_tokens": 7,
    "train.compare_every": 7,
    "train.verify_every": 7,
    "train.device_flops": 7.0,
    "decode.temperature": 0.5,
}


def changed(config: Config, name: str, value) -> Config:
    section, *rest = name.split(".")
    if not rest:
        return dataclasses.replace(config, **{section: value})
    inner = changed(getattr(config, section), ".".join(rest), value)
    return dataclasses.replace(config, **{section: inner})


def text_of(config: Config) -> str:
    mesh = make_mesh(config.mesh)
    whole = jax.ShapeDtypeStruct((), jnp.int32)
    step = make_train_step(config, mesh, causal=True)
    batch = abstract_batch(config, mesh)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    return fingerprint(
        step.lower(abstract_state(config, mesh), batch, whole, whole, scale).as_text()
    )


def test_free_settings_do_not_change_the_program_and_others_change_the_key():
    assert set(OTHERS) - {"decode.temperature"} == FREE
    names = set(changes.normalized(CONFIG))
    assert FREE < names
    mesh = make_mesh(CONFIG.mesh)
    other = CONFIG
    for name, value in OTHERS.items():
        other = changed(other, name, value)
    assert text_of(other) == text_of(CONFIG)
    here = key_of(CONFIG, mesh) | program_options(CONFIG, causal=True)
    assert differences(here, key_of(other, mesh) | program_options(other, causal=True)) == []
    # All other settings are in the key.
    decisive = {name for name in names - FREE if not name.startswith("decode.")}
    assert decisive <= set(here)
    # The rows of a unit of differential privacy are the divisor of its sums.
    assert "optimizer.dp_source_rows" in here
    faster = override(CONFIG, "optimizer.learning_rate=2e-3")
    assert text_of(faster) != text_of(CONFIG)
    assert differences(here, here | key_of(faster, mesh)) == [
        "optimizer.learning_rate 0.001 there, 0.002 here"
    ]
    # The length of a run decides the learning rate, which is compiled into the step.
    longer = program_options(CONFIG, causal=True, total_samples=32)
    assert differences(program_options(CONFIG, causal=True), longer) == [
        "program.samples at the end 24 there, 32 here"
    ]


def test_other_devices_flags_and_code_change_the_key(monkeypatch):
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    here = key_of(CONFIG, mesh)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    turned = make_mesh(MeshConfig(data=4), jax.devices()[3::-1])
    # It is added to train.seed where keys are made, which is in the step.
    jax.config.update("jax_random_seed_offset", 3)
    try:
        found = differences(here, key_of(CONFIG, turned))
    finally:
        jax.config.update("jax_random_seed_offset", 0)
    assert 'flag --xla_cpu_enable_fast_math nothing there, "true" here' in found
    assert any(line.startswith("devices.order ") for line in found)
    assert "jax_random_seed_offset 0 there, 3 here" in found
    # The number of simulated devices is not a flag of the compiler, in whatever way it is set.
    assert not any("device_count" in line for line in found)
    for name in ("jax", "jaxlib", "flax", "optax", "mtnlg_jax"):
        assert here[f"version of {name}"]


def test_flags_in_a_file_and_settings_of_jax_are_in_the_key(tmp_path, monkeypatch):
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    here = key_of(CONFIG, mesh)
    assert here["jax_use_shardy_partitioner"] is jax.config.jax_use_shardy_partitioner
    assert "jax_of_another_version" not in here and json.loads(json.dumps(here)) == here
    file = tmp_path / "flags"
    file.write_text("--xla_a=1\n--xla_b=2\n")
    monkeypatch.setenv("XLA_FLAGS", str(file))
    monkeypatch.setattr(program_key.compat, "platform", lambda: "tpu")
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(file))
    names = (*program_key._SETTINGS_OF_JAX, "jax_of_another_version")
    monkeypatch.setattr(program_key, "_SETTINGS_OF_JAX", names)
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O1")
    try:
        found = differences(here, key_of(CONFIG, mesh))
    finally:
        jax.config.update("jax_optimization_level", before)
    assert {'flag --xla_a nothing there, "1" here', 'flag --xla_b nothing there, "2" here'} < {
        *found
    }
    assert f'TPU_LIBRARY_PATH nothing there, ["{file}", 20] here' in found
    assert any(line.startswith("jax_optimization_level ") for line in found)


def test_a_process_with_a_folder_of_its_own_mends_its_file(tmp_path, monkeypatch):
    """This one is not the first, which is the one that writes on a shared disk."""
    key = {"a": 1}
    old, new = (Program("causal", key, "0123", [], content) for content in (b"old", b"new"))
    kept = Executables(None, str(tmp_path))
    path = Path(kept.path_of(key))
    between = [lambda: None]
    monkeypatch.setattr(executables.processes, "is_first", lambda: False)
    monkeypatch.setattr(executables.processes, "barrier", lambda name: between[0]())
    monkeypatch.setattr(executables, "serialized", lambda *_: new)
    step = KeptStep(kept, "causal", key, make_mesh(MeshConfig(), jax.devices()[:1]))

    def after(content: bytes) -> Program:
        path.write_bytes(content)
        assert step.load((0,)) is None
        step.keep(None, "0123", 1.0)
        return executable_file.read(str(path))["causal"]

    assert after(b"damaged") == new
    # What cannot be loaded here is written again as well.
    executable_file.write(str(path), [old])
    whole = path.read_bytes()
    assert after(whole) == new
    # The first process has written it in between: it is the same folder.
    between[0] = lambda: path.write_bytes(whole)
    assert after(b"damaged") == old
    # It could be loaded, but another process compiled.
    between[0] = lambda: None
    monkeypatch.setattr(executables, "loaded", lambda *_: "loaded")
    path.write_bytes(whole)
    assert step.load((0,)) == ("loaded", "0123")
    step.keep(None, "0123", 1.0)
    assert executable_file.read(str(path))["causal"] == old


def test_the_hash_of_the_code_covers_what_makes_a_step():
    program = (
        "import sys, mtnlg_jax.train.step\n"
        "print(*(name for name in sys.modules if name.startswith('mtnlg_jax.')))"
    )
    root = Path(program_key.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    parts = [name.split(".") for name in done.stdout.split()]
    folders = {part[1] for part in parts if len(part) > 2}
    assert "train" in folders
    assert folders <= set(CODE)


def test_a_foreign_or_damaged_file_is_refused(tmp_path):
    path = tmp_path / "one.executable"
    programs = [
        Program("causal", {"a": 1}, "0123", [{"loss": 0}], b"x" * 1000),
        Program("masked", {"a": 2}, "4567", [{"loss": 0}], b"y" * 500),
    ]
    executable_file.write(str(path), programs)
    assert list(executable_file.read(str(path)).values()) == programs
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-700] ^= 1
    for content, what in (
        (whole[:-1], "'masked'"),
        (whole[:-600], "'causal'"),
        (bytes(flipped), "'causal'"),
        (whole[:60], "its header"),
        (whole.replace(b'"a": 1', b'"a": 3'), "its header"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"truncated or damaged: .*{what}"):
            executable_file.read(str(path))
    path.write_bytes(b"\x80\x04\x95 a pickle")
    with pytest.raises(ValueError, match="is not an executable of this version"):
        executable_file.read(str(path))
    with pytest.raises(FileNotFoundError, match="compile_ahead.py --save"):
        executable_file.read(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="exclude each other"):
        Executables("a", "b")
    with pytest.raises(ValueError, match="is a folder; give a file of launch/compile_ahead.py"):
        Executables(file=str(tmp_path))
    with pytest.raises(ValueError, match="--executable_folder=.*one.executable is a file"):
        Executables(folder=str(path))


class Untraced:
    """A step that must not be traced."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was called on a step that was kept")


def losses(workdir) -> list:
    records = read_metrics(str(workdir / "metrics.jsonl"))
    return [
        (record["loss"], record["grad_norm"]) for record in records if record["kind"] == "train"
    ]


@pytest.fixture
def evaluated_once(monkeypatch):
    """Give runs of the same config the same program of evaluation."""
    monkeypatch.setattr(evaluate, "make_eval", functools.cache(evaluate.make_eval))


@pytest.mark.usefixtures("evaluated_once")
def test_a_second_start_neither_traces_nor_compiles(tmp_path, prepared_words, monkeypatch, caplog):
    config = dataclasses.replace(
        CONFIG,
        data=DataConfig(path=prepared_words(WORDS)),
        decode=DecodeConfig(),
    )
    folder = tmp_path / "kept"
    said = []
    loop.train(
        config,
        str(tmp_path / "first"),
        False,
        said.append,
        executables=Executables(None, str(folder)),
    )
    (path,) = folder.iterdir()
    assert f"kept in {path}" in said[-1]

    def start(name, executables):
        return loop.train(config, str(tmp_path / name), False, said.append, executables=executables)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", lambda *args, **options: Untraced())
        start("folder", Executables(None, str(folder)))
        start("file", Executables(str(path)))
    assert f"loaded from {path}" in said[-1]
    assert losses(tmp_path / "folder") == losses(tmp_path / "file") == losses(tmp_path / "first")

    # Another run is refused before any work.
    other = override(config, "train.seed=3")
    with pytest.raises(ValueError, match="causal step is another program.*train.seed 0 there, 3"):
        loop.train(other, str(tmp_path / "other"), False, executables=Executables(str(path)))
    assert not list((tmp_path / "other").glob("[a-z]*"))

    # A folder compiles what it has damaged, and mends it.
    before = path.read_bytes()
    path.write_bytes(before[:-9])
    start("mended", Executables(None, str(folder)))
    assert "compiled" in said[-1]
    assert "truncated or damaged" in caplog.text
    assert executable_file.read(str(path))["causal"].key == _key(before)


TOGETHER = """
    import sys
    import jax
    from mtnlg_jax.config import from_json
    from mtnlg_jax.train import loop, processes
    from mtnlg_jax.train.executables import Executables

    me, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    processes.start(f"localhost:{port}", 2, me, 100, local_devices=4)
    config = from_json(open(f"{folder}/config.json").read())
    for name in ("first", "second"):
        kept = Executables(None, f"{folder}/kept")
        loop.train(config, f"{folder}/{name}", False, print, executables=kept)
    processes.exit_now(0)
"""


@pytest.mark.slow
def test_two_processes_keep_a_step_and_load_it(tmp_path, prepared_words, monkeypatch):
    import test_processes

    monkeypatch.setattr(test_processes, "PATIENCE", 400)
    config = dataclasses.replace(CONFIG, data=DataConfig(path=prepared_words(WORDS)))
    # All replicas agree, also those of different processes.
    config = override(config, "train.verify_every=1")
    (tmp_path / "config.json").write_text(to_json(config))
    (code, output), (other, other_output) = test_processes.run_all(TOGETHER, 2, tmp_path)
    assert (code, other) == (0, 0), output + other_output
    (path,) = (tmp_path / "kept").iterdir()
    assert f"kept in {path}" in output
    assert f"loaded from {path}" in output
    assert losses(tmp_path / "second") == losses(tmp_path / "first")


def _key(content: bytes) -> dict:
    start = len(executable_file.MAGIC)
    length = int.from_bytes(content[start + 32 : start + 40], "little")
    header = content[start + 40 : start + 40 + length]
    assert hashlib.sha256(header).digest() == content[start : start + 32]
    return json.loads(header)["programs"][0]["key"]
