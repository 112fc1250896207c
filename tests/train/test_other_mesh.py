"""Save a run on one mesh and resume it on another, with the same losses."""

import contextlib
import dataclasses
import os

import jax
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
from mtnlg_jax.train import loop
from mtnlg_jax.train.metrics import read_metrics
from mtnlg_jax.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("compiled_once")
LOSSES = 1e-5  # float32, after updates by Adam
WORDS = (
    "the whale swam north while the old captain slept "
    "and nobody on the ship dared to wake him again"
).split()


@pytest.fixture(scope="module")
def prepared(prepared_words):
    return prepared_words(WORDS, lines=300)


CAUSAL = (StageConfig(),)


def config_of(prepared, mesh, micro=1, stages=CAUSAL):
    """Return a config of six steps of 8 and 16 rows; 16 rows are 2 micro-batches of each of 8 data
    shards."""
    return Config(
        model=ModelConfig(
            num_layers=4,
            hidden_size=32,
            num_attention_heads=8,
            max_position_embeddings=32,
            normalization="rmsnorm",
            add_bias=False,
        ),
        mesh=mesh,
        data=DataConfig(path=prepared),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(
            steps=6,
            global_batch_size=16,
            micro_batch_size=micro,
            rampup_batch_size=(8, 8, 24),
            compute_dtype="float32",
            eval_every=2,
            save_every=2,
            eval_batches=2,
            stages=stages,
        ),
    )


def results_of(workdir):
    records = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    return (
        [r["loss"] for r in records if r["kind"] == "train"],
        [r["sequences"] for r in records if r["kind"] == "train"],
        [r["causal_loss"] for r in records if r["kind"] == "eval"],
    )


MESHES = (
    MeshConfig(pipe=4, data=2, schedule="1f1b"),
    MeshConfig(pipe=2, data=2, tensor=2, zero=3, virtual_pipe=2, flush=2),
    MeshConfig(data=1, context=4, tensor=2, zero=0),
)


BOTH = (StageConfig("masked", 0.5, masked=1.0), StageConfig("causal", 0.5))


# Slow: every mesh, with both objectives.
@pytest.mark.parametrize(
    ("meshes", "stages"),
    [
        pytest.param((MeshConfig(data=8), MESHES[1]), CAUSAL, marks=pytest.mark.slow),
        pytest.param(MESHES, BOTH, marks=pytest.mark.slow),
    ],
    ids=["quick", "all"],
)
def test_a_run_moved_between_meshes_equals_one_that_was_not(
    prepared, tmp_path, monkeypatch, meshes, stages
):
    stayed = config_of(prepared, MeshConfig(data=8), stages=stages)
    loop.train(stayed, str(tmp_path / "stayed"), show_progress=False)
    real = loop.batch_at
    stops = [2, 4][: len(meshes) - 1]

    def failing(config, mesh, data, step, samples):
        if step in stops:
            stops.remove(step)
            raise RuntimeError("the machine is gone")
        return real(config, mesh, data, step, samples)

    monkeypatch.setattr(loop, "batch_at", failing)
    for mesh in meshes:
        ends = (
            pytest.raises(RuntimeError, match="the machine is gone")
            if stops
            else contextlib.nullcontext()
        )
        with ends:
            loop.train(
                config_of(prepared, mesh, stages=stages),
                str(tmp_path / "moved"),
                show_progress=False,
            )
    losses, sequences, held_out = results_of(tmp_path / "moved")
    stayed = results_of(tmp_path / "stayed")
    assert sequences == stayed[1] == [8, 8, 8, 16, 16, 16]
    np.testing.assert_allclose(losses, stayed[0], rtol=LOSSES)
    np.testing.assert_allclose(held_out, stayed[2], rtol=LOSSES)


@pytest.mark.slow  # the test above has a ramp, and CompiledStep accepts no other shapes
def test_a_ramp_through_a_pipeline_compiles_once(prepared, monkeypatch, tmp_path):
    lowered = []

    class Counted:
        def __init__(self, step):
            self._step = step

        def lower(self, *args):
            lowered.append([leaf.shape for leaf in jax.tree.leaves(args[1])])
            return self._step.lower(*args)

    monkeypatch.setattr(
        loop, "make_train_step", lambda *args, **kwargs: Counted(make_train_step(*args, **kwargs))
    )
    config = config_of(prepared, MeshConfig(pipe=2, data=2, tensor=2, schedule="1f1b"))
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, stages=(StageConfig(),), steps=4)
    )
    loop.train(config, str(tmp_path), show_progress=False)
    assert results_of(tmp_path)[1] == [8, 8, 8, 16]
    assert len(lowered) == 1  # the compiled step accepts no other shapes
