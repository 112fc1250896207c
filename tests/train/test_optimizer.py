"""Check the optimizers: Muon's orthogonal updates for the matrices of the blocks, Lion's signs,
limits of updates, and that all meshes give the same numbers."""

import dataclasses
import functools
from contextlib import closing

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
)
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train.batch import put_batch
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.checkpoint_arrays import flatten
from mtnlg_jax.train.optimizer import make_optimizer
from mtnlg_jax.train.state import abstract_state, init_state
from mtnlg_jax.train.step import make_train_step

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=128,
    max_position_embeddings=16,
    activation="swiglu",
)
MUON = OptimizerConfig(
    name="muon", learning_rate=1e-2, warmup_fraction=0.0, weight_decay=0.0, clip_grad_norm=0.0
)
ROWS = 8
LENGTH = 16


@functools.cache
def updates_of(config):
    params = init_parameters(MODEL, seed=0)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: np.float32(rng.standard_normal(p.shape)), params)
    optimizer = make_optimizer(config)
    # One program compiles faster than every operation alone.
    return jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params)[0])(grads)


def test_updates_of_matrices_are_orthogonal():
    # Newton-Schulz with Jordan's coefficients gives singular values in about [0.68, 1.13], except
    # for those near 0, and a square random matrix has one or two such values.
    blocks = updates_of(MUON)["blocks"]
    sizes = {"w_q_DNH": (32, 32), "w_k_DKH": (32, 16), "w_v_DKH": (32, 16), "w_o_NHD": (32, 32)}
    for name, (inputs, outputs) in sizes.items():
        for layer in np.asarray(blocks["attention"][name][...]):
            values = np.linalg.svd(layer.reshape(inputs, outputs), compute_uv=False) / (
                0.2 * np.sqrt(32)
            )
            assert 0.5 < values[-3] and values.max() < 1.3, name
    for layer in np.asarray(blocks["mlp"]["w_out_FD"][...]):
        values = np.linalg.svd(layer, compute_uv=False) / (0.2 * np.sqrt(128))
        assert 0.5 < values[-3] and values.max() < 1.3


def test_each_expert_has_the_update_of_a_plain_matrix():
    model = dataclasses.replace(MODEL, moe=MoEConfig(num_moe_experts=4))
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: init_parameters(model, seed=0))
    grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), shapes)
    optimizer = make_optimizer(MUON)
    experts = grads["blocks"]["mlp"]
    one = {name: experts[name][...][:, 1] for name in ("w_in_EDF", "w_gate_EDF", "w_out_EFD")}
    plain = {"blocks": {name.replace("E", ""): array for name, array in one.items()}}
    found = optimizer.update(grads, optimizer.init(grads), grads)[0]["blocks"]["mlp"]
    expected = optimizer.update(plain, optimizer.init(plain), plain)[0]["blocks"]
    for name in one:
        np.testing.assert_allclose(
            found[name][...][:, 1], expected[name.replace("E", "")], atol=1e-5, err_msg=name
        )


def test_updates_of_other_parameters_equal_adamw():
    muon = updates_of(MUON)
    adam = updates_of(dataclasses.replace(MUON, name="adamw"))
    same = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (jax.tree_util.keystr(path), bool((a == b).all())), muon, adam
    )
    for path, equal in jax.tree.leaves(same, is_leaf=lambda x: isinstance(x, tuple)):
        assert equal == ("'w_" not in path), path


def test_lion_takes_the_sign_of_a_mean():
    lion = OptimizerConfig(name="lion", b1=0.8, b2=0.6, weight_decay=0.1, clip_grad_norm=0.0)
    optimizer = make_optimizer(lion)
    params = {"w_in_DF": jnp.array([[2.0, -2.0]]), "scale_D": jnp.array([4.0])}
    state = optimizer.init(params)
    assert len(jax.tree.leaves(state)) == 3  # a mean of each, and the count
    # Chen 2023, program 1: the sign of 0.8 m + 0.2 g, then m = 0.6 m + 0.4 g.
    for gradient, sign in ((1.0, 1), (-0.5, 1), (-3.0, -1)):
        grads = jax.tree.map(lambda p, g=gradient: jnp.full_like(p, g), params)
        updates, state = optimizer.update(grads, state, params)
        # Decoupled decay for the matrix alone.
        np.testing.assert_allclose(updates["w_in_DF"], [[sign + 0.2, sign - 0.2]], rtol=1e-6)
        np.testing.assert_allclose(updates["scale_D"], [sign])


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "soap"])
def test_a_long_update_is_scaled_down_before_its_decay(name):
    config = dataclasses.replace(MUON, name=name)
    free = updates_of(config)
    norm = float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(free))))
    for limit in (norm / 4, norm * 1.01):
        decayed = dataclasses.replace(config, clip_update_norm=limit, weight_decay=0.5)
        found = updates_of(decayed)
        decay = updates_of(dataclasses.replace(config, weight_decay=0.5))
        factor = min(1.0, limit / norm)
        for one, raw, plain in zip(*map(jax.tree.leaves, (found, free, decay)), strict=True):
            np.testing.assert_allclose(one, factor * raw + (plain - raw), atol=1e-5)


