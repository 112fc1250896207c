"""Run compile_ahead from end to end on virtual CPU devices, and on TPU and GPU compilers if
installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from mtnlg_jax import xla_flags
from mtnlg_jax.config import load_config
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.planning import aot
from mtnlg_jax.planning.aot import Measurement, measure
from mtnlg_jax.planning.topology import check_installed, parse
from mtnlg_jax.train import executable_file
from mtnlg_jax.train.batch import abstract_batch
from mtnlg_jax.train.executables import loaded
from mtnlg_jax.train.program_key import differences, key_of, program_options
from mtnlg_jax.train.state import abstract_state

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--config=configs/tiny.py", "--set=model.vocab_size=512", "--set=mesh.tensor=2"]


def config(*changes):
    return load_config(str(ROOT / "configs/tiny.py"), ["model.vocab_size=512", *changes])


def run(*flags, code=0):
    done = subprocess.run(
        [sys.executable, "launch/compile_ahead.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code < 2 else done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Measure the smallest config over data 4 x tensor 2; return the folder of its report, its
    program and the kept step."""
    folder = tmp_path_factory.mktemp("ahead")
    files = [f"--json={folder}/m.json", f"--hlo={folder}/program.txt", f"--save={folder}/kept"]
    said = run(*TINY, "--topology=cpu:8", *files)
    (folder / "report.txt").write_text(said)
    return folder


def test_a_saved_step_has_the_key_of_a_run_over_these_devices(folder):
    path = folder / "kept"
    assert f"saved        {path}: causal step " in (folder / "report.txt").read_text()
    program = executable_file.read(str(path))["causal"]
    assert set(program.outputs[0]) >= {"loss", "grad_norm"}
    ours = config("mesh.tensor=2")
    mesh = make_mesh(ours.mesh)
    here = key_of(ours, mesh) | program_options(ours, causal=True)
    # The flags of this process are those of the suite.
    different = differences(program.key, here)
    assert [line for line in different if not line.startswith("flag ")] == []
    args = (abstract_state(ours, mesh), abstract_batch(ours, mesh), 1, 1, 1.0)
    assert loaded(program, args, list(mesh.devices.flat)).in_tree == jax.tree.structure((args, {}))


def test_the_train_step_is_measured(folder):
    m = json.loads((folder / "m.json").read_text())
    assert (
        m["mesh"] == {"pipe": 1, "data": 4, "expert": 1, "context": 1, "tensor": 2}
        and not m["failure"]
    )
    found = {(c["kind"], tuple(c["axes"]), c["depth"]): c["count"] for c in m["collectives"]}
    # ZeRO gathers once a step: no collective over data is in a loop, and each of the 16 kinds of
    # weights split along D (6 matrices, 6 vectors a block; embeddings, the final norm's two) is
    # gathered and scattered once.
    assert not [key for key in found if "data" in key[1] and key[2]]
    assert found["all-gather", ("data",), 0] == found["reduce-scatter", ("data",), 0] == 16
    # 2 layers: a gather before each half block and a scatter after it, forward and backward; the
    # backward pass gathers again, because the results are not kept.
    assert (
        found["all-gather", ("tensor",), 1] == 2 * 6
        and found["reduce-scatter", ("tensor",), 1] == 2 * 4
    )
    layers = 2
    rows = 2
    length = 64
    width = 64
    vocabulary = 512
    block = (
        24 * length * width**2 + 4 * length**2 * width
    )  # forward, of a row: 24 s h^2 (1 + s / 6 h)
    once = rows * (layers * block + 2 * length * width * vocabulary)
    assert m["flops"] == 3 * once / 2  # two devices share a row


def test_the_report_has_all_sections(folder):
    said = (folder / "report.txt").read_text()
    for word in (
        "tiny: train step on cpu:8",
        "layout",
        "verdict",
        "padding",
        "products",
        "collectives",
        "took",
    ):
        assert word in said
    assert "ENTRY" in (folder / "program.txt").read_text()


