"""benchmarks/kills.py: a run that is hurt at random ends like one that was left alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # minutes; tests/train/near has the parts
def test_a_run_that_is_hurt_at_random_ends_like_one_left_alone(tmp_path):
    output = tmp_path / "kills.json"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks/kills.py"),
            "--faults=3",
            "--seed=1",
            "--kinds",
            "SIGKILL",
            "truncated",
            "lost host",
            f"--output={output}",
        ],
        text=True,
        capture_output=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["records_equal"] and found["within_interval"], found
    assert len(found["faults"]) == 3 and sum(found["number"].values()) == 3
