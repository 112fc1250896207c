"""One training step: loss and gradients in one manual region over the whole mesh, then the update.

The batch is int32/float32 arrays (M, B, S): M micro-batches of B rows, B split over ``data``. The number of
micro-batches in use is traced, so a ramp of the batch never compiles again.
"""

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
from mtnlg_jax.model.loss import cross_entropy
from mtnlg_jax.model.transformer import abstract_model, init_parameters
from mtnlg_jax.parallel.collectives import axis_index, gather_weights, reduce_gradients, sum_over, vary
from mtnlg_jax.parallel.mesh import AXES, shardings_of, specs_of
from mtnlg_jax.train.optimizer import make_optimizer
from mtnlg_jax.train.schedule import learning_rate

BATCH_KEYS = ("tokens", "labels", "segment_ids", "positions", "weights", "rows")


def init_state(config: Config, mesh: Mesh):
    """{"params", "opt_state", "step", "samples", "bad", "skipped"}: float32 masters and moments, born sharded.
    ``bad`` counts non-finite steps in a row, ``skipped`` all of them."""
    shardings = state_shardings(config, mesh)
    params = init_parameters(config.model, config.train.seed, shardings["params"])
    rest = {key: value for key, value in shardings.items() if key != "params"}
    return {"params": params, **jax.jit(functools.partial(_rest, config), out_shardings=rest)(params)}


def _rest(config: Config, params):
    zero = jnp.int32(0)
    return {"opt_state": make_optimizer(config.optimizer).init(params), "step": zero, "samples": zero,
            "bad": zero, "skipped": zero}


def abstract_state(config: Config, mesh: Mesh):
    """The state as ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    params = abstract_model(config.model)[1]
    shapes = {"params": params, **jax.eval_shape(functools.partial(_rest, config), params)}
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
                        shapes, shardings_of(shapes, mesh, config.mesh.zero))


def state_shardings(config: Config, mesh: Mesh):
    return jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh))


def make_loss_and_gradients(config: Config, mesh: Mesh, causal: bool) -> Callable:
    """(params, batch, micro_batches, key) -> (mean loss, gradients like params), over the whole mesh."""
    graph, params = abstract_model(config.model)
    dtype, zero = jnp.dtype(config.train.compute_dtype), config.mesh.zero

    def micro_loss(weights, micro, total, key):
        """This device's share of the loss of one micro-batch. Devices along ``tensor`` hold the same number;
        each one's gradient is only its own part, which is what makes the parts add up."""
        model, prepare = _compute_model(graph, weights, dtype, zero)
        x_BSD = model.hidden(
            micro["tokens"], positions_BS=micro["positions"], segment_ids_BS=micro["segment_ids"], causal=causal,
            prepare=prepare, remat=config.train.recompute == "full",
            dropout_key=key if config.model.dropout_rate else None, rows_B=micro["rows"])
        train = config.train
        loss = cross_entropy(x_BSD.reshape(-1, x_BSD.shape[-1]), model.head(), micro["labels"].reshape(-1),
                             micro["weights"].reshape(-1), train.loss_chunk, train.label_smoothing)
        return loss / total

    def local(params, batch, count, key):
        total = jnp.maximum(sum_over(batch["weights"].sum(), "data"), 1.0)
        params, batch, total = vary((params, batch, total))
        weights = params if zero == 3 else gather_weights(params, dtype, zero)

        def one(m, carry):
            loss, grads = carry
            micro = {name: lax.dynamic_index_in_dim(x, m, 0, keepdims=False) for name, x in batch.items()}
            part, new = jax.value_and_grad(micro_loss)(weights, micro, total, jax.random.wrap_key_data(key))
            return loss + part, jax.tree.map(lambda a, g: a + g.astype(jnp.float32), grads, new)

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
        start = vary((jnp.float32(0), zeros))
        if batch["tokens"].shape[0] == 1:
            loss, grads = one(0, start)
        else:
            loss, grads = lax.fori_loop(0, count, one, start)
        return _report(loss), reduce_gradients(grads, zero, scattered=zero == 3)

    return _over_mesh(local, mesh, params, zero, lambda specs: (P(), specs))


