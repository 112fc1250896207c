"""Check what a run logs at its start, and what its folder records."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys

import jax
import pytest

from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import describe
from mtnlg_jax.train.goodput import read_starts
from mtnlg_jax.train.metrics import MetricsLog

CONFIG = Config(
    model=ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        vocab_size=384,
        max_position_embeddings=128,
    ),
    mesh=MeshConfig(data=4, tensor=2),
    data=DataConfig(path="/my data"),
    train=TrainConfig(steps=100, global_batch_size=16, save_every=25),
)


def said(config=CONFIG, workdir="/runs/my run", first=0, samples=0):
    return describe.at_start(config, make_mesh(config.mesh), workdir, first, samples, 409_600)


def changed(**train) -> Config:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **train))


@pytest.mark.parametrize(
    ("config", "first", "samples", "words"),
    [
        (CONFIG, 0, 0, "starts from random parameters (train.seed=0), 100 steps"),
        (changed(init="/a b"), 0, 0, "starts with the parameters of /a b, 100 steps"),
        (changed(init="/a b"), 25, 400, "resumes from its checkpoint of step 25 of 100"),
        (CONFIG, 100, 1600, "is finished: step 100 of 100 is done"),
    ],
)
def test_a_start_describes_the_run(config, first, samples, words):
    text = said(config, first=first, samples=samples)
    assert text.startswith("'/runs/my run' ") and words in text.splitlines()[0]
    for part in (
        f"{CONFIG.model.parameter_count():,} parameters: "
        "2 layers, width 64, 4 heads, vocabulary 384",
        "data 4 x context 1 x tensor 2, zero 1: 8 of 8 ",
        "16 x 128 = 2,048 a step; 204,800 by the end",
        "0.5 times the data's 409,600",
        "'/my data'",
        "checkpoints/ every 25 steps",
    ):
        assert part in text, text
    assert ("preparing" in text) == (first < 100)


def test_a_ramp_and_saves_at_the_end_are_described():
    text = said(changed(rampup_batch_size=(8, 8, 64), micro_batch_size=1, save_every=0))
    assert "2,048 a step (from 8 on)" in text and "checkpoints/ at the end" in text


def test_the_memory_of_a_quantized_base_is_described():
    model = dataclasses.replace(CONFIG.model, hidden_size=256)
    optimizer = OptimizerConfig(lora_rank=4, lora_base="nf4")
    text = said(dataclasses.replace(changed(init="/a b"), model=model, optimizer=optimizer))
    # 2 x 12 x 256 x 256 weights with 4.5 bits over 8 devices; the rest is float32.
    assert "rank 4 of q, v; the nf4 base takes 0.2 MiB a device (float32: 0.8)" in text
    assert "adapt " not in said()


def test_the_folder_records_every_start(tmp_path, monkeypatch):
    command = ["python", "launch/pretrain.py", "--workdir=my run"]
    monkeypatch.setattr(sys, "orig_argv", command)
    describe.write(CONFIG, str(tmp_path), 0)
    describe.write(CONFIG, str(tmp_path), 25)
    (tmp_path / "config.json").write_text(
        "{"
    )  # cut short: the next start writes all settings again
    describe.write(changed(global_batch_size=32, seed=3), str(tmp_path), 50)
    describe.write(changed(global_batch_size=8, seed=3), str(tmp_path), 75)
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 25, 50, 75]
    assert starts[0]["config"]["train"]["global_batch_size"] == 16 and starts[1]["changed"] == {}
    assert starts[2]["config"]["train"]["seed"] == 3
    assert starts[3]["changed"] == {"train.global_batch_size": [32, 8]}
    assert json.loads((tmp_path / "config.json").read_text())["train"]["global_batch_size"] == 8
    found = json.loads((tmp_path / "environment.json").read_text())
    for record in (*starts, found):
        assert shlex.split(record["command"]) == command and record["date"][:2] == "20"
        assert record["folder"] == os.getcwd() and record["versions"]["jax"] == jax.__version__
    names = (tmp_path / "README.txt").read_text()
    for name in (
        "checkpoints/",
        "config.json",
        "data.json",
        "environment.json",
        "starts.jsonl",
        "metrics.jsonl",
        "loss.png",
    ):
        assert name in names
    assert "pip install tensorboard" in names


def test_a_torn_line_takes_no_other_start_with_it(tmp_path):
    path = tmp_path / "starts.jsonl"
    describe.write(CONFIG, str(tmp_path), 0)
    before = (tmp_path / "config.json").read_bytes()
    describe.write(changed(seed=3), str(tmp_path), 25)
    # Killed while it appended its line, before it replaced config.json.
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "config.json").write_bytes(before)
    describe.write(changed(seed=3), str(tmp_path), 25)
    assert len(path.read_bytes().splitlines()) == 3 and path.read_bytes().endswith(b"}\n")
    first, second = read_starts(str(tmp_path))
    assert first["step"] == 0 and second["changed"] == {"train.seed": [0, 3]}


def test_a_start_records_its_devices_and_how_far_the_one_before_came(tmp_path):
    describe.write(CONFIG, str(tmp_path), 0)
    log = MetricsLog(str(tmp_path), 0)
    for step in (26, 27):
        log.write({"kind": "train", "step": step, "loss": 2.0})
    log.close()
    describe.write(CONFIG, str(tmp_path), 25)
    first, second = map(json.loads, (tmp_path / "starts.jsonl").read_text().splitlines())
    assert "reached" not in first
    assert second["reached"] == {"step": 27, "time": log.records[-1]["time"]}
    for start in (first, second):
        assert start["devices"]["count"] == jax.device_count() and start["processes"] == 1
    # Of data that are not there only the path is known.
    assert json.loads((tmp_path / "data.json").read_text()) == {"sources": [{"path": "/my data"}]}
    # A run of an earlier version has records without times.
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 3}\n')
    describe.write(CONFIG, str(tmp_path), 0)
    last = (tmp_path / "starts.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["reached"] == {"step": 3, "time": None}


def test_the_commit_of_a_checkout_is_recorded(tmp_path, monkeypatch):
    package = tmp_path / "mtnlg_jax/train"
    package.mkdir(parents=True)
    monkeypatch.setattr(describe, "__file__", str(package / "describe.py"))
    assert describe.commit() is None  # an installed package without a checkout
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert describe.commit() == head
    (tmp_path / "file").write_text("2")
    assert describe.commit() == f"{head}-dirty"
