"""Exponential moving averages of the weights: longhand, on every mesh, in checkpoints."""

import dataclasses
import functools
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax import foreign
from mtnlg_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    override,
    validate,
)
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import averages, loop
from mtnlg_jax.train.adapter_file import open_base, weights_of
from mtnlg_jax.train.batch import put_batch
from mtnlg_jax.train.checkpoint import Checkpoints, config_of, load_run
from mtnlg_jax.train.checkpoint_arrays import flatten, split
from mtnlg_jax.train.metrics import read_metrics
from mtnlg_jax.train.state import abstract_state, init_state
from mtnlg_jax.train.step import make_train_step

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=128, max_position_embeddings=16
)
ROWS = 8
LENGTH = 16
STEPS = 4
DECAY = 0.3


@functools.cache
def run_of(data, tensor, bad_step=None):
    """Return the trained parameters and the averages after each step."""
    config = Config(
        model=MODEL,
        mesh=MeshConfig(data=data, tensor=tensor),
        # With the usual epsilon Adam turns the last bits of small gradients into whole steps.
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0, eps=1e-3),
        train=TrainConfig(
            steps=10, global_batch_size=ROWS, compute_dtype="float32", ema_decay=DECAY
        ),
    )
    mesh = make_mesh(config.mesh, jax.devices()[: data * tensor])
    tokens = np.random.default_rng(0).integers(0, 128, (ROWS, LENGTH + 1)).astype(np.int32)
    table = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "segment_ids": np.ones_like(tokens[:, 1:]),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "weights": np.ones((ROWS, LENGTH), np.float32),
    }
    batch = put_batch(
        lambda numbers: {k: v[numbers] for k, v in table.items()}, (1, ROWS, LENGTH), mesh
    )
    bad = batch | {"weights": batch["weights"] * jnp.nan}
    state = init_state(config, mesh)
    step = make_train_step(config, mesh, causal=True)
    found = [(flatten(state.params), flatten(state.extras["ema"]))]
    found = jax.tree.map(np.asarray, found)
    for number in range(STEPS):
        given = bad if number == bad_step else batch
        state, _ = step(state, given, jnp.int32(1), jnp.int32(ROWS), 1.0)
        found.append(
            jax.tree.map(np.asarray, (flatten(state.params), flatten(state.extras["ema"])))
        )
    return found


def test_averages_follow_the_weights_as_their_law_says():
    found = run_of(1, 1)
    wanted = {name: array.astype(np.float64) for name, array in found[0][0].items()}
    for step, (params, mean) in enumerate(found[1:], 1):
        # 2 / 11 and 3 / 12 at first; from step 3 on the decay that was asked for.
        decay = [0.0, 2 / 11, 3 / 12, 0.3, 0.3][step]
        for name, array in params.items():
            wanted[name] = decay * wanted[name] + (1 - decay) * array
            np.testing.assert_allclose(mean[name], wanted[name], atol=1e-6)
    moved = max(np.abs(found[-1][0][name] - wanted[name]).max() for name in wanted)
    assert moved > 1e-3


@pytest.mark.parametrize(
    ("data", "tensor"),
    [
        (2, 4),
        pytest.param(4, 2, marks=pytest.mark.slow),
        pytest.param(8, 1, marks=pytest.mark.slow),
    ],
)
def test_averages_are_equal_on_every_mesh(data, tensor):
    for (_, one), (_, many) in zip(run_of(1, 1), run_of(data, tensor), strict=True):
        for name in one:
            np.testing.assert_allclose(many[name], one[name], atol=2e-5, err_msg=name)


def test_a_skipped_step_leaves_the_averages():
    found = run_of(1, 1, bad_step=2)
    for name, array in found[2][1].items():
        np.testing.assert_array_equal(found[3][1][name], array)
        assert np.isfinite(found[4][1][name]).all()


# --- whole runs


