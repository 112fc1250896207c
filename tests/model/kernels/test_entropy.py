"""Check the entropy of attention against all weights at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.model.kernels.entropy import attention_entropy
from mtnlg_jax.model.positions import alibi_slopes

ROWS = 2
LENGTH = 12
HEADS = 4
WIDTH = 8


def longhand(q, k, *, causal, ids=None, window=None, softcap=None, slopes=None, sinks=None):
    """Entropies (B, N, S), one query at a time in float64."""
    found = np.zeros((ROWS, HEADS, LENGTH))
    for b, n, i in np.ndindex(*found.shape):
        scores = []
        for j in range(LENGTH):
            score = q[b, i, n] @ k[b, j, n // (HEADS // k.shape[2])] / np.sqrt(WIDTH)
            if softcap is not None:
                score = softcap * np.tanh(score / softcap)
            if slopes is not None:
                score += slopes[n] * (j - i)
            seen = j <= i if causal else True
            if window is not None:
                seen = seen and abs(i - j) < window
            if ids is not None:
                seen = seen and ids[b, i] == ids[b, j]
            if seen:
                scores.append(score)
        if sinks is not None:
            scores.append(sinks[n])
        weights = np.exp(scores) / np.exp(scores).sum()
        found[b, n, i] = -(weights * np.log(weights)).sum()
    return found


def inputs(kv_heads):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(ROWS, LENGTH, HEADS, WIDTH)).astype(np.float32) * 2
    k = rng.normal(size=(ROWS, LENGTH, kv_heads, WIDTH)).astype(np.float32)
    ids = np.sort(rng.integers(0, 3, (ROWS, LENGTH)), 1).astype(np.int32)
    return q, k, ids


# One query at a time, blocks that do not divide the queries, and all queries.
@pytest.mark.parametrize("most", [1, ROWS * HEADS * LENGTH * 5, 2**24])
def test_blocks_of_any_size_give_the_entropies_of_all_weights(most):
    q, k, ids = inputs(kv_heads=2)
    wanted = longhand(q, k, causal=True, ids=ids)
    got = jax.jit(lambda q, k, ids: attention_entropy(q, k, segment_ids=ids, most=most))(q, k, ids)
    np.testing.assert_allclose(got, wanted, atol=2e-6)
    # The first token of a text sees itself alone, and all others less than the ln of what they see.
    assert np.asarray(got)[:, :, 0].max() == 0
    assert (np.asarray(got) <= np.log(1 + np.arange(LENGTH)) + 1e-6).all()


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"causal": True, "window": 3},
        {"causal": False, "window": 3, "softcap": 2.0},
        {"causal": True, "slopes": np.asarray(alibi_slopes(HEADS))},
        {"causal": True, "sinks": np.array([0.0, 1.0, -2.0, 3.0])},
    ],
    ids=lambda options: "+".join(options),
)
def test_masks_and_options_are_those_of_attention(options):
    q, k, _ = inputs(kv_heads=4)
    names = {"slopes": "alibi_slopes"}
    given = {names.get(name, name): value for name, value in options.items()}
    if "sinks" in given:  # a parameter, and not a constant as slopes are
        given["sinks"] = jnp.asarray(given["sinks"])
    got = jax.jit(lambda q, k: attention_entropy(q, k, **given))(q, k)
    np.testing.assert_allclose(got, longhand(q, k, **options), atol=2e-6)


def test_no_array_has_the_scores_of_all_queries():
    length = 4096
    q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.bfloat16)
    program = jax.jit(lambda q: attention_entropy(q, q, most=2**20)).lower(q).compile()
    # All scores take 128 MiB in float32.
    assert program.memory_analysis().temp_size_in_bytes < 32 * 2**20
