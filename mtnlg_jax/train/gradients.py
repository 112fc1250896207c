"""Loss and gradients in one manual region over the whole mesh, through the pipeline's schedules or
without one."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config
from mtnlg_jax.model.context_attention import context_attention
from mtnlg_jax.model.loss import cross_entropy, distilled_cross_entropy
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.collectives import (
    axis_index,
    axis_size,
    gather_weights,
    reduce_gradients,
    sum_over,
    vary,
)
from mtnlg_jax.parallel.mesh import AXES, specs_of
from mtnlg_jax.parallel.pipeline import (
    add,
    circular_loss_and_gradients,
    one_f_one_b,
    to_rounds,
    zeros,
)
from mtnlg_jax.train import lora
from mtnlg_jax.train.batch import BATCH_KEYS, layout_of
from mtnlg_jax.train.distill import Distillation, Teacher


def make_loss_and_gradients(
    config: Config, mesh: Mesh, causal: bool, distillation: Distillation | None = None
) -> Callable:
    """(params, batch, micro_batches, key) -> (mean loss, gradients like params), over the whole
    mesh. ``params`` are a plain model's; with optimizer.lora_rank the gradients are of the matrices
    that are adapted, alone. With a ``distillation`` the teacher's parameters are the last
    argument."""
    params = abstract_model(config.model)[1]
    zero = config.mesh.zero
    schedule = config.mesh.schedule
    piped = mesh.shape["pipe"] > 1
    rounds = config.mesh.virtual_pipe
    reduce_dtype = jnp.dtype(config.train.reduce_dtype)
    gather = gather_of(config)
    if not piped:
        of_micro_batches = _one_after_the_other
    else:
        of_micro_batches = _through_1f1b if schedule == "1f1b" else _through_circular

    def local(params, batch, count, key, teacher=None):
        total = jnp.maximum(sum_over(sum_over(batch["weights"].sum(), "data"), "context"), 1.0)
        if piped:
            blocks, to_natural = jax.vjp(lambda blocks: to_rounds(blocks, rounds), params["blocks"])
            params = with_blocks(params, blocks)
        params, batch, total = vary((params, batch, total))
        weights = params if zero == 3 else gather(params)
        parts = Parts(config, causal, weights, batch, total, jax.random.wrap_key_data(key))
        if distillation is not None:
            parts.teacher = Teacher(config, distillation, causal, vary(teacher))
        loss, grads = of_micro_batches(parts, weights, count, mesh)
        grads = reduce_gradients(grads, zero, zero == 3, reduce_dtype)
        if piped:
            grads = with_blocks(grads, to_natural(grads["blocks"])[0])
            grads = lora.matrices(grads, config) if lora.used(config) else grads
        return sum_apart(loss, apart=("pipe", "data", "context")), grads

    learnt = (
        specs_of(lora.matrices(params, config), zero)
        if lora.used(config)
        else specs_of(params, zero)
    )
    extra = () if distillation is None else (specs_of(abstract_model(distillation.model)[1], zero),)
    return over_mesh(local, mesh, params, zero, (P(), learnt), extra)


def gather_of(config: Config) -> Callable:
    """Master shards -> compute weights; its transpose, their gradients."""
    train = config.train
    return functools.partial(
        gather_weights,
        dtype=jnp.dtype(train.compute_dtype),
        zero=config.mesh.zero,
        reduce_dtype=jnp.dtype(train.reduce_dtype),
    )


class Parts:
    """The loss of a micro-batch in three parts, between which a pipeline fits. ``number`` picks it
    from the batch.

    A loss is this device's share: devices along ``tensor`` hold the same number; each one's
    gradient is only its own part, which is what makes the parts add up."""

    def __init__(self, config: Config, causal: bool, weights, batch, total, key):
        self.config = config
        self.batch = batch
        self.total = total
        self.causal = causal
        self.graph = abstract_model(config.model)[0]
        self.zero = config.mesh.zero
        self.gather = gather_of(config)
        self.blocks = weights["blocks"]
        self.key = key if config.model.dropout_rate else None
        self.teacher = None

    def micro(self, number):
        return {
            name: lax.dynamic_index_in_dim(x, number, 0, keepdims=False)
            for name, x in self.batch.items()
        }

    def model(self, rest):
        """The module over compute weights; its layers are whatever this device has of them."""
        if self.zero == 3:
            rest = self.gather(rest)
        return nnx.merge(self.graph, with_blocks(rest, self.blocks))

    def start(self, rest, numbers):
        """Micro-batches ``numbers`` (G,) -> what the first layer reads of each, (G, B, S, D)."""
        tokens, positions, rows = (
            self.batch[name][numbers] for name in ("tokens", "positions", "rows")
        )
        flat = [x.reshape(-1, *x.shape[2:]) for x in (tokens, positions)]
        x_BSD = self.model(rest).start(*flat, self.key, rows.reshape(-1))
        return x_BSD.reshape(*tokens.shape[:2], *x_BSD.shape[1:])

    def stage(self, rest, layers, first, number, x_BSD):
        """``x_BSD`` through ``layers``, the model's from ``first`` on. ``rest`` is only asked for
        the module."""
        micro = self.micro(number)
        context_mode = self.config.mesh.context_mode

        def prepare(layer):
            if self.zero != 3:
                return layer
            return self.gather({"blocks": layer})["blocks"]

        return self.model(rest).run(
            layers,
            first,
            x_BSD,
            micro["positions"],
            micro["segment_ids"],
            causal=self.causal,
            prepare=prepare,
            recompute=self.config.train.recompute,
            dropout_key=self.key,
            rows_B=micro["rows"],
            attend=functools.partial(context_attention, mode=context_mode),
        )

    def finish(self, rest, number, x_BSD, smoothing=None):
        model = self.model(rest)
        micro = self.micro(number)
        train = self.config.train
        x_BSD = model.finish(x_BSD)
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        smoothing = train.label_smoothing if smoothing is None else smoothing
        targets = (
            micro["labels"].reshape(-1),
            micro["weights"].reshape(-1),
            train.loss_chunk,
            smoothing,
        )
        if self.teacher is None:
            return cross_entropy(x_TD, model.head(), *targets) / self.total
        return (
            distilled_cross_entropy(
                x_TD,
                model.head(),
                *self.teacher.hidden(micro),
                *targets,
                self.teacher.temperature,
                self.teacher.weight,
            )
            / self.total
        )


def with_blocks(params, blocks):
    blocks = blocks.raw_mapping if isinstance(blocks, nnx.State) else blocks
    return type(params)({**params.raw_mapping, "blocks": blocks})


def without_blocks(params):
    return type(params)(
        {key: value for key, value in params.raw_mapping.items() if key != "blocks"}
    )


def _one_after_the_other(parts: Parts, weights, count, mesh):
    learnt = lora.matrices(weights, parts.config) if lora.used(parts.config) else weights

    def loss_of(learnt, m):
        full = lora.with_matrices(weights, learnt) if lora.used(parts.config) else learnt
        rest = without_blocks(full)
        blocks = full["blocks"]
        x_BSD = parts.start(rest, jnp.asarray(m)[None])[0]
        return parts.finish(rest, m, parts.stage(rest, blocks, 0, m, x_BSD))

    def one(m, carry):
        return add(carry, jax.value_and_grad(loss_of)(learnt, m))

    start = vary((jnp.float32(0), zeros(learnt)))
    if parts.batch["tokens"].shape[0] == 1:
        return one(0, start)
    return lax.fori_loop(0, count, one, start)


@jax.custom_vjp
def _summed_apart(w, total):
    """``w``; its gradient goes to the float32 ``total`` instead: a weight used once a micro-batch
    would have its gradients added in its own type."""
    return w


_summed_apart.defvjp(
    lambda w, total: (w, None), lambda _, grad: (jnp.zeros_like(grad), grad.astype(jnp.float32))
)


def chunk_of(parts: Parts, blocks, round):
    """The layers of this stage's chunk for ``round``, and the number of the first."""
    layers = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, round, 0, keepdims=False), blocks)
    chunk = round * axis_size("pipe") + axis_index("pipe")
    return layers, chunk * jax.tree.leaves(layers)[0].shape[0]


