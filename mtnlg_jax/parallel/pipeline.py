"""The pipeline: two schedules over the ``pipe`` axis, and the way of layers to their stages.

A micro-batch passes P stages in V rounds (V=1: once). In round v, stage p applies its chunk v: the
L/(P V) layers from number (v P + p) L/(P V) on. That is the interleaving of Megatron-LM (Narayanan
2021, section 2.2). Both schedules run inside the manual region, where every stage executes the same
program in lockstep: one tick after the other, with a permute between neighbors at its end.

1F1B, P=4 stages, M=4 micro-batches. Each tick a stage does one forward (F) and one backward (B)
pass. In tick t stage p does F of micro-batch t - p and B of micro-batch t - 2 (P - 1) + p:

    tick       0     1     2     3     4     5     6     7     8     9
    stage 0   F0    F1    F2    F3     .     .    B0    B1    B2    B3
    stage 1    .    F0    F1    F2    F3    B0    B1    B2    B3     .
    stage 2    .     .    F0    F1   F2B0  F3B1   B2    B3     .     .
    stage 3    .     .     .   F0B0  F1B1  F2B2  F3B3    .     .     .

A stage keeps its input from F to B, at most 2 (P - 1) ticks later: 2 P - 1 slots are enough for any
M. There are M + 2 (P - 1) ticks.

Circular, P=4 stages, V=2 rounds, G=1 group of P micro-batches. "2b" is micro-batch 2 in its second
round. In tick t stage p is at step s = t - p: group s // (P V), round s % (P V) // P, micro-batch
s % P of its group:

    tick       0     1     2     3     4     5     6     7     8     9    10
    stage 0   0a    1a    2a    3a    0b    1b    2b    3b     .     .     .
    stage 1    .    0a    1a    2a    3a    0b    1b    2b    3b     .     .
    stage 2    .     .    0a    1a    2a    3a    0b    1b    2b    3b     .
    stage 3    .     .     .    0a    1a    2a    3a    0b    1b    2b    3b

The output of stage 3 enters stage 0 in the next tick: there is no bubble between rounds or groups.
A tick costs 1/V of the stage, so the bubble is (P - 1) / (V M). JAX differentiates these
G P V + P - 1 ticks; its backward pass runs the table from right to left.
"""

# Shapes: G groups of P micro-batches (P pipeline stages), B rows, S query positions, D width

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtnlg_jax.parallel.collectives import axis_index, axis_size, to_next, vary

# Number of the micro-batch where a stage waits. Look-ups clamp it to the last one.
BUBBLE = 2**30


def _at(array: jax.Array, index: int | jax.Array) -> jax.Array:
    # The index is traced: devices along pipe run one program and differ in it alone.
    return lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


