"""launch/prove.py: its errors, and a certificate from a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from mtnlg_jax.config import load_config, to_json

ROOT = Path(__file__).resolve().parents[2]
TINY = f"--config={ROOT / 'configs/tiny.py'}"


def config_of(proving, *given):
    """Return the config that the command would prove with these flags."""
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["prove", *given])
        proving.check_flags()
        return proving.given_config()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "--config is missing; name a file"),
        ((TINY, "--devices=65"), "--devices=65 is outside 1 to 64"),
        ((TINY, "--devices=2", "--set=mesh.tensor=2"), "--devices=2 is too few to show data x ten"),
        ((TINY, "--set=mesh.data=1"), "the mesh of this config is one device, so there is noth"),
        ((TINY, "--set=mesh.pipe=2"), "mesh.pipe=2 needs train.micro_batch_size"),
        (("--workdir=/nowhere",), "--workdir=/nowhere is not a run"),
        ((TINY, "--workdir=a"), "tiny.py and --workdir=a both name the config"),
        (
            ("--workdir=a", "--set=mesh.zero=3"),
            "--set=mesh.zero=3 is not the config of --workdir=a",
        ),
        ((TINY, "--output=/nowhere/a.json"), "is in a folder that does not exist"),
        (("--config=nowhere.py",), "'nowhere.py' is not a file"),
    ],
)
def test_bad_input_is_told_before_any_work(proving, given, words):
    with pytest.raises((ValueError, OSError), match=words):
        config_of(proving, *given)


def test_a_run_is_proved_with_its_own_config(proving, tmp_path):
    config = load_config(str(ROOT / "configs/tiny.py"), ["mesh.tensor=2", "model.vocab_size=512"])
    (tmp_path / "config.json").write_text(to_json(config))
    assert config_of(proving, f"--workdir={tmp_path}") == config
    given = (f"--workdir={tmp_path}", f"--output={tmp_path / 'other.json'}")
    changed = config_of(proving, *given, "--set=model.vocab_size=513")
    assert changed.model.vocab_size == 513 and changed.model.vocabulary % 2 == 0


@pytest.mark.slow  # tests/certify has the same in the process of the tests
def test_a_process_of_its_own_writes_the_certificate_into_the_run(tmp_path):
    config = load_config(str(ROOT / "configs/tiny.py"), ["mesh.tensor=2", "model.vocab_size=512"])
    (tmp_path / "config.json").write_text(to_json(config))
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, ROOT / "launch/prove.py", f"--workdir={tmp_path}", "--devices=4"],
        capture_output=True,
        text=True,
        env=kept | {"PYTHONPATH": os.fspath(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "certificate.json").read_text())
    assert told["kind"] == "certificate" and told["within"] and told["devices"] == 4
    assert "WITHIN all tolerances" in done.stdout and "... " in done.stderr
