import jax
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.evaluate.inside.logit_lens import look_inside
from mtnlg_jax.model.tensor_products import multiply_each
from mtnlg_jax.model.transformer import Transformer


# Shorter and longer than the width of a head.
@pytest.mark.parametrize("length", [pytest.param(5, marks=pytest.mark.slow), 40])
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_logits_and_attention_agree_with_the_model(length, causal):
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=64,
        max_position_embeddings=64,
        init_method_std=0.3,
    )
    model = nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()  # one program, not many
    tokens = np.random.default_rng(0).integers(0, 64, length)
    inside = look_inside(model, tokens, causal)
    assert inside.attention_LNST.shape == (2, 4, length, length) and inside.logits_LSV.shape == (
        3,
        length,
        64,
    )
    np.testing.assert_allclose(inside.attention_LNST.sum(-1), 1, atol=1e-5)
    later = np.triu(np.ones((length, length), bool), 1)
    assert (np.abs(np.asarray(inside.attention_LNST)[..., later]).max() == 0) == causal
    np.testing.assert_allclose(
        inside.logits_LSV[-1], model(tokens[None], causal=causal)[0], rtol=1e-4, atol=1e-4
    )
    first = jax.nn.softmax(inside.logits_LSV[0])
    assert np.abs(first - jax.nn.softmax(inside.logits_LSV[-1])).max() > 1e-3


def test_attention_weights_equal_a_direct_computation():
    config = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=32,
        max_position_embeddings=8,
        init_method_std=0.5,
    )
    model = nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(1)))()
    tokens = np.arange(6)
    block = nnx.merge(
        nnx.split(model.blocks)[0], jax.tree.map(lambda w: w[0], nnx.split(model.blocks)[1])
    )
    x = model.embed(tokens[None], np.arange(6)[None])
    products = multiply_each(block.norm_1(x), block.attention.factors())
    q, k, _ = (
        np.asarray(y, np.float64)[0] for y in block.attention.project(products, np.arange(6)[None])
    )
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(8)
    scores[:, np.triu(np.ones((6, 6), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(look_inside(model, tokens).attention_LNST[0], weights, atol=1e-5)
