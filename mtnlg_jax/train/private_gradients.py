"""Gradients of DP-SGD (Abadi 2016, algorithm 1): those of each unit are clipped, their sum gets
noise and is divided by the expected number of units.

A unit is dp_source_rows rows of the batch, one by default: a micro-batch of one shard of data. Its
loss is the mean over its own tokens and its dropout masks follow its own numbers, so that no other
unit changes its gradient. Nothing is summed over data before it is clipped.
"""

# Shapes: M micro-batches, R rows of a unit, S query positions

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config
from mtnlg_jax.model.params import join_params, split_params
from mtnlg_jax.parallel.collectives import reduce_gradients, squared_norm, sum_over, vary
from mtnlg_jax.parallel.mesh import AXIS_OF, ROWS, dims_of, specs_of, whole_dims
from mtnlg_jax.parallel.pipeline import add, to_rounds, zeros
from mtnlg_jax.train import lora
from mtnlg_jax.train.gradients import batch_specs, over_mesh, sum_shared, through_pipeline
from mtnlg_jax.train.micro_batches import MicroBatches
from mtnlg_jax.train.weights import make_weights


def make_clipped_gradients(config: Config, mesh: Mesh, causal: bool) -> Callable:
    """Return (params, batch, count, key) -> (figures, the sum of the clipped gradients).

    Arguments and gradients are those of `make_loss_and_gradients`; of a micro-batch each shard of
    data has one unit, (M, R, S). The figures are float32 sums over units, and none of them is
    private: "loss", "units", "clipped" (units whose gradient was scaled down) and "nonfinite"
    (units whose gradient was not finite and counts as 0).
    """
    zero = config.mesh.zero
    tensor = mesh.shape["tensor"]
    unsplit = whole_dims("K", (config.model.kv_heads,), tensor)
    weights = make_weights(config)
    targets, with_targets = lora.make_targets(config)
    limit = config.optimizer.dp_clip_norm
    pipelined = mesh.shape["pipe"] > 1
    rounds = config.mesh.virtual_pipe

    def of_unit(params, unit, key):
        """Return (loss, gradients) of arrays (R, S): this device's parts."""
        # Its own tokens alone: a mean over those of the batch would depend on the others.
        total = jnp.maximum(sum_over(unit["weights"].sum(), "context"), 1.0)
        # A pipeline takes a micro-batch for each stage; the others have weight 0.
        parts = mesh.shape["pipe"] if config.mesh.schedule == "circular" else 1
        batch = {
            name: jnp.pad(x[None], [(0, parts - 1), *[(0, 0)] * x.ndim]) for name, x in unit.items()
        }
        micro_batches = MicroBatches(config, causal, batch, total, key)
        if not pipelined:
            return jax.value_and_grad(
                lambda trained: micro_batches.whole(with_targets(params, trained), 0)
            )(targets(params))
        loss, gradients = through_pipeline(micro_batches, params, 1, mesh)
        return loss, targets(join_params(gradients))

    def clipped(params, unit, key):
        """Return (figures, clipped gradients) of one unit."""
        loss, gradients = of_unit(params, unit, key)
        square = squared_norm(gradients, unsplit)
        finite = jnp.isfinite(square)
        norm = jnp.sqrt(square)
        used = sum_over(unit["weights"].sum(), "context") > 0
        scale = jnp.where(used & finite, jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30)), 0.0)
        # A product with 0 would keep a NaN.
        gradients = jax.tree.map(
            lambda g: jnp.where(finite, g.astype(jnp.float32) * scale, 0.0), gradients
        )
        figures = {
            "loss": jnp.where(jnp.isfinite(loss), loss, 0.0),
            "units": used,
            "clipped": used & finite & (norm > limit),
            "nonfinite": used & ~finite,
        }
        return {name: x.astype(jnp.float32) for name, x in figures.items()}, gradients

    def clipped_gradients(params, batch, count, key):
        # As in `make_loss_and_gradients`: all varies, so that autodiff sums nothing by itself.
        params, batch = vary((params, batch))
        key = jax.random.wrap_key_data(key)
        order = (lambda blocks: to_rounds(blocks, rounds)) if pipelined else (lambda blocks: blocks)
        if pipelined:
            params = split_params(params)
            params = params._replace(blocks=order(params.blocks))
        params = weights.at_start(params)
        assert batch["tokens"].shape[1] == config.optimizer.rows_of_unit, "one unit of this device"

        # One unit at a time: several at once (vmap) take no less time on a CPU, and hold a gradient
        # each. So do two passes, of which the first finds the norms alone.
        def one(m, sums):
            unit = {
                name: lax.dynamic_index_in_dim(x, m, 0, keepdims=False) for name, x in batch.items()
            }
            return add(sums, clipped(params, unit, key))

        trained = targets(join_params(params) if pipelined else params)
        names = ("loss", "units", "clipped", "nonfinite")
        start = vary((dict.fromkeys(names, jnp.float32(0)), zeros(trained)))
        figures, gradients = lax.fori_loop(0, count, one, start)
        gradients = reduce_gradients(gradients, zero, scattered=False, whole=unsplit)
        return _summed(figures), _natural(gradients, rounds) if pipelined else gradients

    abstract = lora.abstract_computed(config)
    in_specs = (specs_of(abstract, zero, tensor), batch_specs(config.model), P(), P())
    gradient_specs = specs_of(targets(abstract), zero, tensor)
    return over_mesh(clipped_gradients, mesh, in_specs, (P(), gradient_specs))


