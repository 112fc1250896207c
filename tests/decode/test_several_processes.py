"""Generate, evaluate and do tasks in several processes over gloo: one speaks, and none hangs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import save_run

from mtnlg_jax import errors
from mtnlg_jax.config import Config, ModelConfig
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.model.transformer import abstract_model

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds, for a start on a busy machine
HEARTBEAT = 8
TEXT = "the whale swam north again and the captain slept"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run with random weights, a long context, and a text to score."""
    folder = tmp_path_factory.mktemp("decoding")
    tokenizer = train_tokenizer([f"{TEXT}\n"] * 9, 300)
    model = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=tokenizer.vocab_size + tokenizer.vocab_size % 2,
        max_position_embeddings=8192,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_model(model)[1]
    )
    (folder / "text.txt").write_text(f"{TEXT}\n" * 8)
    rows = [{"input": TEXT, "choices": [" whale", " captain"], "reference": " whale"}] * 3
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return save_run(folder, Config(model=model), params, tokenizer)


@pytest.fixture(scope="module")
def environment(run):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }


def ways(run) -> dict[str, list[str]]:
    sampled = [
        "--prompt=the whale",
        "--max_new_tokens=24",
        "--n=3",
        "--temperature=0.9",
        "--seed=5",
    ]
    return {
        "generate": [*sampled, "--json"],
        "evaluate": [f"--input={run / 'text.txt'}", "--json"],
        "task": ["--task=answer", f"--eval={run / 'rows.jsonl'}", "--json"],
    }


def same(one, other) -> None:
    if isinstance(one, dict):
        # Where the answers were written, and how long it took, differ.
        assert one.keys() == other.keys()
        for key in one.keys() - {"output", "seconds"}:
            same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            same(*pair)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    else:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("script", ["generate", "evaluate", "task"])
def test_several_processes_print_what_one_prints(run, environment, script, processes, devices):
    arguments = ways(run)[script]
    alone = subprocess.run(
        [sys.executable, ROOT / "launch" / f"{script}.py", f"--workdir={run}", *arguments],
        env=environment,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert alone.returncode == 0, alone.stderr
    together = subprocess.run(
        [
            *(sys.executable, ROOT / "launch/cluster/launch.py", "--cluster=local"),
            *(f"--nodes={processes}", f"--local_devices={devices}", f"--script={script}"),
            *(f"--workdir={run}", "--set=mesh.data=2", "--set=mesh.tensor=2"),
            *(f"--argument={argument}" for argument in arguments),
        ],
        env=environment,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert together.returncode == 0, together.stdout + together.stderr
    lines = together.stdout.splitlines()
    assert all(line.startswith("0: ") for line in lines), "process 0 alone speaks"
    [line] = [line.removeprefix("0: ") for line in lines if line.startswith("0: {")]
    same(json.loads(line), json.loads(alone.stdout.splitlines()[-1]))


def start(run, environment, *flags) -> list[subprocess.Popen]:
    """Start two processes that write a long text together, and wait until it begins."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [
                *(sys.executable, ROOT / "launch/generate.py", f"--workdir={run}"),
                *("--prompt=the whale", "--max_new_tokens=8000", "--min_new_tokens=8000"),
                *("--stream", "--set=mesh.tensor=2", "--local_devices=1"),
                *(f"--coordinator=localhost:{port}", "--processes=2", f"--process_id={me}"),
                *(f"--heartbeat_seconds={HEARTBEAT}", *flags),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for me in (0, 1)
    ]
    # The prompt is shown at once, and more only once both write.
    seen = b""
    while len(seen) < 200:
        more = os.read(started[0].stdout.fileno(), 4096)
        if not more:
            raise AssertionError([process.communicate()[1] for process in started])
        seen += more
    return started


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_the_others_end_with_a_word_when_a_process_is_lost(run, environment, lost, how):
    started = start(run, environment)
    try:
        began = time.monotonic()
        started[lost].send_signal(getattr(signal, how))
        left = started[1 - lost]
        _, err = left.communicate(timeout=4 * HEARTBEAT + 10)
        seconds = time.monotonic() - began
        lines = err.decode().splitlines()
        # JAX looks at heartbeats at intervals.
        assert seconds < 3 * HEARTBEAT + 6, seconds
        assert not any(re.search("Traceback|Fatal Python|Check failed", line) for line in lines)
        if (how, lost) == ("SIGSTOP", 1) and left.returncode == -signal.SIGABRT:
            # JAX may tell first of a process that is stopped but not dead.
            assert "heartbeat" in err.decode(), lines
            return
        assert left.returncode == errors.PROCESS_LOST, err.decode()
        stopped = (how, lost) == ("SIGSTOP", 0)
        what = "process 0 does not answer" if stopped else "another process ended"
        said = [line for line in lines if f"{what}, so this one ends" in line]
        assert len(said) == 1 and f"process {1 - lost} of 2: " in said[0], lines
        assert "start all of them again" in said[0]
    finally:
        for process in started:
            process.kill()
            process.communicate()
