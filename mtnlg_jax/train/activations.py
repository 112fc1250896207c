"""Figures of activations, by layer: one forward pass of a few rows through the layers.

It runs in a manual region over the whole mesh, as a step does, with the step's weights, dropout and
attention. A pipeline takes one micro-batch at a time through its stages.
"""

# Shapes: L layers, B rows, S query positions, D width, N query heads, F MLP width, E experts

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config, ModelConfig
from mtnlg_jax.model.layer_watch import PEAK, LayerWatch, square_of
from mtnlg_jax.model.params import Params, split_params
from mtnlg_jax.parallel.collectives import axis_index, axis_size, max_over, sum_over, to_next, vary
from mtnlg_jax.parallel.mesh import ROWS, specs_of
from mtnlg_jax.parallel.pipeline import to_rounds
from mtnlg_jax.train import lora
from mtnlg_jax.train.gradients import batch_specs, chunk_of, over_mesh, sum_shared
from mtnlg_jax.train.micro_batches import MicroBatches
from mtnlg_jax.train.weights import make_weights

# A unit is dead if the largest number that a token gives it is at most this share of the RMS of
# the layer's units. ReLU gives exact zeros; the others only come near to it.
DEAD_SHARE = 0.01
EXACT_ZEROS = ("relu", "squared_relu")


def make_activations(config: Config, mesh: Mesh, causal: bool) -> Callable:
    """Return (params, batch, rows, key) -> {name: float32 (L,)}, and ``embedding_rms``, a scalar.

    ``params`` and ``key`` are those of `make_loss_and_gradients`, ``batch`` holds arrays (M, B, S),
    of which the rows with numbers below ``rows`` count. Names and ranges are in docs/statistics.md.
    """
    tensor = mesh.shape["tensor"]
    pipelined = mesh.shape["pipe"] > 1
    weights = make_weights(config)
    model = config.model

    def activations(params, batch, rows, key):
        params, batch = vary((params, batch))
        if pipelined:
            rest, blocks = split_params(params)
            blocks = to_rounds(blocks, config.mesh.virtual_pipe)
            rest, blocks = weights.at_start(Params(rest, blocks))
        else:
            rest, blocks = split_params(weights.at_start(params))
        key = jax.random.wrap_key_data(key)
        micro_batches = MicroBatches(config, causal, batch, 1.0, key)

        def watch_rows(rows_B):
            return functools.partial(LayerWatch, rows_B < rows)

        def one(_, m):
            x_BSD = micro_batches.embed(rest, m[None])[0]
            square = square_of(x_BSD, batch["rows"][m] < rows)
            through = _through_stages if pipelined else _through_layers
            return None, (square, through(micro_batches, rest, blocks, m, x_BSD, watch_rows))

        # All micro-batches of the sample, which is small.
        numbers = jnp.arange(len(micro_batches))
        _, (squares, figures) = lax.scan(one, None, numbers)
        totals = {
            name: x.max(0) if name.startswith(PEAK) else x.sum(0) for name, x in figures.items()
        }
        tokens = rows * batch["tokens"].shape[-1] * axis_size("context")
        square = sum_shared(squares.sum(), (*ROWS, "context", "tensor"))
        found = _in_place(_of_mesh(totals, tokens, model), model.num_layers)
        return found | {"embedding_rms": jnp.sqrt(square / (tokens * model.hidden_size))}

    in_specs = (
        specs_of(lora.abstract_computed(config), config.mesh.zero, tensor),
        batch_specs(model),
        P(),
        P(),
    )
    return over_mesh(activations, mesh, in_specs, P())


def _through_layers(micro_batches, rest, blocks, m, x_BSD, watch_rows) -> dict[str, jax.Array]:
    """Return the figures of all layers, in rounds as those of a pipeline: (1, L, ...)."""
    figures = micro_batches.watch_layers(rest, blocks, 0, m, x_BSD, watch_rows)[1]
    return jax.tree.map(lambda x: x[None], figures)


