"""Gradients and losses by token of a replayed step, on the mesh of the run.

Loss and gradients are those of the train step (`train.gradients`), with its dropout.
"""

# Shapes: M micro-batches, G of them that one pipeline stage embeds, B rows, S positions, D width,
# L layers

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config
from mtnlg_jax.model.params import name_of, split_params
from mtnlg_jax.parallel.collectives import axis_index, axis_size, vary
from mtnlg_jax.parallel.mesh import BATCH, dims_of, specs_of
from mtnlg_jax.parallel.pipeline import circular, to_rounds
from mtnlg_jax.train import lora
from mtnlg_jax.train.gradients import batch_specs, chunk_of, make_loss_and_gradients, over_mesh
from mtnlg_jax.train.micro_batches import MicroBatches
from mtnlg_jax.train.weights import make_weights


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


def make_token_losses(config: Config, mesh: Mesh, causal: bool) -> Callable:
    """Return the jitted (state.params, batch, key) -> losses by token (M, B, S), S in zigzag order.

    They are the cross entropies of the step, with its dropout. M is a multiple of mesh.pipe.
    """
    weights = make_weights(config)

    def micro_batches_of(batch, key):
        return MicroBatches(config, causal, batch, 1.0, jax.random.wrap_key_data(key))

    def plain(params, batch, key):
        params, batch = vary((params, batch))
        rest, blocks = split_params(weights.at_start(params))
        micro_batches = micro_batches_of(batch, key)

        def one(m):
            x_BSD = micro_batches.embed(rest, m[None])[0]
            x_BSD = micro_batches.layers(rest, blocks, 0, m, x_BSD)
            return micro_batches.token_losses(rest, m, x_BSD)

        return _on_all(lax.map(one, jnp.arange(len(micro_batches))))

    def pipelined(params, batch, key):
        params, batch = vary((split_params(params), batch))
        blocks = to_rounds(params.blocks, config.mesh.virtual_pipe)
        rest, blocks = weights.at_start(params._replace(blocks=blocks))
        micro_batches = micro_batches_of(batch, key)
        size = axis_size("pipe")
        # Those that this stage embeds and finishes, as in `train.evaluate.make_eval`.
        mine = jnp.arange(len(micro_batches) // size) * size + axis_index("pipe")
        y_GBSD = circular(
            lambda round, m, x: micro_batches.layers(rest, *chunk_of(blocks, round), m, x),
            vary(micro_batches.embed(rest, mine)),
            config.mesh.virtual_pipe,
        )
        found = lax.map(lambda args: micro_batches.token_losses(rest, *args), (mine, y_GBSD))
        empty = jnp.zeros((len(micro_batches), *found.shape[1:]), found.dtype)
        return _on_all(vary(empty).at[mine].set(found))

    function = pipelined if mesh.shape["pipe"] > 1 else plain
    specs = specs_of(lora.abstract_computed(config), config.mesh.zero, mesh.shape["tensor"])
    in_specs = (specs, batch_specs(config.model), P())
    run = over_mesh(function, mesh, in_specs, BATCH)
    return jax.jit(lambda params, batch, key: run(lora.computed(params, config), batch, key))


def _on_all(losses: jax.Array) -> jax.Array:
    """Give all devices along pipe and tensor the losses that one of them has, and others lack or
    have as well."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return losses
    first = axis_index("tensor") == 0
    return lax.psum(jnp.where(first, vary(losses), 0.0), ("pipe", "tensor"))


@functools.partial(jax.jit, donate_argnums=0)
def added(total: Any, part: Any, scale: jax.Array) -> Any:
    """Return ``total`` + ``scale`` x ``part``; ``total`` is donated."""
    return jax.tree.map(lambda t, p: t + scale * p, total, part)
