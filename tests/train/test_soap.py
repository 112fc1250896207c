"""Check SOAP against algorithms 3 and 4 of Vyas 2024, written out in NumPy, and what its
documentation says of its bases."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import MeshConfig, ModelConfig, MoEConfig, OptimizerConfig
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.parallel.mesh import make_mesh, shardings_of
from mtnlg_jax.train.checkpoint_arrays import flatten
from mtnlg_jax.train.optimizer import make_optimizer

SOAP = OptimizerConfig(
    name="soap", weight_decay=0.0, clip_grad_norm=0.0, precondition_frequency=3, eps=1e-6
)
SHIFT = 1e-4


def by_hand(gradients, b1=0.9, b2=0.95, eps=1e-6, frequency=3, sides=(True, True)):
    """Return the updates of one matrix by the paper's algorithm 3, line by line, in float64."""
    rows, columns = gradients[0].shape
    moment = np.zeros((rows, columns))
    square = np.zeros((rows, columns))
    left = np.zeros((rows, rows))
    right = np.zeros((columns, columns))
    q_left = np.eye(rows)
    q_right = np.eye(columns)
    updates = []
    for step, grad in enumerate(gradients, 1):
        turned = q_left.T @ grad @ q_right
        moment = b1 * moment + (1 - b1) * grad
        square = b2 * square + (1 - b2) * turned**2
        mean = (q_left.T @ moment @ q_right) / (1 - b1**step)
        normal = mean / (np.sqrt(square / (1 - b2**step)) + eps)
        updates.append(q_left @ normal @ q_right.T)
        left = b2 * left + (1 - b2) * grad @ grad.T
        right = b2 * right + (1 - b2) * grad.T @ grad
        if step % frequency == 0:
            if sides[0]:
                q_left, order = power_iteration(left, q_left)
                square = square[order]
            if sides[1]:
                q_right, order = power_iteration(right, q_right)
                square = square[:, order]
    return updates


def power_iteration(statistic, basis):
    """Algorithm 4, with columns in the order of their eigenvalues and the shift."""
    powered = statistic @ basis
    values = np.array([basis[:, j] @ powered[:, j] for j in range(len(basis))])
    order = np.argsort(-values, kind="stable")
    return np.linalg.qr((powered + SHIFT * values.max() * basis)[:, order])[0], order


def gradients_of(shape, steps=8, seed=0):
    rng = np.random.default_rng(seed)
    # Of unlike sizes, so that eigenvalues lie apart.
    scale = np.linspace(1, 3, shape[-2])[:, None] * np.linspace(1, 2, shape[-1])
    return [scale * rng.standard_normal(shape) for _ in range(steps)]


def run(config, gradients):
    """Return the updates of each step and the last state."""
    optimizer = make_optimizer(config)
    state = optimizer.init(gradients[0])
    step = jax.jit(optimizer.update)
    updates = []
    for grads in gradients:
        update, state = step(grads, state, grads)
        updates.append(update)
    return updates, state


@pytest.mark.parametrize("longest", [100, 7])
def test_updates_equal_the_paper_written_out(longest):
    # (L, D, N, H): a matrix of 6 x 8 in each of two layers; (L, E, F, D): of 7 x 6 in each expert.
    query = gradients_of((2, 6, 8))
    experts = gradients_of((2, 3, 7, 6), seed=1)
    trees = [
        {
            "blocks": {
                "attention": {"w_q_DNH": np.float32(q.reshape(2, 6, 2, 4))},
                "mlp": {"w_out_EFD": np.float32(e)},
            }
        }
        for q, e in zip(query, experts, strict=True)
    ]
    config = dataclasses.replace(SOAP, max_precond_dim=longest)
    updates, state = run(config, trees)
    for layer in range(2):
        # 8 is above a longest side of 7.
        expected = by_hand([q[layer] for q in query], sides=(True, longest > 7))
        for step, update in enumerate(updates):
            found = update["blocks"]["attention"]["w_q_DNH"][layer].reshape(6, 8)
            np.testing.assert_allclose(found, expected[step], atol=2e-4, err_msg=str(step))
        for expert in range(3):
            expected = by_hand([e[layer, expert] for e in experts])
            found = [update["blocks"]["mlp"]["w_out_EFD"][layer, expert] for update in updates]
            np.testing.assert_allclose(found, expected, atol=2e-4)
    # The names of the state end in the dims by which the mesh splits it.
    names = {name.rpartition(".statistics.")[2]: x.shape for name, x in flatten(state).items()}
    assert names["blocks.attention.w_q_DJ"] == (2, 6, 6)
    assert ("blocks.attention.w_q_NHU" in names) == (longest > 7)
    assert names["blocks.mlp.w_out_EFU"] == (2, 3, 7, 7)
    assert names["blocks.mlp.w_out_EDJ"] == (2, 3, 6, 6)


def test_steps_before_the_first_turn_are_those_of_adamw():
    grads = [{"blocks": {"w_in_DF": np.float32(g)}} for g in gradients_of((2, 6, 8), steps=5)]
    soap, _ = run(SOAP, grads)
    adam, _ = run(dataclasses.replace(SOAP, name="adamw"), grads)
    apart = [
        float(abs(a["blocks"]["w_in_DF"] - b["blocks"]["w_in_DF"]).max())
        for a, b in zip(soap, adam, strict=True)
    ]
    assert max(apart[:3]) < 1e-6 and min(apart[3:]) > 0.1