def make_eval(config: Config, mesh: Mesh, causal: bool) -> Callable:
    """(params, batch) -> (sum of weight x -log p, sum of weights) of a batch (M, B, S)."""
    graph, params = abstract_model(config.model)
    dtype, zero = jnp.dtype(config.train.compute_dtype), config.mesh.zero

    def local(params, batch, count, key):
        params, batch = vary((params, batch))
        weights = params if zero == 3 else gather_weights(params, dtype, zero)

        def one(micro):
            model, prepare = _compute_model(graph, weights, dtype, zero)
            x_BSD = model.hidden(micro["tokens"], positions_BS=micro["positions"],
                                 segment_ids_BS=micro["segment_ids"], causal=causal, prepare=prepare)
            return cross_entropy(x_BSD.reshape(-1, x_BSD.shape[-1]), model.head(),
                                 micro["labels"].reshape(-1), micro["weights"].reshape(-1), config.train.loss_chunk)

        return _report(lax.map(one, batch).sum()), _report(batch["weights"].sum())

    return jax.jit(_over_mesh(local, mesh, params, zero, lambda specs: (P(), P())))


def _compute_model(graph, weights, dtype, zero):
    """The module over compute weights, and how a layer's weights are prepared inside the scan."""
    if zero != 3:
        return nnx.merge(graph, weights), lambda layer: layer
    gathered = gather_weights({k: v for k, v in weights.items() if k != "blocks"}, dtype, zero)
    whole = type(weights)({**gathered, "blocks": weights["blocks"]})

    def prepare(layer):
        return gather_weights({"blocks": layer}, dtype, zero)["blocks"]

    return nnx.merge(graph, whole), prepare


def _report(x):
    """The sum over ``data`` of a number that devices along the other axes hold alike, typed as one number."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not manual:
        return x
    first = functools.reduce(jnp.logical_and, [axis_index(axis) == 0 for axis in AXES if axis != "data"])
    return lax.psum(jnp.where(first, vary(x), 0.0), AXES)


def _over_mesh(local, mesh: Mesh, params, zero: int, out_specs):
    """``local`` as one shard_map, manual over every axis; on a single device, ``local`` itself."""
    specs = specs_of(params, zero)
    rows = {name: P(None, "data") for name in BATCH_KEYS}

    def run(params, batch, count=None, key=None):
        if key is None:
            key = jax.random.key_data(jax.random.key(0))
        if count is None:
            count = jnp.int32(batch["tokens"].shape[0])
        if mesh.size == 1:
            return local(params, batch, count, key)
        return jax.shard_map(local, mesh=mesh, in_specs=(specs, rows, P(), P()), out_specs=out_specs(specs))(
            params, batch, count, key)

    return run


def make_train_step(config: Config, mesh: Mesh, causal: bool) -> Callable:
    """jitted (state, batch, micro_batches, sequences, rate_scale) -> (state, metrics); the state is donated.

    A step whose loss or gradient norm is not finite changes nothing but the counters."""
    optimizer = make_optimizer(config.optimizer)
    loss_and_gradients = make_loss_and_gradients(config, mesh, causal)
    shardings = state_shardings(config, mesh)

    def step(state, batch, micro_batches, sequences, rate_scale):
        key = jax.random.fold_in(jax.random.key(config.train.seed), state["step"])
        loss, grads = loss_and_gradients(state["params"], batch, micro_batches, jax.random.key_data(key))
        grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        samples = state["samples"] + sequences
        rate = learning_rate(config, samples) * rate_scale
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = jax.tree.map(lambda p, u: p - rate * u, state["params"], updates)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        new_state = {
            "params": keep(params, state["params"]), "opt_state": keep(opt_state, state["opt_state"]),
            "step": state["step"] + 1, "samples": samples,
            "bad": jnp.where(good, 0, state["bad"] + 1), "skipped": state["skipped"] + ~good,
        }
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate, "bad": new_state["bad"],
                   "skipped": new_state["skipped"]}
        return new_state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def put_batch(rows_of: Callable, shape: tuple[int, int, int], mesh: Mesh):
    """The global batch (M, B, S) as sharded arrays. ``rows_of(numbers)`` gives a dict of (n, S) arrays for
    global row numbers m * B + b; it is asked only for the rows that this process holds."""
    micro, rows, length = shape
    sharding = NamedSharding(mesh, P(None, "data"))
    parts: dict[tuple, dict] = {}

    def part(index) -> dict:
        key = (index[1].start or 0, rows if index[1].stop is None else index[1].stop)
        if key not in parts:
            numbers = (np.arange(micro)[:, None] * rows + np.arange(*key)).reshape(-1)
            flat = rows_of(numbers) | {"rows": numbers.astype(np.int32)}
            parts[key] = {name: x.reshape(micro, key[1] - key[0], *x.shape[1:]) for name, x in flat.items()}
        return parts[key]

    def array(name):
        size = (micro, rows) if name == "rows" else shape
        return jax.make_array_from_callback(size, sharding, lambda index: part(index)[name])

    return {name: array(name) for name in BATCH_KEYS}
