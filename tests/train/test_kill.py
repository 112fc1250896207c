"""Kill launch/pretrain.py repeatedly; its run ends with the numbers of an uninterrupted one."""

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
MEASURED = {"tokens_per_second", "mfu", "time"}  # measured times, which differ between runs
PATIENCE = 180  # seconds that a start may take on a busy machine


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return start(name) -> (process, workdir, when metrics.jsonl was last written).

    The small run uses every kind of randomness (the mix of objectives, masking, dropout) and saves
    so often that saves nearly overlap.
    """
    folder = tmp_path_factory.mktemp("kill")
    words = random.Random(0)
    texts = [
        " ".join(words.choices("sun moon tree river stone bird wind road".split(), k=60))
        for _ in range(150)
    ]
    (folder / "text.txt").write_text("\n\n".join(texts))
    prepare(folder / "text.txt", folder / "data", vocab_size=280, heldout=0.1)
    settings = {
        "data.path": folder / "data",
        "model.dropout_rate": 0.1,
        "train.steps": STEPS,
        "train.save_every": 2,
        "train.eval_every": 10,
        "train.stages": [{"name": "mix", "masked": 0.5}, {"name": "causal"}],
    }
    command = [
        sys.executable,
        ROOT / "launch" / "pretrain.py",
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        "--noprogress",
        *(f"--set={key}={value}" for key, value in settings.items()),
    ]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # halves the compile time of this test
    }

    def start(name: str) -> tuple[subprocess.Popen, Path, int]:
        before = changed(folder / name)
        process = subprocess.Popen(
            [*command, f"--workdir={folder / name}"],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return process, folder / name, before

    return start


@pytest.fixture(scope="module")
def unkilled(start) -> Path:
    process, workdir, _ = start("unkilled")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert len(numbers(workdir)) == STEPS + STEPS // 10  # each step, and the evaluations
    return workdir


def numbers(workdir: Path) -> list[dict]:
    """Return the records of metrics.jsonl in order, without times."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in record.items() if key not in MEASURED}
        for record in records
        if record["kind"] != "goodput"
    ]


def changed(workdir: Path) -> int:
    """Return when metrics.jsonl was last written; a resumed run writes it as it enters the loop."""
    path = workdir / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def step_reached(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int, before: int) -> None:
    """Wait until ``process`` itself has written, and ``step`` is done."""
    deadline = time.monotonic() + PATIENCE
    while changed(workdir) == before or step_reached(workdir) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"step {step} was not reached in {PATIENCE} s"
        time.sleep(0.002)


@pytest.mark.slow  # test_checkpoint.py kills processes in the middle of saves
@pytest.mark.parametrize("kills", [2, 20])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(start, unkilled, kills):
    name = f"killed-{kills}"
    moments = random.Random(kills)
    for number, target in enumerate(sorted(moments.randrange(1, STEPS - 10) for _ in range(kills))):
        process, workdir, before = start(name)
        if number % 5 == 4:  # some kills come between the imports and the first step
            time.sleep(moments.uniform(0, 6))
        else:
            wait_for_step(process, workdir, target, before)
            time.sleep(moments.uniform(0, 0.2))
        process.kill()
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output

    process, workdir, before = start(name)
    wait_for_step(process, workdir, STEPS - 10, before)
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, output
    assert "the same command resumes from there" in output and "Traceback" not in output
    stopped = step_reached(workdir)
    assert (
        STEPS - 10 <= stopped < STEPS
        and (workdir / "checkpoints" / str(stopped) / "record.json").exists()
    )

    process, workdir, _ = start(name)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert numbers(workdir) == numbers(unkilled)
    ours = load_run(workdir, "last")
    theirs = load_run(unkilled, "last")
    assert ours.step == theirs.step == STEPS
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)