def _summed(figures: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sum over the devices."""
    # Of the loss, devices along context have parts, and all but one stage have 0.
    axes = {"loss": ("pipe", *ROWS, "context")}
    return {name: sum_shared(x, axes.get(name, ROWS)) for name, x in figures.items()}


def _natural(gradients: Any, rounds: int) -> Any:
    """Return ``gradients`` with the layers where they are stored, from where they are applied."""
    adapters = isinstance(gradients, dict)
    blocks = gradients["blocks"] if adapters else split_params(gradients).blocks
    like = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), blocks)
    (blocks,) = jax.vjp(lambda blocks: to_rounds(blocks, rounds), like)[1](blocks)
    if adapters:
        return {"blocks": blocks}
    return join_params(split_params(gradients)._replace(blocks=blocks))


def make_private_gradients(config: Config, mesh: Mesh, causal: bool) -> Callable:
    """Return (params, batch, count, key, step, sequences, noise key) -> (mean loss, private
    gradients, figures) over the whole mesh.

    The first four arguments are those of `make_loss_and_gradients`. ``sequences`` is the expected
    number of rows of this step; the noise follows `privacy.noise_key`. Of the results only the
    gradients are private: the loss is the mean over this step's units, and the figures name what is
    not.
    """
    clipped_gradients = make_clipped_gradients(config, mesh, causal)
    noised_mean = make_noised_mean(config, mesh)

    def private_gradients(params, batch, count, key, step, sequences, noise_key):
        figures, sums = clipped_gradients(params, batch, count, key)
        gradients = noised_mean(sums, noise_key, step, sequences / config.optimizer.rows_of_unit)
        units = jnp.maximum(figures["units"], 1.0)
        shares = {
            "nonprivate_clipped": figures["clipped"] / units,
            "nonprivate_nonfinite": figures["nonfinite"],
        }
        return figures["loss"] / units, gradients, shares

    return private_gradients


# --- noise

_DRAWS = 4  # of which a number of the noise is the sum


def make_noised_mean(config: Config, mesh: Mesh) -> Callable:
    """Return (sums of clipped gradients, key data, step, expected units) -> their noised mean.

    The noise is N(0, (dp_noise_multiplier x dp_clip_norm)^2) on every number of the sum. It is a
    function of the key and the step, the same on every mesh.
    """
    deviation = config.optimizer.dp_noise_multiplier * config.optimizer.dp_clip_norm

    def noised_mean(sums, key, step, expected):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        leaves, structure = jax.tree_util.tree_flatten_with_path(sums)
        specs = jax.tree.leaves(
            specs_of(sums, config.mesh.zero, mesh.shape["tensor"]),
            is_leaf=lambda each: isinstance(each, P),
        )
        found = []
        for number, ((path, leaf), spec) in enumerate(zip(leaves, specs, strict=True)):
            drawn = _gaussian(
                jax.random.fold_in(key, number), _few_dims(dims_of(path), leaf.shape)
            ).reshape(leaf.shape)
            # Each device draws its own part.
            drawn = lax.with_sharding_constraint(drawn, NamedSharding(mesh, spec))
            # The expected number and not that of this step, which the sample decides.
            found.append((leaf + deviation * drawn) / expected)
        return jax.tree.unflatten(structure, found)

    return noised_mean


def _gaussian(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return standard normal numbers, float32 ``shape``, each half the sum of four draws.

    A single draw is one of 2^23 numbers and ends at 5.17 above and 5.42 below, so among millions of
    parameters the largest ones would betray the sum under the noise; four end at twice that, and
    no gaps are left (Holohan and Braghin 2021, arXiv 2107.10138).
    """

    def add_draw(number, total):
        return total + jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)

    return lax.fori_loop(0, _DRAWS, add_draw, jnp.zeros(shape, jnp.float32)) / math.sqrt(_DRAWS)


def _few_dims(dims: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``shape`` with each dim that no mesh splits joined to the one before it: XLA needs
    seconds to compile a draw of many dims."""
    joined: list[int] = []
    for dim, size in zip(dims, shape, strict=True):
        if joined and dim not in AXIS_OF:
            joined[-1] *= size
        else:
            joined.append(size)
    return tuple(joined)
