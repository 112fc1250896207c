"""The loss of each token of a batch of a step, on the mesh of the run."""

# Shapes: M micro-batches, G of them that one pipeline stage embeds, B rows, S positions, D width

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config
from mtnlg_jax.model.params import split_params
from mtnlg_jax.parallel.collectives import axis_index, axis_size, vary
from mtnlg_jax.parallel.mesh import BATCH, specs_of
from mtnlg_jax.parallel.pipeline import circular, to_rounds
from mtnlg_jax.train import lora
from mtnlg_jax.train.gradients import batch_specs, chunk_of, over_mesh
from mtnlg_jax.train.micro_batches import MicroBatches
from mtnlg_jax.train.weights import make_weights


def make_token_losses(config: Config, mesh: Mesh, causal: bool) -> Callable:
    """Return the jitted (state.params, batch, key) -> losses by token (M, B, S), S in zigzag order.

    They are the cross entropies of the train step, with its dropout, on every device of the mesh.
    M is a multiple of mesh.pipe.
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
    # Whole in every process, which names rows and documents by them.
    return jax.jit(
        lambda params, batch, key: run(lora.computed(params, config), batch, key),
        out_shardings=NamedSharding(mesh, P()),
    )


def _on_all(losses: jax.Array) -> jax.Array:
    """Give all devices along pipe and tensor the losses that one of them has, and others lack or
    have as well."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return losses
    first = axis_index("tensor") == 0
    return lax.psum(jnp.where(first, vary(losses), 0.0), ("pipe", "tensor"))
