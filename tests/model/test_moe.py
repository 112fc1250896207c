"""Check the experts against a loop over tokens, and the router's losses against autodiff."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import ModelConfig, MoEConfig
from mtnlg_jax.model.grouped import grouped_product
from mtnlg_jax.model.moe import Moe, with_penalty
from mtnlg_jax.model.parts import activate

EXPERTS = 5
CONFIG = ModelConfig(
    num_layers=1,
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=24,
    vocab_size=32,
    activation="swiglu",
    bias=("mlp",),
    moe=MoEConfig(EXPERTS, 2, moe_router_bias=True),
)


def experts_of(**changes):
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, **changes))
    module = Moe(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for _, leaf in nnx.to_flat_state(nnx.state(module)):
        leaf[...] = jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32)
    return module


def rows():
    return jnp.asarray(np.random.default_rng(2).normal(0, 1, (2, 7, 16)), jnp.float32)


def longhand(module, x_D):
    """Return the output for one token, in NumPy, expert by expert."""
    config = module.config
    logits_E = x_D @ module.w_router_DE[...] + module.b_router_E[...]
    if config.moe_router_score_function == "sigmoid":
        scores_E = 1 / (1 + np.exp(-logits_E))
    else:
        scores_E = np.exp(logits_E) / np.exp(logits_E).sum()
    chosen = np.argsort(-np.asarray(logits_E))[: config.moe_router_topk]
    weights = np.asarray(scores_E)[chosen]
    if not config.moe_router_pre_softmax or config.moe_router_norm:
        weights = weights / weights.sum()
    total = 0
    for expert, weight in zip(chosen, weights, strict=True):
        h = x_D @ module.w_in_EDF[...][expert] + module.b_in_EF[...][expert]
        gate = x_D @ module.w_gate_EDF[...][expert] + module.b_gate_EF[...][expert]
        y_D = activate("swiglu", h, gate) @ module.w_out_EFD[...][expert]
        total = total + weight * (y_D + module.b_out_ED[...][expert])
    return total * config.moe_router_topk_scaling_factor


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_router_norm": False},
        {"moe_router_pre_softmax": False},
        {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
        {"moe_router_topk": 4},
    ],
)
def test_experts_equal_a_loop_over_tokens(changes):
    module = experts_of(**changes)
    x_BSD = rows()
    got = module(x_BSD)
    wanted = [[longhand(module, token) for token in row] for row in x_BSD]
    np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_no_token_is_dropped_if_all_choose_the_same_experts():
    module = experts_of()
    module.b_router_E[...] = jnp.asarray([50.0, 40.0, 0, 0, 0])
    x_BSD = rows()
    experts_TX, _ = module.route(module.router_logits(x_BSD.reshape(-1, 16)))
    assert (np.asarray(experts_TX) == [0, 1]).all()
    wanted = [[longhand(module, token) for token in row] for row in x_BSD]
    np.testing.assert_allclose(module(x_BSD), wanted, atol=2e-5)


def test_a_shared_expert_is_added_to_the_others():
    module = experts_of(moe_shared_expert_intermediate_size=8, moe_shared_expert_gate=True)
    x_BSD = rows()
    gate = jax.nn.sigmoid(x_BSD @ module.w_shared_DC[...])
    wanted = module(x_BSD)
    shared = gate * module.shared(x_BSD)
    module.shared = None
    assert np.abs(shared).max() > 0.1
    np.testing.assert_allclose(module(x_BSD) + shared, wanted, atol=1e-5)


def test_the_router_s_losses_add_to_gradients_and_not_to_the_output():
    module = experts_of(moe_aux_loss_coeff=0.3, moe_z_loss_coeff=0.02)
    graph, params = nnx.split(module)
    x_BSD = rows()
    weights_B = jnp.asarray([0.25, 0.75])

    def losses(params):
        """The losses written out, with the shares of visits as constants."""
        module = nnx.merge(graph, params)
        logits_TE = module.router_logits(x_BSD.reshape(-1, 16))
        chosen = jax.lax.top_k(logits_TE, 2)[1]
        total = 0.0
        for row in range(2):
            part = slice(7 * row, 7 * row + 7)
            share = jnp.bincount(chosen[part].reshape(-1), length=EXPERTS) / 14
            mean = jax.nn.softmax(logits_TE[part], -1).mean(0)
            z = jnp.square(jax.nn.logsumexp(logits_TE[part], -1)).mean()
            total += weights_B[row] * (0.3 * EXPERTS * (share * mean).sum() + 0.02 * z)
        return total

    def output(params, penalty_B):
        return jnp.sin(nnx.merge(graph, params)(x_BSD, penalty_B)).sum()

    both = jax.jit(jax.value_and_grad(output))
    plain, plain_gradients = both(params, None)
    got, gradients = both(params, weights_B)
    assert float(got) == float(plain)
    expected = jax.tree.map(jnp.add, plain_gradients, jax.jit(jax.grad(losses))(params))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradients, plain_gradients)
    assert max(jax.tree.leaves(moved)) > 1e-3
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_penalty_has_weight_1_whatever_multiplies_the_output():
    x = jnp.arange(3.0)
    gradient = jax.grad(lambda x: 5 * with_penalty(x, jnp.square(x).sum())[0])(x)
    np.testing.assert_allclose(gradient, [5.0, 2.0, 4.0])


def test_a_bias_of_balance_chooses_experts_and_does_not_weight_them():
    plain = experts_of(moe_router_score_function="sigmoid")
    module = experts_of(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    for name in ("w_router_DE", "b_router_E"):
        getattr(module, name)[...] = getattr(plain, name)[...]
    module.b_balance_E[...] = jnp.asarray([0.0, 5.0, 0.0, 5.0, 0.0])
    logits_TE = module.router_logits(rows().reshape(-1, 16))
    experts_TX, weights_TX = module.route(logits_TE)
    assert (np.sort(experts_TX, -1) == [1, 3]).all()
    scores = np.take_along_axis(np.asarray(jax.nn.sigmoid(logits_TE)), np.asarray(experts_TX), -1)
    np.testing.assert_allclose(weights_TX, scores / scores.sum(-1, keepdims=True), rtol=1e-6)
    module.b_balance_E[...] = jnp.zeros(EXPERTS)
    for one, other in zip(module.route(logits_TE), plain.route(logits_TE), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_loads_of_counted_rows_are_the_gradient_of_the_bias():
    module = experts_of(moe_router_enable_expert_bias=True)
    graph, params = nnx.split(module)
    x_BSD = rows()

    def output(params):
        return jnp.sin(nnx.merge(graph, params)(x_BSD, None, jnp.asarray([1.0, 0.0]))).sum()

    loads_E = jax.grad(output)(params)["b_balance_E"][...]
    chosen = module.route(module.router_logits(x_BSD[0]))[0]
    np.testing.assert_array_equal(loads_E, np.bincount(np.asarray(chosen).reshape(-1), minlength=5))


@pytest.mark.parametrize(
    ("sizes", "behind"), [([300, 0, 257, 64, 1, 130], 9), ([0, 5, 2], 0), ([0, 0], 1)]
)
def test_products_in_blocks_equal_a_product_for_each_expert(sizes, behind):
    rng = np.random.default_rng(0)
    rows = sum(sizes) + behind
    x_UI = jnp.asarray(rng.normal(size=(rows, 3)), jnp.float32)
    w_EIO = jnp.asarray(rng.normal(size=(len(sizes), 3, 2)), jnp.float32)
    d_UO = rng.normal(size=(rows, 2))
    # Rows behind the last group have no gradient.
    d_UO[sum(sizes) :] = 0
    ends = np.cumsum([0, *sizes])
    parts = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
    y_UO, back = jax.vjp(lambda x, w: grouped_product(x, w, jnp.asarray(sizes)), x_UI, w_EIO)
    d_x, d_w = back(jnp.asarray(d_UO, jnp.float32))
    for expert, part in enumerate(parts):
        np.testing.assert_allclose(y_UO[part], x_UI[part] @ w_EIO[expert], atol=1e-5)
        np.testing.assert_allclose(d_x[part], d_UO[part] @ w_EIO[expert].T, atol=1e-5)
        np.testing.assert_allclose(d_w[expert], x_UI[part].T @ d_UO[part], atol=1e-4)