@pytest.mark.slow  # test_report.py has each of its parts
def test_a_config_that_does_not_fit_gets_a_measured_suggestion():
    said = run(
        *TINY,
        "--topology=cpu:8",
        "--memory=0.0125",
        "--set=train.global_batch_size=128",
        "--set=train.micro_batch_size=32",
        "--prove=1",
        code=1,
    )
    assert "verdict      DOES NOT FIT: 1" in said and "\nby sums      " in said
    assert "\nway out      --set=train.micro_batch_size=16: compiled, FITS with a peak of " in said


@pytest.mark.parametrize("step", [pytest.param("prefill", marks=pytest.mark.slow), "decode"])
def test_decoding_steps_are_measured(step):
    m = measure(config("mesh.tensor=2"), parse("cpu:8"), step)
    assert not m.failure and m.flops > 0
    # Weights, and a cache of 64 positions for one row: float32, tensor 2; matrices and the
    # embeddings dominate.
    weights = 4 * (2 * 12 * 64**2 + 512 * 64) // 2 + 4 * 64 * 64
    assert weights < m.arguments < 1.5 * weights


def test_a_config_that_cannot_be_compiled_exits_with_one_line():
    said = run("--config=configs/tiny.py", "--topology=cpu:8", code=2)
    assert said.count("\n") == 1 and "--set=model.vocab_size=51200" in said
    # Errors found only in the compiler's process are also raised.
    with pytest.raises(
        ValueError,
        match="mesh pipe=1 x data=8 x expert=1 x context=1 x tensor=2 does not fit 8 devices",
    ):
        measure(config("mesh.data=8", "mesh.tensor=2"), parse("cpu:8"))


def test_a_compiler_that_aborts_is_reported(monkeypatch):
    def dies(command, input, env, **_):
        started = Measurement(
            "cpu:8", 8, {"data": 8}, "train", 1, "jaxlib", None, failure="unfinished"
        )
        Path(json.loads(input)["answer"]).write_text(aot.to_text(started))
        return SimpleNamespace(
            returncode=-6, stderr="W chatter\nF0101 thunk.cc:59 Check failed: 1 vs 2\nat 0x1\n"
        )

    monkeypatch.setattr(subprocess, "run", dies)
    m = measure(config(), parse("cpu:8"))
    assert m.failure == "the compiler ended with SIGABRT: F0101 thunk.cc:59 Check failed: 1 vs 2"
    assert m.fits is None


@pytest.mark.parametrize(
    ("topology", "variable", "step", "on", "kind"),
    [
        ("v5p:4x4x4*2", "LIBTPU_INIT_ARGS", "train", True, "v5p"),
        ("v5e:4x4", "LIBTPU_INIT_ARGS", "train", True, "v5e"),
        ("H100:2x8", "XLA_FLAGS", "train", True, "gpu"),
        ("v5p:4x4x4", "LIBTPU_INIT_ARGS", "train", False, None),
        ("v6e:4x4", "LIBTPU_INIT_ARGS", "prefill", True, None),
        ("v6e:4x4", "LIBTPU_INIT_ARGS", "decode", True, None),
    ],
)
def test_a_step_is_compiled_with_the_flags_of_its_run(
    topology, variable, step, on, kind, monkeypatch
):
    asked = []
    compiled = []

    def chosen(*given):
        asked.append(given)
        return xla_flags.Choice(("--xla_ours=1",), "one is refused")

    def runs(command, input, env, **_):
        request = json.loads(input)
        compiled.append(env[variable])
        told = Measurement(topology, 8, {"data": 8}, step, 1, "libtpu", None)
        told.flags = request["flags"]
        told.flags_left_out = request["flags_left_out"]
        Path(request["answer"]).write_text(aot.to_text(told))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(aot.described, "check_installed", lambda topology: None)
    monkeypatch.setattr(xla_flags, "choose", chosen)
    monkeypatch.setattr(subprocess, "run", runs)
    monkeypatch.setenv(variable, "--xla_mine=2")
    m = measure(config(), parse(topology), step, flags=on)
    recompute = config().train.recompute
    assert asked == ([(kind, config().mesh, parse(topology).slices, recompute)] if kind else [])
    assert m.flags == compiled[0].split() == ["--xla_mine=2", *(["--xla_ours=1"] if kind else [])]
    assert m.flags_left_out == ("one is refused" if kind else "")