def _rings(size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the permutations (source, target) to the right and to the left neighbor."""
    # A ring: the last stage sends to the first one, which is where the next round begins.
    right = to_next(size)
    return right, [(j, i) for i, j in right]


# --- layers


def to_rounds(layers: Any, rounds: int) -> Any:
    """Move layers from natural order to the stages that apply them. The transpose moves gradients.

    Args:
      layers: this device's part of the stacked layers in natural order, (L/P, ...).
    Returns: the chunks of this device's stage, (V, L/(P V), ...).
    """
    size = axis_size("pipe")
    here = axis_index("pipe")
    # Chunk k is stored on device k // V and belongs to device k % P. In each of V turns every
    # device sends one chunk and receives one. Let g = gcd(V, P). Devices whose numbers differ by
    # P / g would send to the same target, so the devices form g groups, and each group starts one
    # chunk after the one before.
    group_size = size // math.gcd(rounds, size)

    def one(leaf):
        # (V, L/(P V), ...): the layers stored here as V chunks.
        chunks = leaf.reshape(rounds, -1, *leaf.shape[1:])
        # The chunks are at home already.
        if rounds == 1 or size == 1:
            return chunks
        placed = jnp.zeros_like(chunks)
        # A Python loop: permutations must be known when the program is compiled. V is small.
        for turn in range(rounds):
            sent = [p * rounds + (turn + p // group_size) % rounds for p in range(size)]
            arrived = lax.ppermute(
                _at(chunks, (turn + here // group_size) % rounds),
                "pipe",
                [(p, chunk % size) for p, chunk in enumerate(sent)],
            )
            # Of the chunk that arrives at device p, the round in which p applies it.
            slots = [chunk // size for chunk in sorted(sent, key=lambda chunk: chunk % size)]
            placed = lax.dynamic_update_index_in_dim(placed, arrived, jnp.asarray(slots)[here], 0)
        return placed

    return jax.tree.map(one, layers)


# --- circular


def circular(stage: Callable, x_GBSD: jax.Array, rounds: int = 1) -> jax.Array:
    """Send G P micro-batches through all stages; JAX differentiates it.

    It has the memory of GPipe and the bubble of the interleaved schedule, (P - 1) / (V M).

    Args:
      stage: (round, micro-batch, x) -> y of x's shape. It applies this device's chunk of that
        round. Anything else it needs of a micro-batch it looks up by the micro-batch's number,
        which is BUBBLE if there is none.
      x_GBSD: the inputs of the micro-batches g P + (this device's index), for g in G.
    Returns: their outputs, on the devices of their inputs.
    """
    size = axis_size("pipe")
    here = axis_index("pipe")
    right, left = _rings(size)
    steps = size * rounds  # of one group
    groups = x_GBSD.shape[0]

    # A stage selects its weights inside the checkpoint, or they would be kept for every tick. This
    # way only the inputs of stages are.
    @jax.checkpoint
    def apply_stage(tick, x):
        # In the bubble a stage applies its first or last step to whatever it holds. Nobody reads
        # the result, so its gradient is 0.
        step = jnp.clip(tick - here, 0, groups * steps - 1)
        group = step // steps
        inside = step % steps
        micro_batch = jnp.where(step == tick - here, group * size + inside % size, BUBBLE)
        return vary(stage(inside // size, micro_batch, x))

    # One register, ``io``, both feeds stage 0 and carries finished micro-batches home. It moves
    # left once a tick, and stage 0 swaps a new micro-batch for a finished one.
    def one(carry, tick):
        ring, io, ys = carry
        group = tick // steps
        inside = tick % steps
        # Once a group each device puts its own micro-batch into the register. After k moves to the
        # left stage 0 holds micro-batch k.
        io = jnp.where(inside == 0, _at(x_GBSD, jnp.minimum(group, groups - 1)), io)
        # In the first P ticks of a group stage 0 begins the group's micro-batches. What the ring
        # brings it then is finished.
        swap = (here == 0) & (inside < size)
        x = jnp.where(swap, io, ring)
        io = jnp.where(swap, ring, io)
        ring = lax.ppermute(apply_stage(tick, x), "pipe", right)
        io = lax.ppermute(io, "pipe", left)
        # After P ticks of a group the whole group before it is back on its devices.
        home = jnp.maximum(group - 1, 0)
        done = jnp.where(inside == size - 1, io, _at(ys, home))
        return vary((ring, io, lax.dynamic_update_index_in_dim(ys, done, home, 0))), None

    nothing = jnp.zeros_like(x_GBSD)
    start = vary((nothing[0], nothing[0], nothing))
    # A scan and not a while loop, because JAX must differentiate it.
    (ring, io, ys), _ = lax.scan(one, start, jnp.arange(groups * steps + size - 1))
    # The last group has no successor whose ticks would bring it home.
    io = lax.ppermute(jnp.where(here == 0, ring, io), "pipe", left)
    return lax.dynamic_update_index_in_dim(ys, io, groups - 1, 0)


def circular_loss_and_gradients(
    embed: Callable,
    stage: Callable,
    loss: Callable,
    weights: Any,
    rest: Any,
    micro_batches: int,
    rounds: int,
) -> tuple[jax.Array, Any, Any]:
    """Return (loss, gradients of ``weights``, gradients of ``rest``) of all micro-batches, float32.

    Args:
      embed: (rest, micro-batches) -> inputs of the first layer, stacked.
      stage: (weights, round, m, x) -> y.
      loss: (rest, m, y) -> the loss of micro-batch m.
      weights: the layers of this stage.
      rest: the parameters outside the pipeline.
    """
    size = axis_size("pipe")
    here = axis_index("pipe")
    # Embedding and head are outside the pipeline: each device computes them for its own
    # micro-batches, so they add no bubble.
    mine = jnp.arange(micro_batches // size) * size + here

    def forward(weights, rest):
        x_GBSD = vary(embed(rest, mine))
        return circular(lambda round, m, x: stage(weights, round, m, x), x_GBSD, rounds)

    # The loss is not part of the differentiated pipeline: its gradient is taken for one micro-batch
    # at a time, so that the head's activations exist for only one.
    y_GBSD, back = jax.vjp(forward, weights, rest)

    def one(group, carry):
        total, held = carry  # each output is overwritten by its gradient, which saves a copy
        part, (d_rest, d_y) = jax.value_and_grad(loss, argnums=(0, 2))(
            rest, mine[group], _at(held, group)
        )
        return add(total, (part, d_rest)), lax.dynamic_update_index_in_dim(held, d_y, group, 0)

    # float32 sums, whatever the type of the weights.
    start = vary((jnp.float32(0), zeros(rest)))
    (total, d_head), d_y_GBSD = lax.fori_loop(0, len(mine), one, (start, y_GBSD))
    # One backward pass for all micro-batches, with the ticks in reverse.
    d_weights, d_embedding = back(d_y_GBSD)
    return total, d_weights, add(d_head, d_embedding)


# --- 1F1B


def one_f_one_b(
    embed: Callable,
    stage: Callable,
    loss: Callable,
    weights: Any,
    rest: Any,
    micro_batches: int | jax.Array,
    skip: bool = True,
) -> tuple[jax.Array, Any, Any]:
    """Return what `circular_loss_and_gradients` returns, by lockstep 1F1B.

    There is one round: ``embed`` is (rest, m) -> x and ``stage`` is (weights, m, x) -> y. Gradients
    are computed in the loop, so 2 P - 1 stage inputs are held for any number of micro-batches,
    which may be traced.

    ``skip`` leaves the work of the bubble out by a condition. Otherwise it is computed and its
    results are dropped.
    """
    size = axis_size("pipe")
    here = axis_index("pipe")
    right, left = _rings(size)
    # Slots of stage inputs, used in turn. A slot is free again one tick or more before its next
    # use.
    held = 2 * size - 1
    last = here == size - 1
    # The type of what stages send to each other: that of the embedding's output.
    shape = jax.eval_shape(lambda: embed(rest, jnp.int32(0)))
    nothing = jnp.zeros(shape.shape, shape.dtype)

    def when(condition, function, otherwise, *args):
        # A branch may hold collectives over the other axes: the condition depends on the stage and
        # the tick alone, so all their devices take the same branch. Permutes along pipe stay
        # outside.
        if skip:
            return lax.cond(
                condition, lambda *args: vary(function(*args)), lambda *args: vary(otherwise), *args
            )
        return jax.tree.map(
            lambda a, b: jnp.where(condition, a, b), vary(function(*args)), vary(otherwise)
        )

    def forward(t, arrived, inputs):
        """F of this tick: (output, inputs with the new one, loss, gradients of rest, of output)."""
        m = t - here
        busy = (m >= 0) & (m < micro_batches)
        m = jnp.clip(m, 0, micro_batches - 1)
        # Every stage embeds, though only the first one needs it: a look-up costs little, and so all
        # devices run the same collectives.
        x = jnp.where(here == 0, vary(embed(rest, m)), arrived)
        # In the bubble this overwrites a slot whose B is already done.
        inputs = lax.dynamic_update_index_in_dim(inputs, x, jnp.mod(t - here, held), 0)
        y = when(busy, lambda x: stage(weights, m, x), nothing, x)

        def head(y):
            value, (d_rest, d_y) = jax.value_and_grad(loss, argnums=(0, 2))(rest, m, y)
            return value, d_rest, d_y

        # The last stage forms the loss at once: its B of m is in the same tick as its F.
        no_loss = (jnp.float32(0), _zeros_like(rest), nothing)
        return y, inputs, *when(busy & last, head, no_loss, y)

    def backward(t, arrived, inputs):
        """B of this tick: gradients of (weights, input, rest) from that of the output."""
        # B of the last stage is in the tick of its F; each earlier stage follows a tick later.
        n = t - 2 * (size - 1) + here
        due = (n >= 0) & (n < micro_batches)
        x = _at(inputs, jnp.mod(n, held))
        n = jnp.clip(n, 0, micro_batches - 1)

        def through_stage(d_y, x):
            # Recomputes the stage, since only its input was kept.
            return jax.vjp(lambda w, x: vary(stage(w, n, x)), weights, x)[1](d_y)

        d_weights, d_x = when(due, through_stage, (_zeros_like(weights), nothing), arrived, x)
        through_embedding = jax.vjp(lambda rest: vary(embed(rest, n)), rest)[1]
        (d_rest,) = through_embedding(jnp.where(due & (here == 0), d_x, nothing))
        return d_weights, d_x, d_rest

    def tick(t, carry):
        y, d_x, inputs, d_weights, d_rest, total = carry
        # F before B, because the last stage needs both of one micro-batch in this tick.
        y, inputs, part, d_head, d_y = forward(t, y, inputs)
        d_stage, d_x, d_embedding = backward(t, jnp.where(last, d_y, d_x), inputs)
        return vary(
            (
                # The ring also joins both ends, which ignore what it brings them.
                lax.ppermute(y, "pipe", right),
                lax.ppermute(d_x, "pipe", left),
                inputs,
                add(d_weights, d_stage),
                add(add(d_rest, d_head), d_embedding),
                total + part,
            )
        )

    inputs = jnp.zeros((held, *nothing.shape), nothing.dtype)
    begin = vary((nothing, nothing, inputs, zeros(weights), zeros(rest), jnp.float32(0)))
    # A traced number of ticks is possible because nothing differentiates this loop.
    *_, d_weights, d_rest, total = lax.fori_loop(0, micro_batches + 2 * (size - 1), tick, begin)
    return total, d_weights, d_rest


# --- sums


def zeros(tree: Any) -> Any:
    """Return float32 zeros of the shapes of ``tree``, the start of sums by `add`."""
    return jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), tree)


def _zeros_like(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def add(total: Any, part: Any) -> Any:
    """Return ``total`` plus ``part``, of any type, in float32."""
    return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, part)
