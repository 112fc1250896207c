"""When master shards become compute weights: once a step, or with ZeRO-3 at every use."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from mtnlg_jax.config import Config
from mtnlg_jax.parallel.collectives import gather_weights


class Weights(NamedTuple):
    """Three points of a step at which shards may be gathered; the other two do nothing.

    The transpose of a gather reduce-scatters gradients. So with ZeRO-3 they leave the loop over
    micro-batches scattered, and otherwise whole.
    """

    at_start: Callable[[Any], Any]  # all parameters, once a step
    of_rest: Callable[[Any], Any]  # embeddings, final norm and head, at every use
    of_layer: Callable[[Any], Any]  # one layer, inside the scan over layers
    scattered: bool  # whether gradients leave the loop scattered


def make_weights(config: Config) -> Weights:
    """Return the gathers of ``config``. Weights are in train.compute_dtype and whole along D."""
    gather = functools.partial(
        gather_weights,
        dtype=jnp.dtype(config.train.compute_dtype),
        zero=config.mesh.zero,
        reduce_dtype=jnp.dtype(config.train.reduce_dtype),
    )
    # Compute weights of all layers must fit beside the masters. They are gathered once and used by
    # every micro-batch.
    if config.mesh.zero < 3:
        return Weights(gather, _unchanged, _unchanged, scattered=False)

    def of_layer(layer):
        # The name of the parent tells the plan that these parameters have a leading L.
        return gather({"blocks": layer})["blocks"]

    # ZeRO-3 holds one gathered layer at a time and pays with a gather for each use, forward and
    # backward.
    return Weights(_unchanged, gather, of_layer, scattered=True)


def _unchanged(params: Any) -> Any:
    return params