def test_bases_become_the_eigenvectors():
    # The same gradient again and again, of full rank.
    grad = gradients_of((1, 6, 6), steps=1)[0]
    grads = [{"blocks": {"w_in_DF": np.float32(grad)}}] * 120
    _, state = run(dataclasses.replace(SOAP, precondition_frequency=1), grads)
    flat = flatten(state)
    for side, matrix in (("DJ", grad[0] @ grad[0].T), ("FU", grad[0].T @ grad[0])):
        basis = next(
            np.asarray(x, np.float64)[0]
            for name, x in flat.items()
            if f"bases.blocks.w_in_{side}" in name
        )
        np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-5)
        diagonal = basis.T @ matrix @ basis
        values = np.linalg.eigvalsh(matrix)[::-1]
        np.testing.assert_allclose(np.diag(diagonal), values, rtol=1e-2, atol=1e-3)
        assert abs(diagonal - np.diag(np.diag(diagonal))).max() < 2e-2 * values[0]


@pytest.mark.parametrize("rank", [1, 3])
def test_rounding_does_not_choose_the_bases(rank):
    """Gradients of a low rank leave most eigenvectors open; a mesh rounds differently."""
    rng = np.random.default_rng(0)
    clean = [rng.standard_normal((1, 16, rank)) @ rng.standard_normal((rank, 24)) for _ in range(9)]
    noise = [grad * (1 + 2e-7 * rng.standard_normal(grad.shape)) for grad in clean]
    one, other = (
        run(SOAP, [{"blocks": {"w_in_DF": np.float32(grad)}} for grad in grads])[0]
        for grads in (clean, noise)
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a["blocks"]["w_in_DF"], b["blocks"]["w_in_DF"], atol=2e-2)


@pytest.mark.parametrize(
    ("sizes", "zero"),
    [
        ({"data": 8}, 1),
        pytest.param({"data": 2, "tensor": 4}, 3, marks=pytest.mark.slow),
        ({"pipe": 2, "data": 2, "tensor": 2}, 1),
        ({"data": 2, "expert": 2, "tensor": 2}, 1),
        pytest.param({"data": 2, "tensor": 2}, 0, marks=pytest.mark.slow),
    ],
)
def test_the_state_is_split_as_its_parameter_and_gives_the_same_updates(sizes, zero):
    config = MeshConfig(zero=zero, **sizes)
    mesh = make_mesh(config, jax.devices()[: math.prod(sizes.values())])
    names = {"w_q_DNH": (2, 16, 4, 2), "w_out_EFD": (2, 4, 8, 16)}
    rng = np.random.default_rng(0)
    trees = [
        {"blocks": {name: np.float32(rng.standard_normal(shape)) for name, shape in names.items()}}
        for _ in range(5)
    ]
    optimizer = make_optimizer(dataclasses.replace(SOAP, precondition_frequency=2), mesh)
    plan = shardings_of(jax.eval_shape(optimizer.init, trees[0]), mesh, zero)
    specs = {name: x.spec for name, x in flatten(plan).items() if ".bases." in name}
    split = ("data", "expert") if zero else None
    assert {name.rpartition(".")[2]: spec for name, spec in specs.items()} == {
        "w_q_DJ": P("pipe", split, None),
        "w_q_NHU": P("pipe", "tensor", None, split),
        "w_out_EFU": P("pipe", "expert", "tensor", split and split[0]),
        "w_out_EDJ": P("pipe", "expert", split and split[0], None),
    }
    params = shardings_of(trees[0], mesh, zero)
    state = jax.device_put(optimizer.init(trees[0]), plan)
    grads = jax.device_put(trees[0], params)
    step = jax.jit(optimizer.update, out_shardings=(params, plan)).lower(grads, state, grads)
    step = step.compile()
    # Each device factorizes one of the two layers, and the experts that it has.
    factorized = [line for line in step.as_text().splitlines() if "%geqrf" in line.split("=")[0]]
    assert len(factorized) == 4 and all("f32[1,1," in line for line in factorized)
    alone, _ = run(dataclasses.replace(SOAP, precondition_frequency=2), trees)
    for tree, expected in zip(trees, alone, strict=True):
        grads = jax.device_put(tree, params)
        updates, state = step(grads, state, grads)
        for one, many in zip(*map(jax.tree.leaves, (expected, updates)), strict=True):
            np.testing.assert_allclose(many, one, atol=2e-3)


def test_gradients_of_zero_change_nothing():
    zeros = {"blocks": {"w_in_DF": jnp.zeros((1, 4, 6))}}
    updates, state = run(SOAP, [zeros] * 4)
    for leaf in jax.tree.leaves([updates, state]):
        assert np.isfinite(leaf).all()
    assert all(not update["blocks"]["w_in_DF"].any() for update in updates)


def test_a_model_has_soap_for_its_matrices_alone():
    model = ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=8,
        moe=MoEConfig(num_moe_experts=4),
    )
    params = init_parameters(model, seed=0)
    state = flatten(jax.eval_shape(make_optimizer(SOAP).init, params))
    turned = {name.rpartition(".")[2] for name in state if ".statistics." in name}
    assert turned == {
        *("w_q_DJ", "w_q_NHU", "w_k_DJ", "w_k_KHU", "w_v_DJ", "w_v_KHU", "w_o_NHU", "w_o_DJ"),
        *("w_router_DJ", "w_router_EJ", "w_in_EDJ", "w_in_EFU", "w_out_EFU", "w_out_EDJ"),
    }
