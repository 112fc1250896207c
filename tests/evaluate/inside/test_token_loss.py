"""Losses by token: their mean is that of evaluate_texts, also of texts beyond the context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.evaluate.inside.token_loss import token_losses
from mtnlg_jax.evaluate.perplexity import evaluate_text
from mtnlg_jax.model.transformer import Transformer

TEXT = "the whale swam north again and the ship sailed south " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 9, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=16,
        init_method_std=0.4,
    )
    return nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()


def test_the_mean_is_the_loss_of_the_text(model, tokenizer):
    tokens = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    assert len(tokens) > 2 * 16
    found = token_losses(model, tokens, batch=3)
    assert len(found.losses) == len(tokens) - 1
    wanted = evaluate_text(model, tokenizer, TEXT)
    assert found.losses.mean() == pytest.approx(wanted.loss, rel=1e-5)


def test_ranks_and_guesses_of_a_short_text(model, tokenizer):
    tokens = np.array([tokenizer.bos_id, *tokenizer.encode("the whale swam")])
    found = token_losses(model, tokens, guesses=2)
    logits = np.asarray(model(jnp.asarray(tokens)[None]))[0, :-1]
    order = np.argsort(-logits, -1)
    np.testing.assert_array_equal(found.guesses, order[:, :2])
    ranks = [list(row).index(token) for row, token in zip(order, tokens[1:], strict=True)]
    np.testing.assert_array_equal(found.ranks, ranks)
    probabilities = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(
        np.exp(-found.losses), probabilities[np.arange(len(tokens) - 1), tokens[1:]], rtol=1e-4
    )
    np.testing.assert_allclose(found.probabilities[:, 0], probabilities.max(-1), rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "words"), [({"stride": 17}, "stride=17"), ({"tokens": [1]}, "empty")]
)
def test_bad_input(model, given, words):
    with pytest.raises(ValueError, match=words):
        token_losses(model, **({"tokens": [1, 2, 3]} | given))
