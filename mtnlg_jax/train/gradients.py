"""Loss and gradients in one manual region over the whole mesh, with or without a pipeline."""

# Shapes: L layers, E experts

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config, ModelConfig
from mtnlg_jax.model.params import Params, join_params, split_params
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.collectives import (
    axis_index,
    axis_size,
    reduce_gradients,
    sum_over,
    vary,
)
from mtnlg_jax.parallel.mesh import AXES, EXPERT_BIAS, ROWS, spec_of, specs_of, whole_dims
from mtnlg_jax.parallel.pipeline import (
    add,
    circular_loss_and_gradients,
    one_f_one_b,
    to_rounds,
    zeros,
)
from mtnlg_jax.parallel.rings import sizes_on, staged
from mtnlg_jax.train import expert_loads, lora
from mtnlg_jax.train.batch import batch_keys, layout_of
from mtnlg_jax.train.distill import Distillation, Teacher
from mtnlg_jax.train.micro_batches import MicroBatches
from mtnlg_jax.train.weights import make_weights


def make_loss_and_gradients(
    config: Config,
    mesh: Mesh,
    causal: bool,
    distillation: Distillation | None = None,
    counting: bool = False,
    sparse: bool = False,
) -> Callable:
    """Return (params, batch, count, key) -> (mean loss, gradients) over the whole mesh.

    ``count`` of the micro-batches are used. ``params`` are those of `lora.computed`, and gradients
    have their structure; with optimizer.lora_rank they are only those of the factors
    (`lora.make_targets`). With a ``distillation`` the teacher's parameters are one more argument,
    the last. ``counting``: return the loads of experts, (L, E), as well. ``sparse``: as in
    `cross_entropy`.
    """
    zero = config.mesh.zero
    model = config.model  # below, that of ``config`` may have counters of expert loads
    tensor = mesh.shape["tensor"]
    unsplit = whole_dims("K", (config.model.kv_heads,), tensor)
    weights = make_weights(config)
    reduced = jnp.dtype(config.train.reduce_dtype)
    targets, with_targets = lora.make_targets(config)
    # Before counters: callers pass the parameters of the plain model.
    abstract = lora.abstract_computed(config)
    if counting:
        config = dataclasses.replace(config, model=expert_loads.counted(model))

    def enter(params, batch, key, teacher):
        """Mark all as varying and gather: (compute weights, the micro-batches)."""
        # Before the gather: otherwise autodiff would insert its own reductions at every use.
        params, batch, total = vary((params, batch, _weight_of(batch)))
        params = weights.at_start(params)
        if distillation is not None:
            teacher = Teacher(config, distillation, causal, vary(teacher))
        key = jax.random.wrap_key_data(key)
        return params, MicroBatches(config, causal, batch, total, key, teacher, counting, sparse)

    def leave(loss, gradients):
        """Sum over devices: (mean loss, gradients as the masters are split)."""
        # Once a step, after all micro-batches: gradient traffic does not grow with their number.
        # Only ZeRO-3 reduces inside the loop.
        gradients = reduce_gradients(gradients, zero, weights.scattered, reduced, unsplit)
        return sum_shared(loss, ("pipe", *ROWS, "context")), gradients

    def loss_and_gradients(params, batch, count, key, teacher=None):
        params, micro_batches = enter(params, batch, key, teacher)

        def loss_of(leaves, number):
            trained, counters = leaves
            all_params = with_targets(params, trained)
            if counting:
                all_params = expert_loads.with_counters(all_params, counters, model)
            return micro_batches.whole(all_params, number)

        def leave_all(loss, gradients):
            gradients, loads_LE = gradients
            found = leave(loss, gradients)
            return (*found, _summed_loads(loads_LE)) if counting else found

        counters = vary(expert_loads.new_counters(model)) if counting else ()
        leaves = (targets(params), counters)
        one = jax.value_and_grad(loss_of)
        # The sums are float32 even where compute weights are bfloat16, in which small terms would
        # vanish.
        total = vary((jnp.float32(0), zeros(leaves)))
        if len(micro_batches) == 1:  # no loop is needed
            return leave_all(*add(total, one(leaves, 0)))
        # ``count`` is traced, so that a batch ramp does not compile again. A loop of unknown length
        # has no backward pass, which is why gradients are taken inside it.
        return leave_all(*lax.fori_loop(0, count, lambda m, sums: add(sums, one(leaves, m)), total))

    def pipelined_loss_and_gradients(params, batch, count, key, teacher=None):
        # Layers move to their stages before the gather, and gradients back after the
        # reduce-scatter, so that each device sends shards and not whole weights.
        like = params
        if counting:
            params = expert_loads.with_counters(params, expert_loads.new_counters(model), model)
        natural = split_params(params)
        blocks, to_natural = jax.vjp(
            lambda blocks: to_rounds(blocks, config.mesh.virtual_pipe), natural.blocks
        )
        staged, micro_batches = enter(natural._replace(blocks=blocks), batch, key, teacher)
        loss, gradients = leave(*through_pipeline(micro_batches, staged, count, mesh))
        # The masters, and so the optimizer and checkpoints, keep the natural order of layers. The
        # transpose of the permutes brings gradients back to it.
        (blocks,) = to_natural(gradients.blocks)
        gradients = join_params(gradients._replace(blocks=blocks))
        gradients, *loads = expert_loads.split_loads(gradients, like) if counting else (gradients,)
        return loss, targets(gradients), *loads

    in_specs = [specs_of(abstract, zero, tensor), batch_specs(model), P(), P()]
    if distillation is not None:
        in_specs.append(specs_of(abstract_model(distillation.model)[1], zero, tensor))
    gradient_specs = specs_of(targets(abstract), zero, tensor)
    out_specs = (P(), gradient_specs, *([spec_of("LE")] if counting else []))
    # Chosen here, outside the traced function, since the two are different programs.
    function = pipelined_loss_and_gradients if mesh.shape["pipe"] > 1 else loss_and_gradients
    return over_mesh(function, mesh, in_specs, out_specs)