def _through_circular(parts: Parts, weights, count, mesh):
    rest = without_blocks(weights)
    blocks = weights["blocks"]
    mesh_config = parts.config.mesh
    micro_batches = parts.batch["tokens"].shape[0]
    flush = min(mesh_config.flush or micro_batches, micro_batches)
    apart = parts.zero != 3 and parts.config.train.compute_dtype != "float32"
    held = vary(zeros(blocks)) if apart else blocks

    def one(f, carry):
        def stage(held, round, m, x):
            layers, first = chunk_of(parts, held, round)
            if apart:
                layers = jax.tree.map(_summed_apart, chunk_of(parts, blocks, round)[0], layers)
            return parts.stage(rest, layers, first, f * flush + m, x)

        new = circular_loss_and_gradients(
            lambda rest, numbers: parts.start(rest, f * flush + numbers),
            stage,
            lambda rest, m, x: parts.finish(rest, f * flush + m, x),
            held,
            rest,
            flush,
            mesh_config.virtual_pipe,
        )
        return add(carry, new)

    start = vary((jnp.float32(0), *zeros((blocks, rest))))
    if flush == micro_batches:
        loss, d_blocks, d_rest = one(0, start)
    else:
        loss, d_blocks, d_rest = lax.fori_loop(0, -(-count // flush), one, start)
    return loss, with_blocks(d_rest, d_blocks)


def _through_1f1b(parts: Parts, weights, count, mesh):
    rest = without_blocks(weights)
    blocks = weights["blocks"]
    # Where the bubble is computed and thrown away instead of skipped: on TPU, where collectives
    # inside a branch that only some devices take are not proved; around a ring, whose permutes have
    # no groups and wait for all devices.
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    ring = parts.config.mesh.context_mode == "ring"
    loss, d_blocks, d_rest = one_f_one_b(
        lambda rest, m: parts.start(rest, m[None])[0],
        lambda blocks, m, x: parts.stage(rest, *chunk_of(parts, blocks, 0), m, x),
        parts.finish,
        blocks,
        rest,
        count,
        skip=not (on_tpu or (ring and mesh.shape["context"] > 1)),
    )
    return loss, with_blocks(d_rest, d_blocks)


def sum_apart(x, apart):
    """The sum over the axes ``apart`` of a number that devices along the others hold alike, typed
    as one number."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not manual:
        return x
    first = functools.reduce(
        jnp.logical_and, [axis_index(axis) == 0 for axis in AXES if axis not in apart]
    )
    return lax.psum(jnp.where(first, vary(x), 0.0), AXES)


def over_mesh(local, mesh: Mesh, params, zero: int, out_specs, extra_specs=()):
    """``local`` as one shard_map, manual over every axis; on a single device, ``local`` itself.
    ``extra_specs`` are of further arguments."""
    specs = specs_of(params, zero)
    rows = {name: layout_of(name, (0, 0, 0))[1] for name in BATCH_KEYS}

    def run(params, batch, count=None, key=None, *extra):
        if key is None:
            key = jax.random.key_data(jax.random.key(0))
        if count is None:
            count = jnp.int32(batch["tokens"].shape[0])
        if mesh.size == 1:
            return local(params, batch, count, key, *extra)
        return jax.shard_map(
            local, mesh=mesh, in_specs=(specs, rows, P(), P(), *extra_specs), out_specs=out_specs
        )(params, batch, count, key, *extra)

    return run
