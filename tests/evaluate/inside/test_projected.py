"""Projected gradients: equal to projections of whole gradients; a verbatim passage ranks first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import ModelConfig, MoEConfig
from mtnlg_jax.evaluate.inside.influence import influences
from mtnlg_jax.evaluate.inside.projected import (
    draw_projections,
    example_loss,
    examples_of,
    no_insertion,
    project_gradients,
    projecting_config,
)
from mtnlg_jax.model.params import names_of
from mtnlg_jax.model.transformer import abstract_model, init_parameters

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    vocab_size=64,
    max_position_embeddings=12,
    init_method_std=0.3,
)


def _rows(count, length, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 64, length + 1), np.ones(length, np.float32)) for _ in range(count)]


def _whole(model, params, row):
    """Return the loss of a row and its gradient by every parameter, by its name."""
    ids, weights = row

    def loss(params):
        logits = nnx.merge(abstract_model(model)[0], params)(jnp.asarray(ids[:-1])[None])[0]
        log_probs = jax.nn.log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
        return -(log_probs * weights).sum() / weights.sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), names_of(gradients)


def test_projections_of_gradients_without_the_gradients():
    config = projecting_config(MODEL, rank=3, seed=1)
    params = init_parameters(MODEL, 0)
    projections = draw_projections(config)
    rows = [*_rows(2, 9), (np.arange(10), np.array([0, 1] * 4 + [1], np.float32))]
    losses, found = project_gradients(config, params, projections, examples_of(rows, 9), batch=2)
    matrices = {"in": "mlp.w_in_DF", "k": "attention.w_k_DKH", "o": "attention.w_o_NHD"}
    matrices |= {"out": "mlp.w_out_FD", "q": "attention.w_q_DNH", "v": "attention.w_v_DKH"}
    assert found.shape == (3, 2 * len(matrices), 9)
    for row, loss, got in zip(rows, losses, found, strict=True):
        value, gradients = _whole(MODEL, params, row)
        assert loss == pytest.approx(value, rel=1e-5)
        wanted = []
        for target in sorted(matrices):
            a = next(x for name, x in projections.items() if name.startswith(f"lora_a_{target}_"))
            b = next(x for name, x in projections.items() if name.startswith(f"lora_b_{target}_"))
            for layer in range(2):
                gradient = np.asarray(gradients["blocks." + matrices[target]])[layer]
                first = np.asarray(a[layer]).reshape(-1, 3)
                second = np.asarray(b[layer]).reshape(3, -1)
                matrix = gradient.reshape(first.shape[0], second.shape[1])
                wanted.append((first.T @ matrix @ second.T).ravel())
        np.testing.assert_allclose(got, wanted, atol=2e-6 * np.abs(wanted).max() + 1e-7)


@pytest.mark.slow
def test_experts_are_projected_too():
    moe = MoEConfig(num_moe_experts=2, moe_router_topk=1)
    model = ModelConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=8,
        moe=moe,
    )
    config = projecting_config(model, rank=2, seed=0)
    losses, found = project_gradients(
        config, init_parameters(model, 0), draw_projections(config), examples_of(_rows(2, 6), 6)
    )
    assert np.isfinite(losses).all() and (np.abs(found).max((0, 2)) > 0).all()


def test_a_step_on_a_passage_changes_the_loss_by_its_influence():
    """TracIn's first order: train the inserted X on the passage, and look at the query's loss."""
    config = projecting_config(MODEL, rank=3, seed=1)
    params = init_parameters(MODEL, 0)
    projections = draw_projections(config)
    query, passage = (examples_of(_rows(1, 9, seed), 9) for seed in (1, 2))
    _, gradients = project_gradients(
        config, params, projections, examples_of([*_rows(1, 9, 1), *_rows(1, 9, 2)], 9)
    )

    def loss(inserted, examples):
        example = tuple(array[0] for array in examples)
        return example_loss(config, params, projections, inserted, example)

    zeros = no_insertion(config, projections)
    step = jax.jit(jax.grad(loss))(zeros, passage)
    rate = 1e-3
    moved = jax.tree.map(lambda x, g: x - rate * g, zeros, step)
    change = float(loss(moved, query) - loss(zeros, query))
    found = influences(gradients[0], gradients[1:], damping=None)
    assert change == pytest.approx(-rate * found.influence[0], rel=0.05)


def test_the_second_moment_by_hand():
    rng = np.random.default_rng(0)
    passages = rng.normal(size=(5, 2, 3))
    query = rng.normal(size=(2, 3))
    found = influences(query, passages, damping=0.5)
    wanted = np.zeros(5)
    own = np.zeros(5)
    for block in range(2):
        moment = sum(np.outer(p[block], p[block]) for p in passages) / 5
        inverse = np.linalg.inv(moment + 0.5 * np.trace(moment) / 3 * np.eye(3))
        wanted += [query[block] @ inverse @ p[block] for p in passages]
        own += [p[block] @ inverse @ p[block] for p in passages]
    np.testing.assert_allclose(found.influence, wanted)
    np.testing.assert_allclose(found.relative, wanted / np.sqrt(own))
    with pytest.raises(ValueError, match="damping=0"):
        influences(query, passages, damping=0)


def test_the_passage_with_the_continuation_verbatim_ranks_first():
    model = dataclasses.replace(MODEL, hidden_size=32, num_attention_heads=4)
    config = projecting_config(model, rank=8, seed=0)
    rows = _rows(24, 11, seed=3)
    queries = [
        (rows[verbatim][0][:10], np.array([0] * 5 + [1] * 4, np.float32)) for verbatim in (5, 17)
    ]
    _, gradients = project_gradients(
        config,
        init_parameters(model, 0),
        draw_projections(config),
        examples_of([*queries, *rows], 11),
        batch=26,
    )
    for query, verbatim in zip(gradients, (5, 17), strict=False):
        found = influences(query, gradients[2:])
        assert np.argmax(found.relative) == verbatim and found.influence[verbatim] > 0