def _weight_of(batch: dict[str, jax.Array]) -> jax.Array:
    """Return the weight of the whole batch, of which a device has its part."""
    # Devices along pipe and tensor hold the same tokens, so these axes are not summed over.
    total = batch["weights"].sum()
    for axis in (*ROWS, "context"):
        total = sum_over(total, axis)
    # At least 1: a batch without a predicted token has loss 0 and not NaN.
    return jnp.maximum(total, 1.0)


def _summed_loads(loads_LE: jax.Array) -> jax.Array:
    # Under the name of the bias, whose dims tell how it is split.
    named = reduce_gradients({"blocks": {EXPERT_BIAS: loads_LE}}, zero=0, scattered=False)
    return named["blocks"][EXPERT_BIAS]


# --- through the pipeline


def through_pipeline(
    micro_batches: MicroBatches, params: Params, count: int | jax.Array, mesh: Mesh
) -> tuple[jax.Array, Params]:
    """Return (loss, gradients) of ``count`` micro-batches by mesh.schedule; ``params`` are compute
    weights, the layers in the order of their stages."""
    schedule = _one_f_one_b if micro_batches.config.mesh.schedule == "1f1b" else _circular
    return schedule(micro_batches, params, count, mesh)


def _circular(
    micro_batches: MicroBatches, params: Params, count: int | jax.Array, mesh: Mesh
) -> tuple[jax.Array, Params]:
    """Return (loss, gradients) by the circular schedule, a flush of micro-batches at a time."""
    rest, blocks = params
    config = micro_batches.config
    flush = min(config.mesh.flush or len(micro_batches), len(micro_batches))
    # JAX adds the gradients of a weight that is used once a micro-batch in the weight's own type.
    # With ZeRO-3 that type is the float32 of the masters, since the gather is inside the loop.
    separate = not micro_batches.weights.scattered and config.train.compute_dtype != "float32"
    # In the separate case the pipeline differentiates by these zeros: they receive the gradients of
    # the blocks and are summed in float32.
    trained = vary(zeros(blocks)) if separate else blocks

    def one(number, sums):
        def stage(trained, round, m, x):
            layers, first = chunk_of(trained, round)
            if separate:
                # Values from the compute weights, gradients to the float32 zeros.
                layers = jax.tree.map(_gradient_to_sum, chunk_of(blocks, round)[0], layers)
            return micro_batches.layers(rest, layers, first, number * flush + m, x)

        return add(
            sums,
            circular_loss_and_gradients(
                lambda rest, numbers: micro_batches.embed(rest, number * flush + numbers),
                stage,
                lambda rest, m, x: micro_batches.loss(rest, number * flush + m, x),
                trained,
                rest,
                flush,
                config.mesh.virtual_pipe,
            ),
        )

    sums = vary((jnp.float32(0), *zeros((blocks, rest))))
    # One flush holds everything, so no loop is needed. Micro-batches beyond ``count`` have weight
    # 0.
    if flush == len(micro_batches):
        loss, d_blocks, d_rest = one(0, sums)
    else:
        loss, d_blocks, d_rest = lax.fori_loop(0, -(-count // flush), one, sums)
    return loss, Params(d_rest, d_blocks)


def _one_f_one_b(
    micro_batches: MicroBatches, params: Params, count: int | jax.Array, mesh: Mesh
) -> tuple[jax.Array, Params]:
    """Return (loss, gradients) by 1F1B."""
    rest, blocks = params
    # Two cases compute the bubble and drop the results instead of skipping it: TPUs, where
    # collectives in a branch that only some devices take are unproved; and rings, of attention or
    # of products, whose permutes have no groups and wait for all devices.
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    given = micro_batches.config.mesh
    ring = given.context_mode == "ring" and mesh.shape["context"] > 1
    ring = ring or (given.tp_comm_overlap and mesh.shape["tensor"] > 1)

    def stage(blocks, m, x):
        return micro_batches.layers(rest, *chunk_of(blocks, 0), m, x)

    loss, d_blocks, d_rest = one_f_one_b(
        lambda rest, m: micro_batches.embed(rest, m[None])[0],
        stage,
        micro_batches.loss,
        blocks,
        rest,
        count,
        skip=not (on_tpu or ring),
    )
    return loss, Params(d_rest, d_blocks)


def chunk_of(blocks: nnx.State, round: int | jax.Array) -> tuple[nnx.State, jax.Array]:
    """Return (the layers that this stage applies in ``round``, the number of the first one)."""
    layers = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, round, 0, keepdims=False), blocks)
    # The interleaving of `parallel.pipeline`: in round v stage p applies chunk v P + p.
    chunk = round * axis_size("pipe") + axis_index("pipe")
    return layers, chunk * jax.tree.leaves(layers)[0].shape[0]


