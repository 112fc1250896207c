"""Check benchmarks/card.py: every part runs without optional packages, and an interrupted run is
kept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A key of the first row of each part.
PARTS = {
    "parity": "errors",
    "calibration": "what",
    "attention": "xla_blockwise",
    "train": "tflops",
    "decode": "of_copy",
}
LACKING = (
    "tensorboardX",
    "zstandard",
    "ftfy",
    "trafilatura",
    "rouge_score",
    "bm25s",
    "warcio",
    "py3langid",
    "fsspec",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return an environment with one device and none of the packages in LACKING."""
    folder = tmp_path_factory.mktemp("lacking")
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Lacking:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {LACKING}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Lacking())\n"
    )
    quick = "--xla_backend_optimization_level=0"  # halves the compile time of this test
    return os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick}


def _command(*more):
    return [sys.executable, str(ROOT / "benchmarks/card.py"), "--small", *more]


def test_every_part_runs_on_a_cpu(environment, tmp_path):
    output = tmp_path / "card.json"
    done = subprocess.run(
        _command("--seconds=600", f"--output={output}"),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert list(result["parts"]) == list(PARTS) and result["device"] == "cpu"
    for part, key in PARTS.items():
        found = result["parts"][part]
        assert found["ended"] == "done" and key in found["rows"][0], (part, found)
        assert not [row for row in found["rows"] if row.get("failure")]
    for part in ("train", "decode"):
        # A CPU is none of the cards, so the figures of one stand in.
        ours = result["parts"][part]["rows"][0]
        assert ours["predicted_for"] == "H100" and ours["predicted_over_measured"] > 0
    peers = [row for row in result["parts"]["train"]["rows"] if row["side"] == "torch"]
    assert len(peers) == 1 and ("tflops" in peers[0] or "torch" in peers[0]["left_out"])


def test_an_interrupted_run_keeps_its_rows(environment, tmp_path):
    output = tmp_path / "card.json"
    command = _command("--parts", "calibration", "train", f"--output={output}")
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in child.stdout:
        if line.startswith("calibration"):
            break
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    rows = json.loads(output.read_text())["parts"]["calibration"]["rows"]
    assert rows[0]["tflops"] > 0


def test_a_part_that_takes_too_long_is_stopped(environment, tmp_path):
    output = tmp_path / "card.json"
    begin = time.monotonic()
    command = _command("--parts", "decode", "--seconds=1.5", f"--output={output}")
    subprocess.run(command, env=environment, capture_output=True, text=True)
    assert time.monotonic() - begin < 60
    if output.exists():  # the device was reported in time
        # The rest of the 1.5 seconds when the part began.
        ended = json.loads(output.read_text())["parts"]["decode"]["ended"]
        assert ended in ("stopped after 1 s", "stopped after 2 s")


def test_without_a_gpu_it_exits_with_an_error(environment):
    command = [sys.executable, str(ROOT / "benchmarks/card.py"), "--parts", "calibration"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no GPU here (JAX sees cpu); --small" in done.stderr
