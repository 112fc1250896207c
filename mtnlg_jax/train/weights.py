"""When master shards become compute weights: once a step, or with ZeRO-3 at every use.

With differential privacy it is once a step on every mesh: the transpose of a gather sums over data,
and gradients are clipped before they are summed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtnlg_jax.config import Config
from mtnlg_jax.model.params import Params, join_params, split_params
from mtnlg_jax.parallel.collectives import gather_unchanged, gather_weights
from mtnlg_jax.train import lora, quantized_base


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
    if quantized_base.used(config):
        return _of_quantized_base(config, gather)
    with_adapters = functools.partial(lora.with_adapters, config)
    prepare = with_adapters if lora.used(config) else _unchanged
    # Compute weights of all layers must fit beside the masters. They are gathered once and used by
    # every micro-batch.
    if config.mesh.zero < 3 or config.optimizer.private:
        return Weights(gather, _unchanged, prepare, scattered=False)

    def of_layer(layer):
        # The name of the parent tells the plan that these parameters have a leading L.
        return prepare(gather({"blocks": layer})["blocks"])

    # ZeRO-3 holds one gathered layer at a time and pays with a gather for each use, forward and
    # backward.
    return Weights(_unchanged, gather, of_layer, scattered=True)


def _of_quantized_base(config: Config, gather: Callable[..., Any]) -> Weights:
    """Return the gathers for a base in fewer bits: a layer is dequantized where it is applied."""
    dtype = jnp.dtype(config.train.compute_dtype)
    zero = config.mesh.zero

    private = config.optimizer.private

    def gather_factors(factors):
        return gather({"blocks": factors}, dtype=jnp.float32)["blocks"]

    def at_start(params):
        rest, blocks = split_params(params)
        if private:
            mapping = blocks.raw_mapping
            blocks = type(blocks)({**mapping, "lora": gather_factors(mapping["lora"])})
        return join_params(Params(gather(rest), blocks))

    def of_layer(layer):
        mapping = dict(layer.raw_mapping)
        # The name of the parent tells the plan that these parameters have a leading L.
        codes = gather_unchanged({"blocks": mapping.pop(quantized_base.KEY)}, zero)["blocks"]
        factors = mapping.pop("lora")
        factors = factors if private else gather_factors(factors)
        plain = gather({"blocks": mapping})["blocks"]

        def adapt(name, matrix):
            return lora.low_rank_sum(config, name, matrix, factors)

        whole = {**plain, quantized_base.KEY: codes}
        assembled = quantized_base.assemble(config, whole, adapt, stacked=False)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), assembled)

    if zero < 3 or private:
        return Weights(at_start, _unchanged, of_layer, scattered=not private)
    return Weights(_unchanged, gather, of_layer, scattered=True)


def _unchanged(params: Any) -> Any:
    return params
