"""Whole runs of a tiny model in this process."""

import dataclasses
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, StageConfig, TrainConfig
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.parallel.hardware import flops_per_token
from mtnlg_jax.train import loop
from mtnlg_jax.train.checkpoint import Checkpoints, load_run
from mtnlg_jax.train.metrics import read_metrics

WORDS = "the whale swam north while the old captain slept and nobody on the ship dared to wake him again".split()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    rng = np.random.default_rng(0)
    text = "\n".join(" ".join(rng.choice(WORDS, 12)) + "." for _ in range(400))
    (folder / "book.txt").write_text(text)
    prepare(folder / "book.txt", folder / "data", vocab_size=300, heldout=0.1, progress=False)
    return str(folder / "data")


def config_of(prepared, steps=6, **train):
    train = {"global_batch_size": 8, "eval_every": 3, "save_every": 3, "eval_batches": 2} | train
    return Config(
        model=ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=8, max_position_embeddings=32),
        mesh=MeshConfig(data=8), data=DataConfig(path=prepared), optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(steps=steps, compute_dtype="float32", **train))


def losses(workdir):
    return {r["step"]: r["loss"] for r in read_metrics(os.path.join(workdir, "metrics.jsonl")) if r["kind"] == "train"}


STAGES = (StageConfig("masked", 1 / 3, masked=1.0), StageConfig("causal", 1 / 3), StageConfig("mix", 1 / 3, masked=0.5))


@pytest.fixture(scope="session")
def whole(prepared, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("whole"))
    return loop.train(config_of(prepared, stages=STAGES), workdir, show_progress=False)


def test_a_run_of_stages_leaves_everything_behind(whole, prepared):
    records = read_metrics(os.path.join(whole.workdir, "metrics.jsonl"))
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6]
    assert [r["stage"] for r in train] == ["masked"] * 2 + ["causal"] * 2 + ["mix"] * 2
    assert [r["objective"] for r in train] == ["masked", "masked", "causal", "causal", "causal", "masked"]
    held_out = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in held_out] == [3, 6]
    assert {"causal_loss", "perplexity", "bits_per_byte", "masked_loss"} <= held_out[0].keys()
    for name in ("config.json", "loss.png", "tokenizer", "checkpoints", "tensorboard"):
        assert os.path.exists(os.path.join(whole.workdir, name)), name
    assert whole.final["step"] == 6 and whole.skipped == 0 and whole.tokens == 6 * 8 * 32
    run = load_run(whole.workdir, "last")
    assert run.step == 6 and run.tokenizer.decode(run.tokenizer.encode("the whale")) == "the whale"


def test_bits_per_byte_is_the_loss_over_the_bytes(whole):
    with open(os.path.join(whole.workdir, "config.json")) as file:
        path = json.load(file)["data"]["path"]
    with open(os.path.join(path, "heldout", "meta.json")) as file:
        meta = json.load(file)
    bits = whole.final["causal_loss"] / np.log(2) * (meta["tokens"] - meta["documents"])
    assert whole.final["bits_per_byte"] == pytest.approx(bits / meta["bytes"])


def test_a_run_stopped_and_resumed_repeats_the_same_losses(whole, prepared, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    real = loop.batch_at

    def failing(config, mesh, data, step):
        if step == 4:
            raise Stop
        return real(config, mesh, data, step)

    monkeypatch.setattr(loop, "batch_at", failing)
    with pytest.raises(Stop):
        loop.train(config_of(prepared, stages=STAGES), str(tmp_path), show_progress=False)
    assert max(losses(tmp_path)) == 3  # step 4 was running; its numbers were never fetched
    monkeypatch.undo()
    loop.train(config_of(prepared, stages=STAGES), str(tmp_path), show_progress=False)
    assert losses(tmp_path) == losses(whole.workdir)


def test_a_finished_run_started_again_changes_nothing(whole, prepared):
    before = losses(whole.workdir)
    again = loop.train(config_of(prepared, stages=STAGES), whole.workdir, show_progress=False)
    assert again.final == whole.final and losses(whole.workdir) == before


def test_another_mesh_reads_the_same_batches_and_gives_the_same_losses(whole, prepared, tmp_path):
    config = dataclasses.replace(config_of(prepared, stages=STAGES), mesh=MeshConfig(data=2, tensor=4, zero=3))
    loop.train(config, str(tmp_path), show_progress=False)
    there, here = losses(tmp_path), losses(whole.workdir)
    assert there == pytest.approx(here, rel=1e-5)


def test_another_model_is_refused_with_the_difference(whole, prepared):
    config = config_of(prepared, stages=STAGES)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=2))
    with pytest.raises(ValueError, match=r"num_layers"):
        loop.train(config, whole.workdir, show_progress=False)


def test_two_runs_in_one_folder(whole, prepared):
    with loop._own(whole.workdir), pytest.raises(OSError, match="another run"):
        loop.train(config_of(prepared), whole.workdir, show_progress=False)


def test_a_read_only_place(prepared):
    with pytest.raises(OSError, match="cannot write in /proc/nowhere"):
        loop.train(config_of(prepared), "/proc/nowhere", show_progress=False)


def test_non_finite_steps_stop_the_run_and_name_the_checkpoint(prepared, tmp_path, monkeypatch):
    real = loop.batch_at

    def poisoned(config, mesh, data, step):
        batch, micro, sequences = real(config, mesh, data, step)
        return (batch | {"weights": batch["weights"] * jnp.nan} if step >= 4 else batch), micro, sequences

    monkeypatch.setattr(loop, "batch_at", poisoned)
    config = config_of(prepared, steps=20, max_bad_steps=3, eval_every=4, save_every=4)
    with pytest.raises(loop.Diverged, match=r"3 steps in a row.*checkpoint is of step 4"):
        loop.train(config, str(tmp_path), show_progress=False)
    assert Checkpoints(os.path.join(tmp_path, "checkpoints")).steps() == [4]


@pytest.mark.parametrize(("change", "message"), [
    ({"data": DataConfig()}, "data.path is empty"),
    ({"data": DataConfig(path="/nowhere")}, "/nowhere"),
    ({"mesh": MeshConfig(data=3)}, "does not divide|does not fit"),
    ({"mesh": MeshConfig(data=16)}, "16.*8|8.*16"),
    ({"mesh": MeshConfig(data=1, tensor=3)}, "tensor=3; try"),
    ({"model": ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=8, max_position_embeddings=32,
                           vocab_size=128)}, "vocab_size=128 is smaller"),
    ({"model": ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=8, max_position_embeddings=32_000)},
     "32000|32001"),
])
def test_what_does_not_fit_is_refused_before_any_work(prepared, tmp_path, change, message):
    config = dataclasses.replace(config_of(prepared), **change)
    with pytest.raises((ValueError, OSError), match=message):
        loop.train(config, str(tmp_path / "run"), show_progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_papers_flops_per_token():
    # PaLM's convention for MT-NLG: 6 x 529.6 B plus attention 12 L H Q T.
    model = ModelConfig(num_layers=105, hidden_size=20480, num_attention_heads=128, vocab_size=51200)
    expected = 6 * (model.parameter_count() - 2048 * 20480) + 12 * 105 * 20480 * 2048
    assert flops_per_token(model, 2048) == expected
