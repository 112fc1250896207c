"""Check loads of experts, the bias that evens them out, and whole steps with split experts."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
    validate,
)
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.parallel.mesh import EXPERT_BIAS, make_mesh, parameter_name, shardings_of
from mtnlg_jax.train.batch import put_batch
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.expert_loads import balanced, metrics_of
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.init_from import recorded_meaning
from mtnlg_jax.train.state import abstract_state, init_state
from mtnlg_jax.train.step import make_train_step

ROWS = 8
LENGTH = 8
STEPS = 3
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    ffn_hidden_size=16,
    vocab_size=32,
    max_position_embeddings=LENGTH,
    position_embedding_type="rotary",
    activation="swiglu",
    add_bias=False,
    init_method_std=0.3,
    moe=MoEConfig(
        4,
        2,
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.05,
        moe_aux_loss_coeff=0.1,
        moe_z_loss_coeff=0.01,
    ),
)
ONE = MeshConfig(data=1)


def config_of(mesh: MeshConfig, model: ModelConfig = MODEL) -> Config:
    config = Config(
        model=model,
        mesh=mesh,
        # A large eps: Adam would divide rounding errors of tiny gradients by themselves.
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-3, warmup_fraction=0.0),
        train=TrainConfig(
            global_batch_size=ROWS,
            micro_batch_size=ROWS // 2 // mesh.data // mesh.expert,
            compute_dtype="float32",
            loss_chunk=24,
            steps=10,
        ),
    )
    validate(config)
    return config


def batch_on(mesh, step: int, unused: int = 0):
    rng = np.random.default_rng(step)
    shape = (ROWS, LENGTH)
    tokens = rng.integers(0, 32, (2, *shape)).astype(np.int32)
    weights = np.ones(shape, np.float32)
    weights[ROWS - unused :] = 0
    made = {
        "tokens": tokens[0],
        "labels": tokens[1],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "weights": weights,
    }
    return put_batch(
        lambda numbers: {name: x[numbers] for name, x in made.items()},
        (2, ROWS // 2, LENGTH),
        mesh,
    )


def devices_of(mesh: MeshConfig):
    sizes = (mesh.pipe, mesh.data, mesh.expert, mesh.context, mesh.tensor)
    return make_mesh(mesh, jax.devices()[: int(np.prod(sizes))])


@functools.cache
def trained(mesh_config: MeshConfig):
    """Return (step, state, metrics of each step) after STEPS steps of two micro-batches."""
    config = config_of(mesh_config)
    mesh = devices_of(mesh_config)
    step = make_train_step(config, mesh, causal=True)
    params = jax.tree.map(np.asarray, init_parameters(MODEL, seed=0))
    state = init_state(config, mesh, jax.device_put(params, shardings_of(params, mesh)))
    metrics = []
    for number in range(STEPS):
        # A part of the last batch is empty, as in a ramp.
        batch = batch_on(mesh, number, unused=3 * (number == STEPS - 1))
        state, found = step(state, batch, jnp.int32(2), jnp.int32(ROWS), 1.0)
        metrics.append({name: np.asarray(value) for name, value in found.items()})
    return step, state, metrics


def numbers(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=2, expert=2, tensor=2), marks=SLOW),
        pytest.param(MeshConfig(data=1, expert=4, zero=0), marks=SLOW),
        pytest.param(MeshConfig(data=1, expert=4, tensor=2, zero=3), marks=SLOW),
        pytest.param(MeshConfig(data=2, expert=2, context=2), marks=SLOW),
        pytest.param(MeshConfig(data=1, expert=2, pipe=2, tensor=2), marks=SLOW),
        pytest.param(MeshConfig(data=2, expert=2, pipe=2, zero=3), marks=SLOW),
        pytest.param(MeshConfig(data=1, expert=4, pipe=2, schedule="1f1b"), marks=SLOW),
        pytest.param(MeshConfig(data=4, tensor=2), marks=SLOW),
    ],
    ids=str,
)
def test_three_steps_on_a_mesh_equal_one_device(mesh):
    _, state, wanted_metrics = trained(ONE)
    wanted = numbers(state.params)
    _, state, metrics = trained(mesh)
    got = numbers(state.params)
    for path, value in wanted.items():
        np.testing.assert_allclose(got[path], value, atol=2e-5, err_msg=path)
        if EXPERT_BIAS in path:
            np.testing.assert_array_equal(got[path], value)
            assert len(np.unique(value)) > 1
    for one, other in zip(metrics, wanted_metrics, strict=True):
        for name, value in other.items():
            np.testing.assert_allclose(one[name], value, rtol=1e-4, err_msg=name)
    assert wanted_metrics[0]["expert_load_max"] > 1


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        (MeshConfig(data=2, expert=2, tensor=2), ONE),
        pytest.param(ONE, MeshConfig(data=2, expert=2, tensor=2), marks=SLOW),
        pytest.param(
            MeshConfig(data=1, expert=4, tensor=2, zero=3),
            MeshConfig(data=2, expert=2, pipe=2, zero=3),
            marks=SLOW,
        ),
        pytest.param(
            MeshConfig(data=2, expert=2, tensor=2), MeshConfig(data=4, tensor=2), marks=SLOW
        ),
    ],
    ids=str,
)
def test_split_experts_resume_on_another_mesh(tmp_path, saved, resumed):
    _, state, _ = trained(saved)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(STEPS, state, {"config": {}, "identity": {}}, wait=True)
        losses = []
        for mesh_config in (saved, resumed):
            mesh = devices_of(mesh_config)
            found = checkpoints.restore(abstract_state(config_of(mesh_config), mesh), {})
            assert found is not None
            # With the optimizer's moments, bit for bit.
            for path, value in numbers(state).items():
                np.testing.assert_array_equal(numbers(found[1])[path], value, err_msg=path)
            step = trained(mesh_config)[0]
            batch = batch_on(mesh, STEPS)
            _, metrics = step(found[1], batch, jnp.int32(2), jnp.int32(ROWS), 1.0)
            losses.append(float(metrics["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@functools.cache
def loads_of(mesh_config: MeshConfig, unused: int, bias: bool):
    moe = dataclasses.replace(MODEL.moe, moe_router_enable_expert_bias=bias)
    config = config_of(mesh_config, dataclasses.replace(MODEL, moe=moe))
    mesh = devices_of(mesh_config)
    function = jax.jit(make_loss_and_gradients(config, mesh, True, counting=True))
    params = init_parameters(config.model, seed=0)
    key = jax.random.key_data(jax.random.key(0))
    _, gradients, loads_LE = function(params, batch_on(mesh, 0, unused), jnp.int32(2), key)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return {parameter_name(path): leaf for path, leaf in leaves}, np.asarray(loads_LE)


@SLOW
def test_rows_that_fill_up_the_batch_are_no_load():
    gradients, whole = loads_of(ONE, 0, True)
    np.testing.assert_array_equal(whole.sum(-1), ROWS * LENGTH * 2)
    assert not np.asarray(gradients[EXPERT_BIAS]).any()  # a bias is not trained by gradients
    _, part = loads_of(ONE, 3, True)
    np.testing.assert_array_equal(part.sum(-1), (ROWS - 3) * LENGTH * 2)
    assert (part <= whole).all()


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(ONE, marks=SLOW),
        pytest.param(MeshConfig(data=2), marks=SLOW),
        MeshConfig(data=2, pipe=2),
    ],
    ids=str,
)
def test_a_model_without_the_bias_has_the_same_loads(mesh):
    gradients, loads_LE = loads_of(mesh, 0, False)
    assert EXPERT_BIAS not in gradients
    np.testing.assert_array_equal(loads_LE, loads_of(ONE, 0, True)[1])


def test_the_bias_moves_up_for_experts_with_less_than_the_mean_load():
    params = {"blocks": {EXPERT_BIAS: jnp.zeros((2, 4)), "b_router_E": jnp.ones((2, 4))}}
    loads_LE = jnp.asarray([[8.0, 2.0, 4.0, 2.0], [4.0, 4.0, 4.0, 4.0]])
    moved = balanced(params, loads_LE, config_of(ONE))["blocks"]
    np.testing.assert_allclose(moved[EXPERT_BIAS][0], [-0.05, 0.05, 0.0, 0.05], rtol=1e-6)
    assert not moved[EXPERT_BIAS][1].any() and (moved["b_router_E"] == 1).all()


def test_metrics_are_those_of_the_worst_layer():
    loads_LE = jnp.asarray([[8.0, 0.0, 4.0, 0.0], [5.0, 3.0, 4.0, 4.0]])
    found = metrics_of(loads_LE, MODEL.moe)
    assert float(found["expert_load_max"]) == pytest.approx(8 / 3)
    assert float(found["expert_idle"]) == 0.5
    np.testing.assert_allclose(found["expert_load_max_by_layer"], [8 / 3, 1.25], rtol=1e-6)
    np.testing.assert_array_equal(found["expert_idle_by_layer"], [0.5, 0.0])


def test_runs_without_the_bias_are_recorded_as_before_it_existed():
    plain = dataclasses.replace(MODEL, moe=MoEConfig(4, 2))
    assert "moe_router_enable_expert_bias" not in recorded_meaning(plain)["moe"]
    assert recorded_meaning(MODEL)["moe"]["moe_router_enable_expert_bias"]
    assert "bias_update_rate" not in json.dumps(recorded_meaning(MODEL), default=str)


@pytest.mark.parametrize(
    ("model", "mesh", "words"),
    [
        (
            dataclasses.replace(MODEL, moe=MoEConfig()),
            MeshConfig(expert=2),
            r"mesh.expert=2 splits experts, and this model has none .*; set mesh.expert=1",
        ),
        (
            MODEL,
            MeshConfig(expert=3),
            r"num_moe_experts=4 is not divisible by mesh.expert=3; try mesh.expert=2 or 4",
        ),
        (
            MODEL,
            MeshConfig(data=4, expert=4),
            "global_batch_size=8 is not divisible by mesh.data x mesh.expert=16",
        ),
    ],
)
def test_an_expert_axis_that_does_not_fit_raises_an_error(model, mesh, words):
    with pytest.raises(ValueError, match=words):
        validate(Config(model=model, mesh=mesh, train=TrainConfig(global_batch_size=ROWS)))