@jax.custom_vjp
def _gradient_to_sum(weight: jax.Array, total: jax.Array) -> jax.Array:
    """Return ``weight``; its gradient is given to the float32 ``total`` instead."""
    return weight


_gradient_to_sum.defvjp(
    lambda weight, total: (weight, None),
    lambda _, grad: (jnp.zeros_like(grad), grad.astype(jnp.float32)),
)


# --- the manual region


def sum_shared(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Return the sum of ``x`` over ``axes``, where devices along other axes hold the same number.

    The type system of shard_map knows the result as one number for all devices.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not manual:
        return x
    # One device of each group with the same number contributes; the sum then goes over all axes.
    first = functools.reduce(
        jnp.logical_and, [axis_index(axis) == 0 for axis in AXES if axis not in axes]
    )
    return lax.psum(jnp.where(first, vary(x), 0.0), AXES)


def batch_specs(model: ModelConfig) -> dict[str, P]:
    """Return the PartitionSpecs of a batch for ``model``."""
    return {name: layout_of(name, (0, 0, 0), model)[1] for name in batch_keys(model)}


def over_mesh(function: Callable, mesh: Mesh, in_specs: Sequence, out_specs: Any) -> Callable:
    """Return ``function`` as a shard_map, manual over every axis; on one device, unchanged.

    Collectives over ``data`` are in the stages that the torus of a TPU slice asks for (`rings`).
    """
    # A single device needs no manual region: outside it the collectives do nothing.
    if mesh.size == 1:
        return function
    sizes = {"data": sizes_on(mesh, "data")}

    @functools.wraps(function)
    def in_stages(*args):
        with staged(sizes):
            return function(*args)

    return jax.shard_map(in_stages, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs)
