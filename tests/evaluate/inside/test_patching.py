"""Patching: everything recovers the clean prompt, nothing does not; one layer by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.evaluate.inside.patching import (
    EVERY,
    NOWHERE,
    measure_patches,
    patch_everywhere,
)
from mtnlg_jax.evaluate.inside.record import POINTS, RESIDUAL
from mtnlg_jax.model.attention import attention
from mtnlg_jax.model.transformer import Transformer

CLEAN = np.array([3, 9, 4, 7, 1])
CORRUPT = np.array([3, 9, 8, 7, 1])
ANSWERS = (5, 6)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=32,
        max_position_embeddings=8,
        init_method_std=0.5,
    )
    return nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()


def test_everything_recovers_all_and_nothing_recovers_nothing(model):
    logits = np.asarray(model(jnp.asarray(np.stack([CLEAN, CORRUPT]))))[:, -1]
    wanted = logits[:, ANSWERS[0]] - logits[:, ANSWERS[1]]
    residual = POINTS.index(RESIDUAL)
    patches = [[residual, 0, EVERY], [0, NOWHERE, 0], [1, NOWHERE, EVERY]]
    clean, corrupt, found = measure_patches(model, CLEAN, CORRUPT, ANSWERS, patches, batch=2)
    np.testing.assert_allclose([clean, corrupt], wanted, atol=1e-5)
    np.testing.assert_allclose(found, [clean, corrupt, corrupt], atol=1e-5)


def test_the_table_agrees_with_the_causal_structure(model):
    found = patch_everywhere(model, CLEAN, CORRUPT, ANSWERS, batch=7)
    assert found.recovered_PLS.shape == (3, 2, 5)
    # Before the first token that differs both passes are alike.
    np.testing.assert_allclose(found.recovered_PLS[:, :, :2], 0, atol=1e-4)
    # The input of the first layer differs in one position alone, so this patch is the clean prompt.
    assert found.recovered_PLS[0, 0, 2] == pytest.approx(1, abs=1e-4)
    # In the last layer, only the last position reaches the logits.
    assert np.abs(found.recovered_PLS[1:, 1, 2:4]).max() < 1e-4
    assert np.abs(found.recovered_PLS[1:, 1, 4]).max() > 1e-2


def test_a_patch_by_hand(model):
    """Patch the output of the last MLP at the last position: it is added to the residual stream."""
    graph, stacked = nnx.split(model.blocks)

    def halves(tokens):
        x = model.embed(jnp.asarray(tokens)[None], jnp.arange(5)[None])
        for layer in range(2):
            block = nnx.merge(graph, jax.tree.map(lambda w, layer=layer: w[layer], stacked))
            outputs = []

            def keep(y, half, outputs=outputs):
                outputs.append(y)
                return y

            x = block(x, jnp.arange(5)[None], attention, keep)
        return x[0, -1], outputs[1][0, -1]

    clean, clean_mlp = halves(CLEAN)
    corrupt, corrupt_mlp = halves(CORRUPT)
    logits = model.head().logits(model.normed((corrupt - corrupt_mlp + clean_mlp)[None, None]))
    wanted = float(logits[0, 0, ANSWERS[0]] - logits[0, 0, ANSWERS[1]])
    found = measure_patches(model, CLEAN, CORRUPT, ANSWERS, [[2, 1, 4]])[2]
    assert found[0] == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted - measure_patches(model, CLEAN, CORRUPT, ANSWERS, [[0, 0, 0]])[1]) > 1e-3


def test_prompts_that_do_not_differ_are_refused(model):
    with pytest.raises(ValueError, match="nothing to recover"):
        patch_everywhere(model, CLEAN, CLEAN, ANSWERS)
