"""Check Muon: orthogonal updates for the matrices of the blocks, AdamW for the rest, on every
mesh."""

import dataclasses
import functools

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
from mtnlg_jax.train.optimizer import make_optimizer
from mtnlg_jax.train.state import init_state
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


@functools.cache
def after_two_steps(data, tensor, zero=1):
    config = Config(
        model=MODEL,
        mesh=MeshConfig(data=data, tensor=tensor, zero=zero),
        optimizer=MUON,
        train=TrainConfig(steps=10, global_batch_size=ROWS, compute_dtype="float32"),
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
    state = init_state(config, mesh)
    step = make_train_step(config, mesh, causal=True)
    for _ in range(2):
        state, _ = step(state, batch, jnp.int32(1), jnp.int32(ROWS), 1.0)
    assert step._cache_size() == 1
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.params["blocks"])]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_a_step_on_a_mesh_equals_one_device(zero):
    for one, many in zip(after_two_steps(1, 1), after_two_steps(4, 2, zero), strict=True):
        np.testing.assert_allclose(many, one, atol=2e-4)  # two steps change a weight by about 4e-3
