"""One training step: loss and gradients in one manual region over the whole mesh, then the update.

The batch is int32/float32 arrays (M, B, S): M micro-batches of B rows, B split over ``data``, S over ``context``.
The number of micro-batches in use is traced, so a ramp of the batch never compiles again.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config
from mtnlg_jax.model.context_attention import context_attention
from mtnlg_jax.model.loss import cross_entropy, distilled_cross_entropy
from mtnlg_jax.model.transformer import abstract_model, init_parameters
from mtnlg_jax.parallel.collectives import (
    axis_index,
    axis_size,
    gather_weights,
    reduce_gradients,
    sum_over,
    vary,
    zigzag,
)
from mtnlg_jax.parallel.mesh import AXES, BATCH, shardings_of, specs_of
from mtnlg_jax.parallel.pipeline import add, circular, circular_loss_and_gradients, one_f_one_b, to_rounds, zeros
from mtnlg_jax.train import lora
from mtnlg_jax.train.distill import Distillation, Teacher
from mtnlg_jax.train.optimizer import make_optimizer
from mtnlg_jax.train.schedule import learning_rate

BATCH_KEYS = ("tokens", "labels", "segment_ids", "positions", "weights", "rows")


def init_state(config: Config, mesh: Mesh, params=None):
    """{"params", "opt_state", "step", "samples", "bad", "skipped"}: float32 masters and moments, born sharded.
    ``bad`` counts non-finite steps in a row, ``skipped`` all of them. ``params``: a plain model's to start from, laid
    out as the plan says; without, fresh ones. With optimizer.lora_rank they get fresh adapters."""
    shardings = state_shardings(config, mesh)
    base, adapters = lora.split(shardings["params"]) if lora.used(config) else (shardings["params"], None)
    if params is None:
        params = init_parameters(config.model, config.train.seed, base)
    if adapters is not None:
        params = lora.joined(params, lora.init_adapters(config, adapters))
    rest = {key: value for key, value in shardings.items() if key != "params"}
    return {"params": params, **jax.jit(functools.partial(_rest, config), out_shardings=rest)(params)}


def _rest(config: Config, params):
    zero = jnp.int32(0)
    learnt = lora.split(params)[1] if lora.used(config) else params
    return {"opt_state": make_optimizer(config.optimizer).init(learnt), "step": zero, "samples": zero,
            "bad": zero, "skipped": zero}


def abstract_state(config: Config, mesh: Mesh):
    """The state as ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    params = lora.abstract_parameters(config)
    shapes = {"params": params, **jax.eval_shape(functools.partial(_rest, config), params)}
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
                        shapes, shardings_of(shapes, mesh, config.mesh.zero))


def state_shardings(config: Config, mesh: Mesh):
    return jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh))


def make_loss_and_gradients(config: Config, mesh: Mesh, causal: bool,
                            distillation: Distillation | None = None) -> Callable:
    """(params, batch, micro_batches, key) -> (mean loss, gradients like params), over the whole mesh. ``params`` are a
    plain model's; with optimizer.lora_rank the gradients are of the matrices that are adapted, alone. With a
    ``distillation`` the teacher's parameters are the last argument."""
    params, zero, schedule = abstract_model(config.model)[1], config.mesh.zero, config.mesh.schedule
    piped, rounds = mesh.shape["pipe"] > 1, config.mesh.virtual_pipe
    reduce_dtype, gather = jnp.dtype(config.train.reduce_dtype), _gather_of(config)
    if not piped:
        of_micro_batches = _one_after_the_other
    else:
        of_micro_batches = _through_1f1b if schedule == "1f1b" else _through_circular

    def local(params, batch, count, key, teacher=None):
        total = jnp.maximum(sum_over(sum_over(batch["weights"].sum(), "data"), "context"), 1.0)
        if piped:
            blocks, to_natural = jax.vjp(lambda blocks: to_rounds(blocks, rounds), params["blocks"])
            params = _with_blocks(params, blocks)
        params, batch, total = vary((params, batch, total))
        weights = params if zero == 3 else gather(params)
        parts = _Parts(config, causal, weights, batch, total, jax.random.wrap_key_data(key))
        if distillation is not None:
            parts.teacher = Teacher(config, distillation, causal, vary(teacher))
        loss, grads = of_micro_batches(parts, weights, count, mesh)
        grads = reduce_gradients(grads, zero, zero == 3, reduce_dtype)
        if piped:
            grads = _with_blocks(grads, to_natural(grads["blocks"])[0])
            grads = lora.matrices(grads, config) if lora.used(config) else grads
        return _report(loss, apart=("pipe", "data", "context")), grads

    learnt = specs_of(lora.matrices(params, config), zero) if lora.used(config) else specs_of(params, zero)
    extra = () if distillation is None else (specs_of(abstract_model(distillation.model)[1], zero),)
    return _over_mesh(local, mesh, params, zero, (P(), learnt), extra)


