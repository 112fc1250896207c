"""A run that ends without a checkpoint goes on from its near copy, bit for bit."""

import dataclasses
import json
import os
import time

import pytest

from mtnlg_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from mtnlg_jax.errors import Diverged
from mtnlg_jax.train import goodput, loop
from mtnlg_jax.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("compiled_once")
MEASURED = {"tokens_per_second", "mfu", "time"}
WORDS = "the whale swam north while the old captain slept on deck".split()


@pytest.fixture(scope="module")
def prepared(prepared_words):
    return prepared_words(WORDS, lines=100)


def config_of(prepared, near_every: int, folder="") -> Config:
    return Config(
        model=ModelConfig(
            num_layers=1, hidden_size=16, num_attention_heads=2, max_position_embeddings=16
        ),
        mesh=MeshConfig(data=8),
        data=DataConfig(path=prepared),
        train=TrainConfig(
            steps=7,
            global_batch_size=8,
            compute_dtype="float32",
            eval_every=0,
            eval_batches=1,
            save_every=0,
            near_every=near_every,
            near_folder=str(folder),
        ),
    )


def records(workdir) -> list[dict]:
    found = read_metrics(str(workdir / "metrics.jsonl"))
    return [
        {key: x for key, x in each.items() if key not in MEASURED}
        for each in found
        if each["kind"] != goodput.KIND
    ]


def test_a_lost_run_goes_on_from_its_near_copy(prepared, tmp_path, monkeypatch):
    config = config_of(prepared, 3, tmp_path / "host")
    real = loop.batch_at

    def failing(config, mesh, data, step, samples):
        if step == 5:
            # These steps take milliseconds, and a copy is left out while the last one is written.
            deadline = time.monotonic() + 60
            while not list((tmp_path / "host").rglob("3-*/0.own.json")):
                assert time.monotonic() < deadline
            time.sleep(0.2)
        if step == 6:
            raise RuntimeError("the machine is gone")
        return real(config, mesh, data, step, samples)

    monkeypatch.setattr(loop, "batch_at", failing)
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="the machine is gone"):
        loop.train(config, str(run), show_progress=False)
    assert not list((run / "checkpoints").glob("[0-9]*"))
    before = records(run)
    assert [record["step"] for record in before] == [1, 2, 3, 4, 5, 6]
    # Of the copy of step 6 a piece is lost with the machine, so steps 4 to 6 are done again.
    [newest] = (tmp_path / "host").rglob("6-*/0.own.data")
    os.truncate(newest, 10)

    def repaired(config, mesh, data, step, samples):
        # What is left of the old copy may be the only one, so the second start makes another.
        deadline = time.monotonic() + 20
        while step == 3 and len(list((tmp_path / "host").rglob("3-*/0.own.json"))) < 2:
            assert time.monotonic() < deadline
        return real(config, mesh, data, step, samples)

    monkeypatch.setattr(loop, "batch_at", repaired)
    told = []
    loop.train(config, str(run), show_progress=False, announce=told.append)
    assert "resumes from its checkpoint of step 3 of 7" in told[0]
    assert "every 3 steps in" in told[0] and "the copy of step 3" in told[0]
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 3]
    assert records(run)[:6] == before
    # Of the first start, steps 1 to 3 and what came before them are not lost.
    times = [
        each for each in read_metrics(str(run / "metrics.jsonl")) if each["kind"] == goodput.KIND
    ]
    assert [(each["start"], each["step"]) for each in times[:2]] == [(0, 3), (1, 6)]
    assert times[-1]["run_compile"] > 0
    # The last checkpoint has the state, so the memory of the host is free again.
    assert not list((tmp_path / "host").rglob("*.data"))


@pytest.mark.slow  # test_near_tier.py gives a copy up
def test_a_state_that_is_not_finite_is_not_copied(prepared, tmp_path, monkeypatch):
    """The learning rate overflows the parameters: the first step is finite, the second is not."""
    config = config_of(prepared, 1, tmp_path / "host")
    optimizer = dataclasses.replace(
        config.optimizer, learning_rate=1e38, warmup_fraction=0, clip_grad_norm=0
    )
    train = dataclasses.replace(config.train, max_bad_steps=3)
    config = dataclasses.replace(config, optimizer=optimizer, train=train)
    with pytest.raises(Diverged, match="there is no good checkpoint"):
        loop.train(config, str(tmp_path / "run"), show_progress=False)
    assert not list((tmp_path / "host").rglob("*.data"))
