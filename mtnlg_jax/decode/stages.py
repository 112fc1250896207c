"""The layers of a decoder over the stages of a pipeline, the mesh axis ``pipe``.

Stage p of P holds the L/P layers from number p L/P on, and their cache. The layers with number i
of all stages are one stack, split over pipe: parameters (P, ...) and caches (B, P K, T, H). So
whatever selects rows or positions of a cache need not know of stages.

Rows are cut into M micro-batches. In tick t stage p applies its layers to micro-batch t - p, and
sends the result to stage p + 1. P=2 stages, M=3 micro-batches, P + M - 1 ticks:

    tick       0     1     2     3
    stage 0    0     1     2     .
    stage 1    .     0     1     2

All stages run one program in lockstep. In the bubble (.) a stage computes with whatever it holds,
and writes nothing to a cache. Rows that write one token after the other have no bubble between
their tokens (`stream`).

Embedding and head are outside: every stage computes them for all rows, split over the other axes.
"""

# Shapes: B rows, S query positions, D width, K key/value heads, T key positions, H head width

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.config.checks import near_divisors
from mtnlg_jax.decode.quantized import on_cpu
from mtnlg_jax.parallel.auto import auto_size
from mtnlg_jax.parallel.collectives import to_next

# Tokens whose products take as long as reading the weights: FLOP/s over bytes/s, for weights of 2
# bytes. 166 on v5p, 295 on H100, 560 on v6e by their data sheets. A CPU computes from the first.
RIDGE = 256


class Layer(NamedTuple):
    """What the attention of a layer can use beside its queries, keys and values.

    The rows are those of x: all of them, or those of a micro-batch.
    """

    number: int  # of the layer in its stage, whose LayerSpec is that of all its stack
    cache: Any  # the layer's entry of the cache that is written, or None
    shared: Any  # the layer's entry of a cache that is only read, or None
    rows: Any  # arrays of the rows
    live: jax.Array | None  # False in a bubble, where nothing may be written; None: never a bubble


class Flow(NamedTuple):
    """What goes through the layers. The first dim of an array has the same number of entries for
    each row, or is 1 for all of them; scalars are for all."""

    x_BSD: jax.Array
    positions_BS: jax.Array
    rows: Any


def stages_of(config: ModelConfig, layers: tuple[Any, ...]) -> int:
    """Return the number of stages over which the ``layers`` of a decoder are split."""
    return config.num_layers // len(layers)


def check_stages(config: ModelConfig, stages: int) -> None:
    """Raise ValueError if ``stages`` cannot hold the layers of ``config``."""
    number = config.num_layers
    if number % stages:
        raise ValueError(
            f"model.num_layers={number} is not divisible by mesh.pipe={stages}; "
            f"try mesh.pipe={near_divisors(number, stages)}"
        )
    here = number // stages
    for layer in range(number):
        if config.layer(layer) != config.layer(layer % here):
            period = len(config.layer_pattern)
            possible = [
                str(parts)
                for parts in range(1, number + 1)
                if number % parts == 0 and number // parts % period == 0
            ]
            raise ValueError(
                f"mesh.pipe={stages} gives each stage {here} of {number} layers, which are not "
                f"whole periods of model.layer_pattern ({period} layers), so that stages would "
                f"differ; try mesh.pipe={' or '.join(possible) or 1}, or raise mesh.tensor"
            )


def stacked(layers: tuple[Any, ...], stages: int) -> tuple[Any, ...]:
    """Return all layers of a model as the stacks of ``stages``, each with a leading P.

    A single stage holds them as they are.
    """
    if stages == 1:
        return layers
    here = len(layers) // stages
    return tuple(
        jax.tree.map(lambda *parts: jnp.stack(parts), *layers[i::here]) for i in range(here)
    )


class Cost(NamedTuple):
    """What a tick costs, in bytes read: ``fixed``, and 1/M of ``divided``."""

    fixed: float
    divided: float

    def tick(self, count: int) -> float:
        return self.fixed + self.divided / count


def cost_of(layers: tuple[Any, ...], tokens: int, cache: tuple[Any, ...] | None) -> Cost:
    """Return the cost of ``tokens`` of all rows, each of which reads its own cache."""
    weights = _bytes(layers)
    # Rows are split over data, weights are not.
    rows = weights * tokens / (1 if on_cpu() else RIDGE) + _bytes(cache)
    return Cost(weights, rows / auto_size("data"))


def micro_batches(units: int, stages: int, cost: Cost) -> int:
    """Return into how many micro-batches `through` cuts ``units`` rows, or groups of rows.

    It is the number that takes the least time. A few rows stay together: cut, they would read the
    weights more often.
    """
    return min(_counts(units), key=lambda m: (stages + m - 1) * cost.tick(m))