def _gather_of(config: Config) -> Callable:
    """Master shards -> compute weights; its transpose, their gradients."""
    train = config.train
    return functools.partial(gather_weights, dtype=jnp.dtype(train.compute_dtype), zero=config.mesh.zero,
                             reduce_dtype=jnp.dtype(train.reduce_dtype))


class _Parts:
    """The loss of a micro-batch in three parts, between which a pipeline fits. ``number`` picks it from the batch.

    A loss is this device's share: devices along ``tensor`` hold the same number; each one's gradient is only its
    own part, which is what makes the parts add up."""

    def __init__(self, config: Config, causal: bool, weights, batch, total, key):
        self.config, self.batch, self.total, self.causal = config, batch, total, causal
        self.graph = abstract_model(config.model)[0]
        self.zero, self.gather = config.mesh.zero, _gather_of(config)
        self.blocks, self.key = weights["blocks"], key if config.model.dropout_rate else None
        self.teacher = None

    def micro(self, number):
        return {name: lax.dynamic_index_in_dim(x, number, 0, keepdims=False) for name, x in self.batch.items()}

    def model(self, rest):
        """The module over compute weights; its layers are whatever this device has of them."""
        if self.zero == 3:
            rest = self.gather(rest)
        return nnx.merge(self.graph, _with_blocks(rest, self.blocks))

    def start(self, rest, numbers):
        """Micro-batches ``numbers`` (G,) -> what the first layer reads of each, (G, B, S, D)."""
        tokens, positions, rows = (self.batch[name][numbers] for name in ("tokens", "positions", "rows"))
        flat = [x.reshape(-1, *x.shape[2:]) for x in (tokens, positions)]
        x_BSD = self.model(rest).start(*flat, self.key, rows.reshape(-1))
        return x_BSD.reshape(*tokens.shape[:2], *x_BSD.shape[1:])

    def stage(self, rest, layers, first, number, x_BSD):
        """``x_BSD`` through ``layers``, the model's from ``first`` on. ``rest`` is only asked for the module."""
        micro, context_mode = self.micro(number), self.config.mesh.context_mode

        def prepare(layer):
            if self.zero != 3:
                return layer
            return self.gather({"blocks": layer})["blocks"]

        return self.model(rest).run(
            layers, first, x_BSD, micro["positions"], micro["segment_ids"], causal=self.causal, prepare=prepare,
            recompute=self.config.train.recompute, dropout_key=self.key, rows_B=micro["rows"],
            attend=functools.partial(context_attention, mode=context_mode))

    def finish(self, rest, number, x_BSD, smoothing=None):
        model, micro, train = self.model(rest), self.micro(number), self.config.train
        x_BSD = model.finish(x_BSD)
        x_TD, smoothing = x_BSD.reshape(-1, x_BSD.shape[-1]), train.label_smoothing if smoothing is None else smoothing
        targets = micro["labels"].reshape(-1), micro["weights"].reshape(-1), train.loss_chunk, smoothing
        if self.teacher is None:
            return cross_entropy(x_TD, model.head(), *targets) / self.total
        return distilled_cross_entropy(x_TD, model.head(), *self.teacher.hidden(micro), *targets,
                                       self.teacher.temperature, self.teacher.weight) / self.total


def _with_blocks(params, blocks):
    blocks = blocks.raw_mapping if isinstance(blocks, nnx.State) else blocks
    return type(params)({**params.raw_mapping, "blocks": blocks})


def _without_blocks(params):
    return type(params)({key: value for key, value in params.raw_mapping.items() if key != "blocks"})


def _one_after_the_other(parts: _Parts, weights, count, mesh):
    learnt = lora.matrices(weights, parts.config) if lora.used(parts.config) else weights

    def loss_of(learnt, m):
        full = lora.with_matrices(weights, learnt) if lora.used(parts.config) else learnt
        rest, blocks = _without_blocks(full), full["blocks"]
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
    """``w``; its gradient goes to the float32 ``total`` instead: a weight used once a micro-batch would have its
    gradients added in its own type."""
    return w


_summed_apart.defvjp(lambda w, total: (w, None), lambda _, grad: (jnp.zeros_like(grad), grad.astype(jnp.float32)))


def _chunk_of(parts: _Parts, blocks, round):
    """The layers of this stage's chunk for ``round``, and the number of the first."""
    layers = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, round, 0, keepdims=False), blocks)
    chunk = round * axis_size("pipe") + axis_index("pipe")
    return layers, chunk * jax.tree.leaves(layers)[0].shape[0]


