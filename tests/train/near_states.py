"""Training states whose every value follows from a step, for tests of one and of two processes."""

import jax
import numpy as np


def state_of(step: int, abstract):
    """Return a state with the structure, shapes and shardings of ``abstract``."""
    leaves, structure = jax.tree.flatten(abstract)

    def make(index, leaf):
        values = np.random.default_rng([step, index]).normal(size=leaf.shape) * 1000
        values = values.astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda part: values[part])

    return jax.tree.unflatten(structure, [make(*pair) for pair in enumerate(leaves)])


def check_equal(state, expected) -> None:
    """Check that the shards of this process are equal, bit by bit, and lie alike."""
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert a.sharding == b.sharding
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(x.data, y.data)