def config_of(name, mesh):
    optimizer = dataclasses.replace(MUON, name=name)
    if name == "soap":
        optimizer = dataclasses.replace(optimizer, precondition_frequency=2)
    if name == "lion":
        optimizer = dataclasses.replace(optimizer, learning_rate=3e-3)
    micro = ROWS // (mesh.data * 2) if mesh.pipe > 1 else None
    train = TrainConfig(
        steps=20, global_batch_size=ROWS, compute_dtype="float32", micro_batch_size=micro
    )
    return Config(model=MODEL, mesh=mesh, optimizer=optimizer, train=train)


@functools.cache
def started(name, mesh):
    """Return (config, mesh, a function that takes a state a step on, on the same rows)."""
    config = config_of(name, mesh)
    on = make_mesh(mesh, jax.devices()[: mesh.pipe * mesh.data * mesh.context * mesh.tensor])
    tokens = np.random.default_rng(0).integers(0, 128, (ROWS, LENGTH + 1)).astype(np.int32)
    table = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "segment_ids": np.ones_like(tokens[:, 1:]),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "weights": np.ones((ROWS, LENGTH), np.float32),
    }
    micro = ROWS // (config.train.micro_batch_size * mesh.data) if mesh.pipe > 1 else 1
    shape = (micro, ROWS // micro, LENGTH)
    batch = put_batch(lambda numbers: {k: v[numbers] for k, v in table.items()}, shape, on)
    step = make_train_step(config, on, causal=True)

    def go_on(state, count):
        losses = []
        for _ in range(count):
            state, metrics = step(state, batch, jnp.int32(micro), jnp.int32(ROWS), 1.0)
            losses.append(float(metrics["loss"]))
        assert step._cache_size() == 1
        return state, losses

    return config, on, go_on


@functools.cache
def after_steps(name, mesh):
    """Return (losses, parameters of the blocks by name) of four steps."""
    config, on, go_on = started(name, mesh)
    state, losses = go_on(init_state(config, on), 4)
    return losses, {key: np.asarray(x) for key, x in flatten(state.params["blocks"]).items()}


ONE = MeshConfig(data=1)
MESHES = {
    "8": MeshConfig(data=8),
    "4 x 2": MeshConfig(data=4, tensor=2),
    "2 x 4, zero 3": MeshConfig(data=2, tensor=4, zero=3),
    "2 x 2, zero 0": MeshConfig(data=2, tensor=2, zero=0),
    "2 stages x 2": MeshConfig(pipe=2, data=2),
    "2 x 2 of context": MeshConfig(data=2, context=2),
}


@pytest.mark.parametrize("name", ["lion", "soap"])
def test_a_few_steps_lower_the_loss(name):
    losses, _ = after_steps(name, ONE)
    assert losses[-1] < losses[0] - 0.25


@pytest.mark.parametrize("name", ["lion", "soap"])
def test_a_restored_state_goes_on_exactly(name, tmp_path):
    losses, _ = after_steps(name, ONE)
    config, on, go_on = started(name, ONE)
    state, first = go_on(init_state(config, on), 2)  # soap has turned its bases once
    with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(2, state, {}, wait=True)
        _, restored, _ = checkpoints.restore(abstract_state(config, on), {})
    assert first + go_on(restored, 2)[1] == losses


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["muon", "lion", "soap"])
def test_steps_on_a_mesh_equal_one_device(name, mesh):
    losses, one = after_steps(name, ONE)
    found, many = after_steps(name, MESHES[mesh])
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    # The gradient of the bias of keys is 0 but for rounding, of which lion takes the sign.
    names = [each for each in one if not (name == "lion" and "b_k" in each)]
    apart = np.concatenate([np.abs(one[each] - many[each]).ravel() for each in names])

    # The steps change a weight by about 2e-2. Rounding changes most the directions of small
    # singular values, of muon and soap, and the sign of a gradient near 0, of lion.
    assert np.sqrt(np.mean(apart**2)) < 5e-5 and apart.max() < 3e-3