def _through_circular(parts: _Parts, weights, count, mesh):
    rest, blocks, mesh_config = _without_blocks(weights), weights["blocks"], parts.config.mesh
    micro_batches = parts.batch["tokens"].shape[0]
    flush = min(mesh_config.flush or micro_batches, micro_batches)
    apart = parts.zero != 3 and parts.config.train.compute_dtype != "float32"
    held = vary(zeros(blocks)) if apart else blocks

    def one(f, carry):
        def stage(held, round, m, x):
            layers, first = _chunk_of(parts, held, round)
            if apart:
                layers = jax.tree.map(_summed_apart, _chunk_of(parts, blocks, round)[0], layers)
            return parts.stage(rest, layers, first, f * flush + m, x)

        new = circular_loss_and_gradients(
            lambda rest, numbers: parts.start(rest, f * flush + numbers), stage,
            lambda rest, m, x: parts.finish(rest, f * flush + m, x), held, rest, flush, mesh_config.virtual_pipe)
        return add(carry, new)

    start = vary((jnp.float32(0), *zeros((blocks, rest))))
    if flush == micro_batches:
        loss, d_blocks, d_rest = one(0, start)
    else:
        loss, d_blocks, d_rest = lax.fori_loop(0, -(-count // flush), one, start)
    return loss, _with_blocks(d_rest, d_blocks)


def _through_1f1b(parts: _Parts, weights, count, mesh):
    rest, blocks = _without_blocks(weights), weights["blocks"]
    # Where the bubble is computed and thrown away instead of skipped: on TPU, where collectives inside a branch that
    # only some devices take are not proved; around a ring, whose permutes have no groups and wait for all devices.
    on_tpu, ring = mesh.devices.flat[0].platform == "tpu", parts.config.mesh.context_mode == "ring"
    loss, d_blocks, d_rest = one_f_one_b(
        lambda rest, m: parts.start(rest, m[None])[0],
        lambda blocks, m, x: parts.stage(rest, *_chunk_of(parts, blocks, 0), m, x),
        parts.finish, blocks, rest, count, skip=not (on_tpu or (ring and mesh.shape["context"] > 1)))
    return loss, _with_blocks(d_rest, d_blocks)


def make_eval(config: Config, mesh: Mesh, causal: bool) -> Callable:
    """(params, batch) -> (sum of weight x -log p, sum of weights) of a batch (M, B, S)."""
    params, zero = abstract_model(config.model)[1], config.mesh.zero
    piped, rounds = mesh.shape["pipe"] > 1, config.mesh.virtual_pipe
    undropped = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout_rate=0.0))

    def local(params, batch, count, key):
        params, batch = vary((params, batch))
        if piped:
            params = _with_blocks(params, to_rounds(params["blocks"], rounds))
        weights = params if zero == 3 else _gather_of(config)(params)
        parts = _Parts(undropped, causal, weights, batch, 1.0, None)
        rest, blocks, micro_batches = _without_blocks(weights), weights["blocks"], batch["tokens"].shape[0]
        if piped:
            mine = jnp.arange(micro_batches // axis_size("pipe")) * axis_size("pipe") + axis_index("pipe")
            ys = circular(lambda round, m, x: parts.stage(rest, *_chunk_of(parts, blocks, round), m, x),
                          vary(parts.start(rest, mine)), rounds)
            losses = lax.map(lambda args: parts.finish(rest, *args, smoothing=0.0), (mine, ys))
        else:
            def one(m):
                x_BSD = parts.stage(rest, blocks, 0, m, parts.start(rest, m[None])[0])
                return parts.finish(rest, m, x_BSD, smoothing=0.0)

            losses = lax.map(one, jnp.arange(micro_batches))
        return _report(losses.sum(), ("pipe", "data", "context")), _report(batch["weights"].sum(), ("data", "context"))

    return jax.jit(_over_mesh(local, mesh, params, zero, (P(), P())))


def _report(x, apart):
    """The sum over the axes ``apart`` of a number that devices along the others hold alike, typed as one number."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not manual:
        return x
    first = functools.reduce(jnp.logical_and, [axis_index(axis) == 0 for axis in AXES if axis not in apart])
    return lax.psum(jnp.where(first, vary(x), 0.0), AXES)


def _over_mesh(local, mesh: Mesh, params, zero: int, out_specs, extra_specs=()):
    """``local`` as one shard_map, manual over every axis; on a single device, ``local`` itself. ``extra_specs`` are of
    further arguments."""
    specs = specs_of(params, zero)
    rows = {name: _layout_of(name, (0, 0, 0))[1] for name in BATCH_KEYS}

    def run(params, batch, count=None, key=None, *extra):
        if key is None:
            key = jax.random.key_data(jax.random.key(0))
        if count is None:
            count = jnp.int32(batch["tokens"].shape[0])
        if mesh.size == 1:
            return local(params, batch, count, key, *extra)
        return jax.shard_map(local, mesh=mesh, in_specs=(specs, rows, P(), P(), *extra_specs), out_specs=out_specs)(
            params, batch, count, key, *extra)

    return run


def make_train_step(config: Config, mesh: Mesh, causal: bool, distillation: Distillation | None = None,
                    total_samples: int | None = None) -> Callable:
    """jitted (state, batch, micro_batches, sequences, rate_scale) -> (state, metrics); the state is donated. With a
    ``distillation`` the teacher's parameters are the last argument. ``total_samples`` is for `learning_rate`.

    A step whose loss or gradient norm is not finite changes nothing but the counters."""
    optimizer = make_optimizer(config.optimizer)
    loss_and_gradients = make_loss_and_gradients(config, mesh, causal, distillation)
    shardings = state_shardings(config, mesh)

    def step(state, batch, micro_batches, sequences, rate_scale, *teacher):
        key = jax.random.fold_in(jax.random.key(config.train.seed), state["step"])
        plain, learnt, to_learnt, to_params = lora.opened(state["params"], config)
        loss, grads = loss_and_gradients(plain, batch, micro_batches, jax.random.key_data(key), *teacher)
        grads = to_learnt(grads)
        grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        samples = state["samples"] + sequences
        rate = learning_rate(config, samples, total_samples) * rate_scale
        updates, opt_state = optimizer.update(grads, state["opt_state"], learnt)
        params = jax.tree.map(lambda p, u: p - rate * u, learnt, updates)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        new_state = {
            "params": to_params(keep(params, learnt)), "opt_state": keep(opt_state, state["opt_state"]),
            "step": state["step"] + 1, "samples": samples,
            "bad": jnp.where(good, 0, state["bad"] + 1), "skipped": state["skipped"] + ~good,
        }
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate, "bad": new_state["bad"],
                   "skipped": new_state["skipped"]}
        return new_state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def micro_batch_shape(config: Config, mesh: Mesh) -> tuple[int, int]:
    """(micro-batches, rows of each over the whole mesh) of the largest batch; a circular pipeline takes micro-batches
    by the flush, so that some may have to stay empty."""
    size, train = mesh.shape["data"], config.train
    rows = (train.micro_batch_size or train.global_batch_size // size) * size
    micro_batches = train.global_batch_size // rows
    unit = 1
    if mesh.shape["pipe"] > 1 and config.mesh.schedule == "circular":
        unit = config.mesh.flush or mesh.shape["pipe"]
    return -(-micro_batches // unit) * unit, rows


def abstract_batch(config: Config, mesh: Mesh):
    """The largest batch as ShapeDtypeStructs with shardings: what ``put_batch`` makes, and a step is compiled for."""
    micro, rows = micro_batch_shape(config, mesh)

    def one(name):
        shape, spec = _layout_of(name, (micro, rows, config.sequence_length))
        return jax.ShapeDtypeStruct(shape, jnp.float32 if name == "weights" else jnp.int32,
                                    sharding=NamedSharding(mesh, spec))

    return {name: one(name) for name in BATCH_KEYS}


def _layout_of(name: str, shape: tuple[int, int, int]) -> tuple[tuple[int, ...], P]:
    """Shape and spec of one array of a batch (M, B, S)."""
    return (shape[:2], P(None, "data")) if name == "rows" else (shape, BATCH)


def put_batch(rows_of: Callable, shape: tuple[int, int, int], mesh: Mesh):
    """The global batch (M, B, S) as sharded arrays, places in the zigzag order of the context axis.
    ``rows_of(numbers)`` gives a dict of (n, S) arrays for global row numbers m * B + b; it is asked only for the
    rows that this process holds."""
    micro, rows, length = shape
    order = zigzag(length, mesh.shape["context"])
    parts: dict[tuple, dict] = {}

    def part(index) -> dict:
        key = (index[1].start or 0, rows if index[1].stop is None else index[1].stop)
        if key not in parts:
            numbers = (np.arange(micro)[:, None] * rows + np.arange(*key)).reshape(-1)
            flat = {name: x[:, order] for name, x in rows_of(numbers).items()}
            flat["rows"] = numbers.astype(np.int32)
            parts[key] = {name: x.reshape(micro, key[1] - key[0], *x.shape[1:]) for name, x in flat.items()}
        return parts[key]

    def array(name):
        size, spec = _layout_of(name, shape)
        return jax.make_array_from_callback(size, NamedSharding(mesh, spec),
                                            lambda index: part(index)[name][:, :, *index[2:]])

    return {name: array(name) for name in BATCH_KEYS}
