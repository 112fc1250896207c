"""Record steps of all processes at a signal to their launcher, which does not stop them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240  # seconds, on a busy machine


@pytest.mark.slow
def test_the_launcher_passes_the_signal_on_and_the_run_goes_on(tmp_path):
    text = "\n\n".join("a bird sat on a stone by the river" for _ in range(300))
    (tmp_path / "text.txt").write_text(text)
    prepare(tmp_path / "text.txt", tmp_path / "data", vocab_size=285, heldout=0.1, progress=False)
    run = tmp_path / "run"
    settings = {
        "data.path": tmp_path / "data",
        "train.steps": 400,
        "train.eval_every": 0,
        "train.save_every": 0,
        "train.profile_signal": "SIGUSR1",
        "train.profile_signal_steps": 2,
    }
    launcher = subprocess.Popen(
        [
            sys.executable,
            ROOT / "launch/cluster/launch.py",
            *("--cluster=local", "--nodes=2", "--local_devices=1", f"--workdir={run}"),
            f"--config={ROOT / 'configs/tiny.py'}",
            *(f"--set={key}={value}" for key, value in settings.items()),
        ],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not read_metrics(str(run / "metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.2)
        launcher.send_signal(signal.SIGUSR1)
        output, _ = launcher.communicate(timeout=PATIENCE)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, output
    folders = sorted(path.name for path in (run / "profile").iterdir())
    assert [name.rpartition("_")[2] for name in folders] == ["0", "1"], folders
    assert all(list((run / "profile" / name).rglob("*.xplane.pb")) for name in folders)
    trained = [each for each in read_metrics(str(run / "metrics.jsonl")) if each["kind"] == "train"]
    assert trained[-1]["step"] == 400
