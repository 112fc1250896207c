"""Check that kernels, which XLA cannot partition, are split over an automatic mesh, each part with
what belongs to its rows and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.model.kernels.over_mesh import split_cache, split_heads

SLOPES = np.float32([0.5, 0.25, 0.1, 0.01])


@pytest.fixture
def over_mesh():
    """Return a function that runs another one on two parts of the rows and two of the heads."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )

    def run(function, *arrays):
        with jax.set_mesh(mesh):
            return [np.asarray(x) for x in jax.jit(function)(*arrays)]

    return run


@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["", "slopes"])
def test_slopes_are_split_with_their_heads(over_mesh, slopes):
    q = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4, 1)
    k = q[:, :, ::2]
    lengths = np.int32([2, 3])
    parts = []

    def attend(q, k, v, arrays, slopes):
        parts.append(
            (q.shape, k.shape, arrays[0].shape, slopes if slopes is None else slopes.shape)
        )
        factors = jnp.ones(q.shape[2]) if slopes is None else slopes
        return q * factors[None, None, :, None] + arrays[0][:, None, None, None], q[..., 0].mT

    def function(q, k, lengths):
        return split_heads(attend, q, k, k, (lengths,), slopes)

    out, lse = over_mesh(function, q, k, lengths)
    factors = np.ones(4) if slopes is None else slopes
    np.testing.assert_allclose(out, q * factors[:, None] + lengths[:, None, None, None], rtol=1e-6)
    np.testing.assert_array_equal(lse, q[..., 0].mT)
    assert parts[-1] == ((1, 3, 2, 1), (1, 3, 1, 1), (1,), None if slopes is None else (2,))


def test_positions_are_split_with_their_rows_and_slopes_with_their_heads(over_mesh):
    q = np.arange(2 * 4, dtype=np.float32).reshape(2, 4, 1)
    cache = np.ones((2, 2, 5, 1), np.float32)
    lengths = np.int32([2, 3])
    positions = np.int32([7, 9])
    parts = []

    def attend(q, k, v, lengths, scales, positions, slopes):
        parts.append((q.shape, k.shape, lengths.shape, scales, positions.shape, slopes.shape))
        return q * slopes[None, :, None] + (lengths + positions)[:, None, None], q[..., 0]

    def function(q, cache, lengths, positions):
        return split_cache(attend, q, cache, cache, lengths, (None, None), positions, SLOPES)

    out, lse = over_mesh(function, q, cache, lengths, positions)
    want = q * SLOPES[None, :, None] + (lengths + positions)[:, None, None]
    np.testing.assert_allclose(out, want, rtol=1e-6)
    np.testing.assert_array_equal(lse, q[..., 0])
    assert parts[-1] == ((1, 2, 1), (1, 1, 5, 1), (1,), (None, None), (1,), (2,))