def in_flight(units: int, stages: int, cost: Cost) -> int:
    """Return into how many micro-batches `stream` should cut ``units``; 0 if `through` is faster.

    A step takes M ticks, and M must be P or more.
    """
    count = next((m for m in _counts(units) if m >= stages), 0)
    if stages == 1 or not count:
        return 0
    alone = micro_batches(units, stages, cost)
    return count if count * cost.tick(count) < (stages + alone - 1) * cost.tick(alone) else 0


def _counts(units: int) -> list[int]:
    """Return the possible numbers of micro-batches: each has equal units of every data shard."""
    parts = auto_size("data")
    here = units // parts if units % parts == 0 else units
    return [m for m in range(1, here + 1) if here % m == 0]


def through(
    apply: Callable,
    layers: tuple[Any, ...],
    flow: Flow,
    cache: tuple[Any, ...] | None,
    shared: tuple[Any, ...] | None,
    *,
    stages: int,
    units: int,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Send the rows through the layers of all stages.

    Args:
      apply: (layers, flow, cache, shared, live) -> (x_BSD, written), one stage; ``written`` has an
        entry for each layer, like ``cache`` if that is given.
      cache, shared: as in `Layer`, an entry for each layer of a stage; None: no cache.
      units: rows that must stay in one micro-batch are one unit; B is a multiple.

    Returns: the output of the last stage, and what the layers wrote, for all rows.
    """
    if stages == 1:
        return apply(layers, flow, cache, shared, None)
    if auto_size("pipe") != stages:
        raise ValueError(
            f"the layers are split over {stages} pipeline stages, and the mesh in context has "
            f"mesh.pipe={auto_size('pipe')}; call what is decorated with over_its_mesh"
        )
    count = micro_batches(units, stages, cost_of(layers, flow.positions_BS.size, cache))

    def region(layers, flow, cache, shared):
        layers = jax.tree.map(lambda leaf: leaf[0], layers)
        here = lax.axis_index("pipe")
        made = cache is None

        def stage(flow, cache, shared, live):
            return apply(layers, flow, cache, shared, live)

        if made:
            start = _part((flow, shared), 0, count, units)
            _, shapes = jax.eval_shape(lambda pair: stage(pair[0], None, pair[1], None), start)
            cache = jax.tree.map(
                lambda x: jnp.zeros((x.shape[0] * count, *x.shape[1:]), x.dtype), shapes
            )

        def tick(carry, number):
            arrived, outputs, cache = carry
            m = number - here
            live = (m >= 0) & (m < count)
            m = jnp.clip(m, 0, count - 1)
            now, held, read = _part((flow, cache, shared), m, count, units)
            now = now._replace(x_BSD=jnp.where(here == 0, now.x_BSD, arrived))
            y_BSD, written = stage(now, None if made else held, read, live)
            if made:
                written = jax.tree.map(lambda new, old: jnp.where(live, new, old), written, held)
            # Only what the last stage stores is read. Its bubble comes first, and is overwritten.
            stored = _stored((outputs, cache), (y_BSD, written), m, count, units)
            return (lax.ppermute(y_BSD, "pipe", to_next(stages)), *stored), None

        first = _part(flow.x_BSD, 0, count, units)
        begin = jnp.zeros_like(first), jnp.zeros_like(flow.x_BSD), cache
        (_, outputs, cache), _ = lax.scan(tick, begin, jnp.arange(stages + count - 1))
        return outputs[None], cache

    outputs, cache = _manual(region, (P("pipe"), P(), _HELD, _HELD), (P("pipe"), _HELD))(
        layers, flow, cache, shared
    )
    return outputs[-1], cache


def stream(
    apply: Callable,
    layers: tuple[Any, ...],
    cache: tuple[Any, ...],
    state: Any,
    fixed: Any,
    *,
    enter: Callable,
    leave: Callable,
    flow_of: Callable,
    steps: int,
    count: int,
    stages: int,
    units: int,
) -> tuple[tuple[Any, ...], Any]:
    """Take ``steps`` steps with every row: a micro-batch begins its next one when it is through.

    With M >= P micro-batches no stage waits between steps: P=2, M=2, two steps (a, b):

        tick       0     1     2     3     4
        stage 0   0a    1a    0b    1b     .
        stage 1    .    0a    1a    0b    1b

    Args:
      apply, layers, cache: as for `through`.
      state, fixed: pytrees of arrays of all rows; steps change ``state`` alone.
      enter: state -> x_BSD; leave: (y_BSD, state, fixed) -> state after the step. Both are of a
        micro-batch.
      flow_of: state -> (positions_BS, rows) of the step, of all rows.

    Returns: the cache and the state.
    """
    ticks = steps * count

    def region(layers, cache, x_BSD, arrived, flow, tick):
        layers, arrived = jax.tree.map(lambda leaf: leaf[0], (layers, arrived))
        here = lax.axis_index("pipe")
        live = (tick >= here) & (tick - here < ticks)
        m = jnp.mod(tick - here, count)
        held, now = _part((cache, flow), m, count, units)
        x_BSD = jnp.where(here == 0, x_BSD, arrived)
        y_BSD, written = apply(layers, Flow(x_BSD, *now), held, None, live)
        cache = _stored(cache, written, m, count, units)
        return lax.ppermute(y_BSD, "pipe", to_next(stages))[None], cache

    inside = _manual(region, (P("pipe"), _HELD, P(), P("pipe"), P(), P()), (P("pipe"), _HELD))

    def one(carry, tick):
        cache, state, arrived = carry
        x_BSD = enter(_part(state, tick % count, count, units))
        arrived, cache = inside(layers, cache, x_BSD, arrived, flow_of(state), tick)
        # The ring brings the first stage what leaves the last one.
        m = jnp.mod(tick - stages + 1, count)
        before, constants = _part((state, fixed), m, count, units)
        after = leave(arrived[0], before, constants)
        # In the first ticks nothing has come through yet.
        after = jax.tree.map(
            lambda new, old: jnp.where(tick >= stages - 1, new, old), after, before
        )
        return (cache, _stored(state, after, m, count, units), arrived), None

    like = jax.eval_shape(lambda: enter(_part(state, 0, count, units)))
    arrived = jnp.zeros((stages, *like.shape), like.dtype)
    start = cache, state, arrived
    (cache, state, _), _ = lax.scan(one, start, jnp.arange(ticks + stages - 1))
    return cache, state


_HELD = P(None, "pipe")


def _manual(region: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Return ``region`` as a program of each stage."""
    mesh = jax.sharding.get_abstract_mesh()
    # Axes of size 1 are manual too, so that without data and tensor all of them are: kernels then
    # need no partitioning.
    alone = {axis for axis, size in mesh.shape.items() if size == 1}
    return jax.shard_map(
        region,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={"pipe", *alone},
        check_vma=False,
    )


def by_parts(attend: Callable, layer: Layer, q, k, v, **options):
    """Return ``attend(layer, q, k, v, **options)`` of a stage, split over data and tensor by hand.

    Attention and cache need nothing of other rows and heads. XLA's partitioner aborts on scatters
    in a region that is manual over pipe alone (jax 0.12: "Check failed: num_replica_groups").
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {axis for axis in mesh.axis_names if auto_size(axis) > 1}
    if not axes:
        return attend(layer, q, k, v, **options)

    def divides(axis, number):
        return axis if axis in axes and number % mesh.shape[axis] == 0 else None

    # What an axis does not divide is whole on its devices, and they compute the same.
    rows = divides("data", k.shape[0])
    heads = divides("tensor", k.shape[2])
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in options.items() if name not in arrays}

    def of_rows(x, *more):
        # One entry for all rows is whole.
        return P(rows if x.shape[0] > 1 else None, *more)

    def cached(tree):
        return jax.tree.map(lambda x: of_rows(x, heads), tree)

    def one(cache, shared, given, live, arrays, q, k, v):
        part = Layer(layer.number, cache, shared, given, live)
        return attend(part, q, k, v, **static, **arrays)

    by_head = P(rows, None, heads)
    found = (by_head, P(rows, heads)) if static.get("return_lse") else by_head
    return jax.shard_map(
        one,
        in_specs=(
            cached(layer.cache),
            cached(layer.shared),
            jax.tree.map(lambda x: of_rows(x) if x.ndim else P(), layer.rows),
            P(),
            P(heads),
            by_head,
            by_head,
            by_head,
        ),
        out_specs=(found, P(rows, heads)),
        axis_names=axes,
        check_vma=False,
    )(layer.cache, layer.shared, layer.rows, layer.live, arrays, q, k, v)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# Micro-batch m has the units u with u % M == m, so that each has units of every data shard.


def _cut(x: jax.Array, count: int, units: int) -> jax.Array:
    """Return ``x`` with dims (units of a micro-batch, M, rows of a unit) in place of its first."""
    return x.reshape(units // count, count, x.shape[0] // units, *x.shape[1:])


def _part(tree: Any, m: int | jax.Array, count: int, units: int) -> Any:
    """Return the arrays of micro-batch ``m``."""

    def one(x):
        if count == 1 or x.ndim == 0 or x.shape[0] == 1:
            return x
        part = lax.dynamic_index_in_dim(_cut(x, count, units), m, 1, keepdims=False)
        return part.reshape(x.shape[0] // count, *x.shape[1:])

    return jax.tree.map(one, tree)


def _stored(tree: Any, parts: Any, m: jax.Array, count: int, units: int) -> Any:
    """Return ``tree`` with ``parts`` as the arrays of micro-batch ``m``."""

    def one(x, part):
        if count == 1:
            return part
        part = part.reshape(units // count, part.shape[0] * count // units, *x.shape[1:])
        new = lax.dynamic_update_index_in_dim(_cut(x, count, units), part, m, 1)
        return new.reshape(x.shape)

    return jax.tree.map(one, tree, parts)
