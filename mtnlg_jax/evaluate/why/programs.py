"""Gradients of a replayed step, on the mesh of the run.

Loss and gradients are those of the train step (`train.gradients`), with its dropout.
"""

# Shapes: L layers

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtnlg_jax.config import Config
from mtnlg_jax.model.params import name_of
from mtnlg_jax.parallel.mesh import dims_of
from mtnlg_jax.train import lora
from mtnlg_jax.train.gradients import make_loss_and_gradients


def squares(gradients: Any) -> dict[str, jax.Array]:
    """Return the sum of squares of each parameter by its name: (L,) of stacked ones, else ()."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        stacked = dims_of(path).startswith("L")
        axes = tuple(range(1 if stacked else 0, leaf.ndim))
        found[name_of(path)] = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axes)
    return found


def dot(one: Any, other: Any) -> jax.Array:
    """Return the scalar product of two trees."""
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), one, other)
    return sum(jax.tree.leaves(products), jnp.float32(0))


def make_gradients(config: Config, mesh: Mesh, causal: bool, options: dict, sparse: bool):
    """Return the jitted (state.params, batch, micro-batches, key, *teacher) -> (loss, gradients,
    `squares` of them).

    ``options`` are those of `init_from.kinds_of_steps`.
    """
    function = make_loss_and_gradients(config, mesh, causal, sparse=sparse, **options)

    @jax.jit
    def run(params, batch, count, key, *teacher):
        loss, gradients = function(lora.computed(params, config), batch, count, key, *teacher)
        return loss, gradients, squares(gradients)

    return run


@jax.jit
def measured_part(part: Any, whole: Any, share: jax.Array) -> tuple[jax.Array, ...]:
    """Return of a part of a batch: the norm of its part of the gradient, its share of the squared
    norm of the whole one (shares of all parts add up to 1), and the norm without it.

    ``part`` is what the part adds to the mean gradient ``whole``, with ``share`` of its weight.
    """
    rest = jax.tree.map(lambda w, p: (w - p) / jnp.maximum(1 - share, 1e-9), whole, part)
    norm = jnp.sqrt(dot(part, part))
    return norm, dot(part, whole) / jnp.maximum(dot(whole, whole), 1e-30), jnp.sqrt(dot(rest, rest))


@functools.partial(jax.jit, donate_argnums=0)
def added(total: Any, part: Any, scale: jax.Array) -> Any:
    """Return ``total`` + ``scale`` x ``part``; ``total`` is donated."""
    return jax.tree.map(lambda t, p: t + scale * p, total, part)
