"""Check the prefix of a model: its place, its projector and its patch encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import ModelConfig, Multipliers, PrefixConfig, validate_model
from mtnlg_jax.model.prefix import patches_of
from mtnlg_jax.model.transformer import Transformer, init_parameters

POSITIONS = 4
WIDTH = 16
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=WIDTH,
    num_attention_heads=2,
    vocab_size=64,
    max_position_embeddings=16,
    embedding_norm=True,
    multipliers=Multipliers(embedding=3.0),
    prefix=PrefixConfig(length=POSITIONS, width=WIDTH),
)
IMAGES = dataclasses.replace(MODEL, prefix=PrefixConfig(width=6, image_size=8, patch_size=4))


@pytest.mark.parametrize("causal", [True, False])
def test_a_prefix_of_embeddings_equals_the_tokens(causal):
    """The rows of the embedding table as features, by an identity, give the logits of the
    tokens."""
    model = Transformer(MODEL, rngs=nnx.Rngs(0))
    model.prefix.w_project_CD[...] = jnp.eye(WIDTH)
    tokens_BS = jax.random.randint(jax.random.key(1), (3, 10), 0, 64)
    features = model.tokens_VD[...][tokens_BS[:, :POSITIONS]]
    marks_BP = jnp.broadcast_to(-1 - jnp.arange(POSITIONS), (3, POSITIONS))
    marked_BS = jnp.concatenate([marks_BP, tokens_BS[:, POSITIONS:]], 1)
    wanted = model(tokens_BS, causal=causal)
    np.testing.assert_array_equal(model(marked_BS, causal=causal, prefix=features), wanted)
    # The order counts, so the test can fail.
    other = model(marked_BS, causal=causal, prefix=features[:, ::-1])
    assert jnp.abs(other - wanted).max() > 1e-3


def test_a_row_without_marks_ignores_its_prefix():
    model = Transformer(MODEL, rngs=nnx.Rngs(0))
    tokens_BS = jax.random.randint(jax.random.key(1), (2, 6), 0, 64)
    features = jnp.ones((2, POSITIONS, WIDTH))
    np.testing.assert_array_equal(model(tokens_BS, prefix=features), model(tokens_BS))


def test_patches_are_cut_row_by_row():
    image = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    found = patches_of(jnp.asarray(image), 2)
    assert found.shape == (2, 4, 12)
    for number, (top, left) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        wanted = image[:, top : top + 2, left : left + 2].reshape(2, -1)
        np.testing.assert_array_equal(found[:, number], wanted)


def test_the_patch_encoder_follows_its_formula():
    model = Transformer(IMAGES, rngs=nnx.Rngs(0))
    encoder = model.prefix
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    patches = np.asarray(patches_of(jnp.asarray(image), 4), np.float64) / 127.5 - 1
    inner = patches @ np.asarray(encoder.w_patch_IC[...], np.float64)
    inner = inner + np.asarray(encoder.positions_PC[...])
    gelu = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    wanted = gelu @ np.asarray(encoder.w_project_CD[...], np.float64)
    np.testing.assert_allclose(encoder(jnp.asarray(image)), wanted, atol=1e-6)


@pytest.mark.parametrize("model", [MODEL, IMAGES], ids=["features", "images"])
def test_the_parameters_of_a_prefix_are_counted(model):
    count = sum(leaf.size for leaf in jax.tree.leaves(init_parameters(model, seed=0)))
    assert model.parameter_count() == count
    text = dataclasses.replace(model, prefix=PrefixConfig())
    assert text.parameter_count() < count


def test_text_parameters_do_not_depend_on_a_prefix():
    """A model without a prefix draws the parameters that it always drew."""
    with_prefix = init_parameters(MODEL, seed=0)
    text = init_parameters(dataclasses.replace(MODEL, prefix=PrefixConfig()), seed=0)
    assert "prefix" not in text
    np.testing.assert_array_equal(text["tokens_VD"][...], with_prefix["tokens_VD"][...])


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (PrefixConfig(length=4), "model.prefix.width=0"),
        (PrefixConfig(width=4), "without positions"),
        (PrefixConfig(length=4, width=4, image_size=8), "set one of the two to 0"),
        (PrefixConfig(width=4, image_size=9, patch_size=4), "not divisible"),
        (PrefixConfig(length=15, width=4), "leaves no room for a text"),
        (PrefixConfig(width=4, image_size=8, image_channels=2), "image_channels=2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(prefix, words):
    with pytest.raises(ValueError, match=words):
        validate_model(dataclasses.replace(MODEL, prefix=prefix))
