"""Load, resume and decode a run of an earlier version (0.2.0, commit c8626de).

fixtures/old_run.tar.xz holds its data, its config and its checkpoint of step 4 of 6. The expected
values were printed by that version.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.decode.rank import rank

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parent / "fixtures/old_run.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_an_old_run_decodes_the_same(old):
    run, decoder = load_decoder(old / "run", "last")
    assert run.step == 4
    settings = DecodeConfig(max_new_tokens=6)
    found = generate(decoder, run.tokenizer, ["old", "a sh"], settings)
    assert [row.tokens for row in found] == [(270, 270, 211, 16, 45, 45), (9, 9, 45, 45, 45, 45)]
    np.testing.assert_allclose(
        found[1].logprobs,
        (-5.5915646, -5.5834269, -5.5532885, -5.5533046, -5.5608983, -5.5800881),
        rtol=1e-5,
    )
    ranking = rank(decoder, run.tokenizer, "old", [" sat by", " sea", "z"])
    scores = {candidate.text: candidate.sum for candidate in ranking.candidates}
    expected = {" sea": -16.8892145, " sat by": -34.1394835, "z": -5.6991273}
    assert scores == pytest.approx(expected, rel=1e-5)


def test_an_old_run_resumes_with_the_same_losses(old, tmp_path):
    shutil.copytree(old, tmp_path, dirs_exist_ok=True)
    command = [sys.executable, ROOT / "launch/pretrain.py", "--config=tiny.py", "--workdir=run"]
    # One device, as the run had; the flags of the tests create eight.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert [losses[5], losses[6]] == pytest.approx([5.6684112548, 5.6720409393], rel=1e-5)
    held_out = [row for row in rows if row["kind"] == "eval"][-1]
    assert held_out["step"] == 6
    assert held_out["causal_loss"] == pytest.approx(5.6663913866, rel=1e-5)