@pytest.fixture(scope="module")
def trained(compiled_once, prepared_words, tmp_path_factory):
    data = prepared_words(["the", "whale", "swam", "north", "and", "slept"])
    config = Config(
        model=dataclasses.replace(MODEL, num_layers=1, vocab_size=None, max_position_embeddings=32),
        mesh=MeshConfig(data=8),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(
            steps=4,
            global_batch_size=8,
            eval_batches=1,
            save_every=2,
            keep_last=9,
            ema_decay=0.9,
        ),
    )
    config = override(config, f"data.path={data}")
    workdir = str(tmp_path_factory.mktemp("averaged"))
    loop.train(config, workdir, show_progress=False)
    return config, workdir


def test_a_checkpoint_gives_its_averages(trained):
    _, workdir = trained
    last = flatten(load_run(workdir, "last").params)
    mean = flatten(load_run(workdir, "ema").params)
    assert last.keys() == mean.keys()
    assert max(np.abs(np.asarray(last[n]) - np.asarray(mean[n])).max() for n in last) > 1e-4
    _, decoder = load_decoder(workdir, "ema")
    table = flatten(decoder.params[0])["tokens_VD"]
    np.testing.assert_array_equal(np.asarray(table), np.asarray(mean["tokens_VD"]))


@pytest.mark.parametrize("base", ["float", "int8"])
def test_averages_of_adapters_take_their_place_in_a_checkpoint(base):
    config = Config(
        model=MODEL,
        mesh=MeshConfig(data=1),
        optimizer=OptimizerConfig(lora_rank=2, lora_base=base),
        train=TrainConfig(ema_decay=0.9, init="a run"),
    )
    state = init_state(config, make_mesh(config.mesh, jax.devices()[:1]))
    mean = jax.tree.map(lambda x: x + 1, state.extras[averages.KEY])
    found = split(flatten(state._replace(extras={averages.KEY: mean})))["ema"]
    expected = flatten(averages.parameters(config, state.params, mean))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(array), name)


def test_records_tell_averages_from_weights(trained):
    """Outputs of one are not continued with the other."""
    _, workdir = trained
    one, last, mean = (weights_of(workdir, which, 4) for which in ("best", "last", "ema"))
    assert one == last != mean


@pytest.mark.parametrize("load", [load_run, load_decoder, config_of, open_base])
def test_a_model_of_another_format_has_no_averages(tmp_path, monkeypatch, load):
    monkeypatch.setattr(foreign, "reader_of", lambda path: object())
    with pytest.raises(ValueError, match="is not a run, and has no averages .* leave --checkpoint"):
        load(tmp_path, "ema")


def test_an_evaluation_also_tells_of_the_averages(trained):
    _, workdir = trained
    final = [r for r in read_metrics(f"{workdir}/metrics.jsonl") if r["kind"] == "eval"][-1]
    assert final["ema_causal_loss"] != final["causal_loss"]
    assert abs(final["ema_causal_loss"] - final["causal_loss"]) < 0.5


def test_a_run_goes_on_with_its_averages(trained, tmp_path):
    config, workdir = trained
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    loop.train(config, str(copy), show_progress=False)
    one = flatten(load_run(workdir, "ema").params)
    other = flatten(load_run(copy, "ema").params)
    for name in one:
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]))


def test_a_run_without_averages_says_so(tmp_path):
    config = Config(model=MODEL, mesh=MeshConfig(data=1))
    state = abstract_state(config, make_mesh(config.mesh, jax.devices()[:1]))
    with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
        checkpoints.save(1, zeros, {}, wait=True)
    with pytest.raises(FileNotFoundError, match=r"train.ema_decay above 0; give --checkpoint=best"):
        load_run(tmp_path, "ema")


@pytest.mark.parametrize("value", ["1", "-0.1", "1.5"])
def test_a_decay_outside_its_range_is_refused(value):
    with pytest.raises(ValueError, match=r"train\.ema_decay=.* is outside \[0, 1\)"):
        validate(override(Config(), f"train.ema_decay={value}"))
