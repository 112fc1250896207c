"""A run of launch/pretrain.py that is killed again and again ends with the numbers of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.train.checkpoint import load_run

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
MEASURED = {"tokens_per_second", "mfu"}  # of the clock, not of the run
PATIENCE = 120  # seconds, for a start on a busy machine


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Starts a small run with all that is random in it (masking, a mix of objectives, dropout) in a folder."""
    folder = tmp_path_factory.mktemp("kill")
    words = random.Random(0)
    text = "\n\n".join(" ".join(words.choices("sun moon tree river stone bird wind road".split(), k=60)) + "."
                       for _ in range(150))
    (folder / "text.txt").write_text(text)
    prepare(folder / "text.txt", folder / "data", vocab_size=280, heldout=0.1)
    settings = {"data.path": folder / "data", "train.steps": STEPS, "train.save_every": 2, "train.eval_every": 4,
                "model.dropout_rate": 0.1, "train.stages": [{"name": "mix", "masked": 0.5}, {"name": "causal"}]}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT),
                                "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, ROOT / "launch/pretrain.py", f"--config={ROOT}/configs/tiny.py", "--noprogress",
               *(f"--set={key}={value}" for key, value in settings.items())]

    def start(name: str) -> tuple[subprocess.Popen, Path]:
        workdir = folder / name
        process = subprocess.Popen([*command, f"--workdir={workdir}"], env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return process, workdir

    return start


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def unkilled(runs) -> Path:
    process, workdir = runs("unkilled")
    finish(process)
    assert len(numbers(workdir)) == STEPS + STEPS // 4 + 1  # each step, and the evaluations
    return workdir


def numbers(workdir: Path) -> list[dict]:
    """What metrics.jsonl says, in its order, without what the clock says."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def step_reached(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while step_reached(workdir) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"step {step} was not reached in {PATIENCE} s"
        time.sleep(0.002)


def assert_same_run(workdir: Path, unkilled: Path) -> None:
    assert numbers(workdir) == numbers(unkilled)
    ours, theirs = load_run(workdir, "last"), load_run(unkilled, "last")
    assert ours.step == theirs.step == STEPS
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(runs, unkilled, kills):
    moments = random.Random(kills)
    name = f"killed-{kills}"
    # Every fifth kill comes at the start, between imports and the first step.
    targets = sorted(moments.randrange(1, STEPS - 1) for _ in range(kills))
    for number, target in enumerate(targets):
        process, workdir = runs(name)
        if number % 5 == 4:
            time.sleep(moments.uniform(0, 6))
        else:
            wait_for_step(process, workdir, target)
            time.sleep(moments.uniform(0, 0.2))
        process.kill()
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output
    process, workdir = runs(name)
    finish(process)
    assert_same_run(workdir, unkilled)


def test_sigterm_saves_and_says_so(runs, unkilled):
    process, workdir = runs("terminated")
    wait_for_step(process, workdir, 5)
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, output
    assert "the same command goes on from there" in output and "Traceback" not in output
    last = step_reached(workdir)
    assert 5 <= last < STEPS and (workdir / "checkpoints" / str(last) / "record.json").exists()
    process, workdir = runs("terminated")
    finish(process)
    assert_same_run(workdir, unkilled)
