"""Start, synchronize and shut down several processes (gloo on localhost).

Whole runs of several processes are tested in tests/launch.
"""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mtnlg_jax import compat, errors
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.train import processes

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
PATIENCE = 120  # seconds that a start may take on a busy machine


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_all(program: str, count: int, *arguments, environment=None) -> list[tuple[int, str]]:
    """Return (exit code, output) of ``count`` processes, given their number and a free port."""
    port = free_port()
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                textwrap.dedent(program),
                str(number),
                str(port),
                *map(str, arguments),
            ],
            env=ENVIRONMENT | (environment(number) if environment else {}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in range(count)
    ]
    try:
        return [(process.wait(PATIENCE), process.stdout.read()) for process in started]
    finally:
        for process in started:
            process.kill()
            process.stdout.close()


TOGETHER = """
    import sys, time
    import numpy as np
    import jax
    from mtnlg_jax.config import MeshConfig
    from mtnlg_jax.parallel.mesh import make_mesh
    from mtnlg_jax.train import processes
    from mtnlg_jax.train.batch import put_batch

    me, port = int(sys.argv[1]), sys.argv[2]
    time.sleep(2 * me)  # the others wait for one that starts late
    processes.start(f"localhost:{port}", 2, me, 10, local_devices=4)
    assert processes.several() and jax.device_count() == 8 and jax.process_index() == me

    asked = []
    def rows_of(numbers):
        asked.extend(numbers.tolist())
        return {name: np.zeros((len(numbers), 16), np.int32)
                for name in ("tokens", "labels", "segment_ids", "positions", "weights")}
    put_batch(rows_of, (3, 8, 16), make_mesh(MeshConfig(data=4, tensor=2)))
    mine = [micro * 8 + row for micro in range(3) for row in range(4 * me, 4 * me + 4)]
    assert sorted(asked) == mine, asked

    vote = processes.PreemptionVote()
    stopping = [vote(me == 1 and step == 3) for step in range(6)]
    assert stopping == [False] * 4 + [True, False], stopping

    assert processes.disagreement({"a": 1, "b": [2]}) is None
    line = processes.disagreement({"a": 1, "b": [2, me]})
    difference = (
        "b=[2, 1] here, [2, 0] in process 0"
        if me
        else "it holds the same as process 0, and they do not"
    )
    assert line == f"process {me} of 2 disagrees with {1 - me}: {difference}", line

    def fails():
        raise ValueError("full")
    try:
        processes.run_on_first(fails)
    except ValueError as error:
        assert str(error) == "full"
    processes.barrier("the end")
    with processes.exit_on_failure():
        if me == 0:
            raise OSError("no such disk")
        time.sleep(60)
"""


def test_two_processes_read_their_rows_agree_and_exit():
    (code, output), (other_code, other_output) = run_all(TOGETHER, 2)
    assert code == 2 and "process 0 of 2: error: no such disk" in output, output
    # The other one ends long before its sleep is over.
    assert other_code == errors.PROCESS_LOST, other_output
    assert "process 1 of 2: another process ended, so this one ends" in other_output


OTHER_DATA = """
    import sys
    from mtnlg_jax import command
    from mtnlg_jax.config import load_config
    from mtnlg_jax.train import loop, processes

    me, port, tiny, data, workdir = int(sys.argv[1]), *sys.argv[2:]
    real = loop.load_data
    def load_data(config):
        made = real(config)
        made.fingerprints["source 0"] += str(me)  # as if this host had another copy of the data
        return made
    loop.load_data = load_data
    def main():
        processes.start(f"localhost:{port}", 2, me, 10, local_devices=1)
        changes = [f"data.path={data}", "train.compare_every=2", "train.eval_every=0"]
        loop.train(load_config(tiny, changes), workdir)
    sys.argv[1:] = []
    command.run(main)
"""


@pytest.mark.slow
def test_processes_with_other_data_report_it_and_exit(tmp_path):
    (tmp_path / "text.txt").write_text(
        "\n\n".join("a bird sat on a stone by the river" for _ in range(300))
    )
    prepare(tmp_path / "text.txt", tmp_path / "data", vocab_size=285, heldout=0.1, progress=False)
    ended = run_all(
        OTHER_DATA, 2, ROOT / "configs" / "tiny.py", tmp_path / "data", tmp_path / "run"
    )
    for me, (code, output) in enumerate(ended):
        assert code == errors.Disagreement.exit_code, output
        assert f"after step 2 process {me} of 2 disagrees with {1 - me}: " in output
    assert "data=[16, '" in ended[1][1]


START = """
    import sys
    from mtnlg_jax import command
    from mtnlg_jax.train import processes
    number, port, count, me, timeout = map(int, sys.argv[1:])
    def main():
        processes.start(f"localhost:{port}", count, me, 10, local_devices=1, timeout=timeout)
    command.run(main)
"""


@pytest.mark.parametrize(
    ("me", "problem"),
    [(1, "no process 0 answers at localhost:"), (0, "not every process connected to process 0")],
)
def test_a_missing_process_is_reported_in_one_line(me, problem):
    program = textwrap.dedent(START).replace("command.run(main)", "main()")
    began = time.monotonic()
    [(code, output)] = run_all(program, 1, 2, me, 2)
    assert code == 2 and output.splitlines()[-1].startswith("error: " + problem), output
    assert output.count("\n") == 1 and time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("localhost:1", 2, None), "--process_id missing"),
        ((None, 2, 0), "--coordinator missing"),
        (("localhost", 2, 0), "is not HOST:PORT"),
        (("localhost:123456", 2, 0), "is not HOST:PORT"),
        (("localhost:1", 2, 2), "--process_id=2 does not exist with --processes=2"),
        (("localhost:1", 0, 0), "does not exist"),
    ],
)
def test_invalid_flags_raise_an_error(flags, message):
    with pytest.raises(ValueError, match=message):
        processes.start(*flags, 10)


def test_on_requires_a_cluster_and_auto_does_not():
    with pytest.raises(ValueError, match="no SLURM"):
        processes.start(None, None, None, 10, distributed="on")
    processes.start(None, None, None, 10)
    assert not processes.several()


def test_slurm_is_detected(monkeypatch):
    assert compat.cluster_processes() == 0
    for name, value in {
        "SLURM_JOB_ID": 7,
        "SLURM_STEP_NODELIST": "node[001-003]",
        "SLURM_NTASKS": 3,
        "SLURM_PROCID": 1,
        "SLURM_LOCALID": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    assert compat.cluster_processes() == 3