def _through_stages(micro_batches, rest, blocks, m, x_BSD, watch_rows) -> dict[str, jax.Array]:
    """Return the figures of this stage's layers by round, (V, L/(P V), ...), of one micro-batch.

    In each tick every stage applies its chunk to what it holds, and one holds the micro-batch.
    """
    stages = axis_size("pipe")
    here = axis_index("pipe")
    rounds = jax.tree.leaves(blocks)[0].shape[0]

    def tick(x_BSD, t):
        chunk = chunk_of(blocks, t // stages)
        x_BSD, figures = micro_batches.watch_layers(rest, *chunk, m, x_BSD, watch_rows)
        return vary(lax.ppermute(x_BSD, "pipe", to_next(stages))), vary(figures)

    _, by_tick = lax.scan(tick, vary(x_BSD), jnp.arange(rounds * stages))
    # This stage's turns.
    turns = jnp.arange(rounds) * stages + here
    return jax.tree.map(lambda x: x[turns], by_tick)


def _of_mesh(
    totals: dict[str, jax.Array], tokens: jax.Array, model: ModelConfig
) -> dict[str, jax.Array]:
    """Return the figures of this stage's layers, (V, L/(P V)), given the sums and maxima of this
    device. ``tokens`` are those of all rows that count."""
    whole = (*ROWS, "context", "tensor")

    def rms(name):
        return jnp.sqrt(_sum(totals[name], whole) / (tokens * model.hidden_size))

    heads = model.num_attention_heads
    entropy_N = _sum(totals["entropy_N"], (*ROWS, "context")) / tokens
    found = {
        "residual_rms": rms("residual"),
        "attention_rms": rms("attention"),
        "mlp_rms": rms("mlp"),
        "attention_entropy": _sum(entropy_N.sum(-1), ("tensor",)) / heads,
        "attention_entropy_lowest": -max_over(-entropy_N.min(-1), "tensor"),
    }
    share = 0.0 if model.activation in EXACT_ZEROS else DEAD_SHARE
    dead: Any = 0.0
    units: Any = 0.0
    if PEAK + "F" in totals:
        peak_F = _max(totals[PEAK + "F"], (*ROWS, "context"))
        width = peak_F.shape[-1] * axis_size("tensor")
        limit = share * jnp.sqrt(_sum(totals["units"], whole) / (tokens * width))
        dead += _sum((peak_F <= limit[..., None]).sum(-1), ("tensor",))
        units += width
    if PEAK + "EF" in totals:
        # Devices along expert have other experts.
        peak_EF = _max(totals[PEAK + "EF"], ("data", "context"))
        width = peak_EF.shape[-1] * axis_size("tensor")
        visits = _sum(totals["visits"], (*ROWS, "context"))
        square = _sum(totals["visited_units"], whole)
        limit = share * jnp.sqrt(square / jnp.maximum(visits * width, 1.0))
        dead += _sum((peak_EF <= limit[..., None, None]).sum((-1, -2)), ("expert", "tensor"))
        units += model.moe.num_moe_experts * width
    return found | {"dead_units": dead / units}


def _sum(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    return functools.reduce(sum_over, axes, x)


def _max(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    return functools.reduce(max_over, axes, x)


def _in_place(found: dict[str, jax.Array], layers: int) -> dict[str, jax.Array]:
    """Return figures of all layers in order, (L,), from those of this stage, (V, L/(P V))."""

    def one(x):
        size = axis_size("pipe")
        # Chunk v P + p of the layers is round v of stage p.
        chunks = jnp.zeros((x.shape[0], size, x.shape[1]), jnp.float32)
        chunks = lax.dynamic_update_index_in_dim(vary(chunks), vary(x), axis_index("pipe"), 1)
        return sum_shared(chunks.reshape(layers), ("pipe",))

    return {name: one(x) for name, x in found.items()}