@pytest.mark.parametrize(
    ("said", "believed"),
    [
        (0.05, 0.05),
        (None, None),
        (-20.6, None),
        (0.0, None),
        (float("inf"), None),
        (float("nan"), None),
        (2**63 / 1.75e9, None),
    ],
)
def test_an_invalid_estimate_is_none(said, believed):
    assert aot._believable(said) == believed


def test_a_process_that_does_not_start_raises_an_error(monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="ImportError: x\n")
    )
    with pytest.raises(
        ValueError, match="did not begin: the compiler ended with exit code 1: ImportError: x"
    ):
        measure(config(), parse("cpu:8"))


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (
            "the total memory required for HLO temporaries (45.71G) exceeds available HBM (15.75G)",
            int(45.71 * 2**30),
        ),
        ("Ran out of memory in memory space hbm. Used 100.5M of 15.75G hbm.", int(100.5 * 2**20)),
        ("INTERNAL: something else", None),
    ],
)
def test_the_memory_needed_is_read_from_the_error(words, needed):
    assert aot._needed(words) == needed


def test_an_unusable_description_raises_an_error(monkeypatch):
    monkeypatch.setattr(aot.described, "check_installed", lambda topology: None)
    with pytest.raises(FileNotFoundError, match="--target_config=nowhere is not a file"):
        measure(config(), parse("H100:1x8"), target_config="nowhere")
    with pytest.raises(ValueError, match="--target_config=x describes a GPU, and cpu:8 has none"):
        measure(config(), parse("cpu:8"), target_config="x")


@pytest.mark.slow
def test_only_a_train_step_is_saved(tmp_path):
    flags = ["--step=decode", f"--save={tmp_path / 'x'}"]
    assert "is for the train step" in run(*TINY, "--topology=cpu:8", *flags, code=2)


def test_a_missing_folder_raises_before_any_work():
    assert "is in a folder that does not exist" in run(
        *TINY, "--topology=cpu:8", "--json=nowhere/m.json", code=2
    )


# --- the real compilers


def missing(topology):
    try:
        check_installed(parse(topology))
    except ValueError as error:
        return str(error)
    return ""


needs_libtpu = pytest.mark.skipif(bool(missing("v5e:2x2")), reason=missing("v5e:2x2"))
needs_cuda = pytest.mark.skipif(bool(missing("H100:1x8")), reason=missing("H100:1x8"))


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_program():
    m = measure(config(), parse("v5e:2x2"))
    assert m.fits and m.flops > 0 and m.limit == int(15.75 * 2**30)
    assert m.arguments > m.arguments_exact and m.padded  # heads of width 16 do not fill a tile
    with pytest.raises(ValueError, match=r"topology v5p:3x3x3: the compiler refuses it: .*2x2x1"):
        measure(config(), parse("v5p:3x3x3"))


@pytest.mark.slow
@needs_libtpu
def test_530b_on_a_v5p_pod_compiles_in_minutes_and_4_gb():
    big = load_config(
        str(ROOT / "configs/mtnlg_530b.py"),
        ["mesh.pipe=1", "mesh.data=128", "mesh.zero=3", "train.rampup_batch_size=none"],
    )
    m = measure(big, parse("v5p:8x8x16"))
    assert m.fits and m.peak < 0.5 * m.limit and m.flags and not m.flags_left_out
    assert m.compile_seconds < 300 and m.resident < 4e9


@pytest.mark.slow
@needs_cuda
def test_a_gpu_program():
    m = measure(config(), parse("H100:1x8"))
    assert m.fits and m.flops > 0 and m.limit == 84942979072
