"""Train whole runs of a tiny model in this process."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)
from mtnlg_jax.errors import Diverged, Preempted
from mtnlg_jax.hardware import flops_per_token
from mtnlg_jax.train import lifetime, loop
from mtnlg_jax.train.checkpoint import load_run
from mtnlg_jax.train.metrics import read_metrics

WORDS = (
    "the whale swam north while the old captain slept "
    "and nobody on the ship dared to wake him again"
).split()


@pytest.fixture(scope="module")
def prepared(prepared_words):
    return prepared_words(WORDS)


@pytest.fixture(scope="module", autouse=True)
def one_device(compiled_once):
    """Give runs one device unless their config asks for more, because that compiles faster."""
    make = loop.make_mesh

    def made(mesh):
        return make(mesh, jax.devices()[:1] if mesh == MeshConfig(data=1) else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", made)
        yield


def config_of(prepared, steps=6, **train):
    train = {"global_batch_size": 8, "eval_every": 3, "save_every": 3, "eval_batches": 2} | train
    return Config(
        model=ModelConfig(
            num_layers=1,
            hidden_size=32,
            num_attention_heads=8,
            max_position_embeddings=32,
            normalization="rmsnorm",
            add_bias=False,
        ),
        mesh=MeshConfig(data=1),
        data=DataConfig(path=prepared),
        # A rate that does not follow the length of a run, so that runs may become longer.
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_fraction=0.0, lr_decay_style="constant"
        ),
        train=TrainConfig(steps=steps, compute_dtype="float32", **train),
    )


def losses(workdir):
    return {
        r["step"]: r["loss"]
        for r in read_metrics(os.path.join(workdir, "metrics.jsonl"))
        if r["kind"] == "train"
    }


STAGES = (
    StageConfig("masked", 1 / 3, masked=1.0),
    StageConfig("causal", 1 / 3),
    StageConfig("mix", 1 / 3, masked=0.5),
)


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("whole"))
    return loop.train(config_of(prepared, stages=STAGES), workdir, show_progress=False)


def test_a_run_of_stages_writes_all_its_files(whole, prepared):
    records = read_metrics(os.path.join(whole.workdir, "metrics.jsonl"))
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6]
    assert [r["stage"] for r in train] == ["masked"] * 2 + ["causal"] * 2 + ["mix"] * 2
    assert [r["objective"] for r in train] == [
        "masked",
        "masked",
        "causal",
        "causal",
        "causal",
        "masked",
    ]
    held_out = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in held_out] == [3, 6]
    assert {"causal_loss", "perplexity", "bits_per_byte", "masked_loss"} <= held_out[0].keys()
    for name in ("config.json", "loss.png", "tokenizer", "checkpoints", "tensorboard"):
        assert os.path.exists(os.path.join(whole.workdir, name)), name
    assert whole.final["step"] == 6 and whole.skipped == 0 and whole.tokens == 6 * 8 * 32
    run = load_run(whole.workdir, "last")
    assert run.step == 6 and run.tokenizer.decode(run.tokenizer.encode("the whale")) == "the whale"


def test_bits_per_byte_is_the_loss_per_scored_byte(whole):
    final = whole.final
    bits = final["causal_loss"] / np.log(2) * final["scored_tokens"] / final["scored_bytes"]
    assert final["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_a_stopped_and_resumed_run_has_the_same_losses(whole, prepared, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    real = loop.batch_at

    def failing(config, mesh, data, step, samples):
        if step == 4:
            raise Stop
        return real(config, mesh, data, step, samples)

    monkeypatch.setattr(loop, "batch_at", failing)
    with pytest.raises(Stop):
        loop.train(config_of(prepared, stages=STAGES), str(tmp_path), show_progress=False)
    assert max(losses(tmp_path)) == 3  # step 4 was running, and its metrics were not fetched yet
    monkeypatch.undo()
    loop.train(config_of(prepared, stages=STAGES), str(tmp_path), show_progress=False)
    assert losses(tmp_path) == losses(whole.workdir)


def test_a_finished_run_started_again_changes_nothing(whole, prepared):
    before = losses(whole.workdir)
    again = loop.train(config_of(prepared, stages=STAGES), whole.workdir, show_progress=False)
    assert again.final == whole.final and losses(whole.workdir) == before
    # Also if its last evaluation was lost: it is repeated.
    path = os.path.join(whole.workdir, "metrics.jsonl")
    with open(path, "rb") as file:
        lines = file.read().splitlines()
    with open(path, "wb") as file:
        file.write(b"\n".join([*lines[:-1], b"5"]))
    again = loop.train(config_of(prepared, stages=STAGES), whole.workdir, show_progress=False)
    timeless = [{**summary.final, "time": 0} for summary in (again, whole)]
    assert timeless[0] == timeless[1] and losses(whole.workdir) == before


@pytest.mark.slow  # test_other_mesh.py moves a run from mesh to mesh
def test_another_mesh_has_the_same_batches_and_losses(whole, prepared, tmp_path):
    config = dataclasses.replace(
        config_of(prepared, stages=STAGES), mesh=MeshConfig(data=2, tensor=4, zero=3)
    )
    loop.train(config, str(tmp_path), show_progress=False)
    there = losses(tmp_path)
    here = losses(whole.workdir)
    assert there == pytest.approx(here, rel=1e-5)


def test_another_model_raises_an_error_with_the_difference(whole, prepared):
    config = config_of(prepared, stages=STAGES)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=2))
    with pytest.raises(ValueError, match=r"num_layers"):
        loop.train(config, whole.workdir, show_progress=False)


def test_a_second_run_in_a_folder_raises_an_error(whole, prepared):
    with lifetime.own(whole.workdir), pytest.raises(OSError, match="another run"):
        loop.train(config_of(prepared), whole.workdir, show_progress=False)


def test_a_read_only_folder_raises_an_error(prepared):
    with pytest.raises(OSError, match="cannot write in /proc/nowhere"):
        loop.train(config_of(prepared), "/proc/nowhere", show_progress=False)


class Scripted(loop.Evaluator):
    """Return the given held-out losses in order."""

    wanted = []

    def __call__(self, params):
        return {"causal_loss": Scripted.wanted.pop(0)}


def folders_of(workdir):
    return sorted(
        name for name in os.listdir(os.path.join(workdir, "checkpoints")) if name[0].isdigit()
    )


def test_after_divergence_the_same_command_resumes_from_a_finite_state(
    prepared, tmp_path, monkeypatch, caplog
):
    real = loop.batch_at
    workdir = str(tmp_path)
    read = []

    def batch_at(config, mesh, data, step, samples):
        read.append((step, samples))
        batch, micro, sequences = real(config, mesh, data, step, samples)
        return (
            (batch | {"weights": batch["weights"] * poison[0]} if step >= 4 else batch),
            micro,
            sequences,
        )

    monkeypatch.setattr(loop, "batch_at", batch_at)
    poison = [jnp.nan]
    config = config_of(prepared, steps=20, max_bad_steps=3, eval_every=0, save_every=2, keep_last=1)
    with pytest.raises(
        Diverged, match=r"3 steps in a row, up to step 7; the last good checkpoint is of step 2\."
    ):
        loop.train(config, workdir, show_progress=False)
    # Nothing is saved among bad steps, and the state after step 4, of which no loss was finite, is
    # not gone on from.
    assert folders_of(workdir) == ["2", "4.diverged"]

    # Saved where an evaluation is the best, between the periodic saves; another batch reads on
    # where this one ended.
    poison[0] = 1.0
    monkeypatch.setattr(loop, "Evaluator", Scripted)
    Scripted.wanted = [5.0, 4.0, 4.5, 4.4]
    config = config_of(prepared, steps=6, eval_every=1, save_every=0, keep_last=1, max_bad_steps=3)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, global_batch_size=16)
    )
    caplog.clear()
    read.clear()
    summary = loop.train(config, workdir, show_progress=False)
    assert [step for step, _ in read] == [2, 3, 4, 5] and [samples for _, samples in read] == [
        16,
        32,
        48,
        64,
    ]
    assert any(
        "train.global_batch_size 8 -> 16" in record.getMessage() for record in caplog.records
    )
    assert summary.best_step == 4 and folders_of(workdir) == ["4", "4.diverged", "6"]
    assert summary.tokens == (2 * 8 + 4 * 16) * 32
    assert load_run(workdir).step == 4 and load_run(workdir, "last").step == 6


def test_a_stop_at_a_skipped_step_keeps_earlier_steps(prepared, tmp_path, monkeypatch):
    real = loop.batch_at

    def batch_at(config, mesh, data, step, samples):
        batch, micro, sequences = real(config, mesh, data, step, samples)
        if step < 2:
            return batch, micro, sequences
        os.kill(os.getpid(), signal.SIGTERM)
        return batch | {"weights": batch["weights"] * jnp.nan}, micro, sequences

    monkeypatch.setattr(loop, "batch_at", batch_at)
    with pytest.raises(Preempted, match="after step 3; state saved in"):
        loop.train(
            config_of(prepared, eval_every=0, save_every=0), str(tmp_path), show_progress=False
        )
    assert folders_of(tmp_path) == ["3"]


def test_an_evaluation_that_is_not_finite_ends_a_run_without_a_save(
    prepared, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "Evaluator", Scripted)
    Scripted.wanted = [5.0, float("nan"), float("inf")]
    config = config_of(prepared, steps=3, eval_every=1, save_every=1)
    with pytest.raises(
        Diverged, match=r"held-out loss \[inf\] was not finite at the last step, 3; .* of step 1"
    ):
        loop.train(config, str(tmp_path), show_progress=False)
    assert folders_of(tmp_path) == ["1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DataConfig()}, "data.path is empty"),
        ({"data": DataConfig(path="/nowhere")}, "/nowhere"),
        ({"mesh": MeshConfig(data=3)}, "is not divisible|does not divide|does not fit"),
        ({"mesh": MeshConfig(data=16)}, "16.*8|8.*16"),
        ({"mesh": MeshConfig(data=1, tensor=3)}, "tensor=3; try"),
        (
            {
                "model": ModelConfig(
                    num_layers=1,
                    hidden_size=32,
                    num_attention_heads=8,
                    max_position_embeddings=32,
                    vocab_size=128,
                )
            },
            "vocab_size=128 is smaller",
        ),
        (
            {
                "model": ModelConfig(
                    num_layers=1,
                    hidden_size=32,
                    num_attention_heads=8,
                    max_position_embeddings=32_000,
                )
            },
            "32000|32001",
        ),
    ],
)
def test_invalid_configs_raise_before_any_work(prepared, tmp_path, change, message):
    config = dataclasses.replace(config_of(prepared), **change)
    with pytest.raises((ValueError, OSError), match=message):
        loop.train(config, str(tmp_path / "run"), show_progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_flops_per_token_of_the_paper():
    # PaLM's convention for MT-NLG: 6 x 529.6 B, plus 12 L H Q T for attention.
    model = ModelConfig(
        num_layers=105, hidden_size=20480, num_attention_heads=128, vocab_size=51200
    )
    expected = 6 * (model.parameter_count() - 2048 * 20480) + 12 * 105 * 20480 * 2048
    assert flops_per_token(model, 2048) == expected
    head = 6 * model.vocabulary * model.hidden_size
    assert flops_per_token(model, 2048, head=False) == pytest.approx(expected - head)
    # 4 of 6 parts of the products, and all of the attention.
    attention = 12 * model.num_layers * model.hidden_size * 2048
    frozen = attention + (expected - attention) * 4 / 6
    assert flops_per_token(model, 2048, frozen=True) == pytest.approx(frozen)
