"""The pipeline: two schedules over the ``pipe`` axis, and how layers in natural order reach their
stages.

A micro-batch passes P stages, V times round (V=1: once); chunk v of stage p holds the layers (v P +
p) L/(P V) onward, as Megatron-LM interleaves them (Narayanan 2021, section 2.2). Both schedules run
inside the manual region.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from mtnlg_jax.parallel.collectives import axis_index, axis_size, vary


def _at(array, index):
    return lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


def _rings(size: int):
    right = [(i, (i + 1) % size) for i in range(size)]
    return right, [(j, i) for i, j in right]


# --- layers
# ---------------------------------------------------------------------------------------------------


def to_rounds(leaves, rounds: int):
    """Layers in natural order, this device's L/P of them (L/P, ...), to its stage's chunks (V, L/(P
    V), ...).

    Chunk k lies with device k // V and belongs to device k % P. Slot by slot each device sends one
    chunk and
    gets one: where V and P share a divisor g, each g-th of the devices begins one slot later than
    the one before, so that no two send to the same. Its transpose brings gradients back."""
    size = axis_size("pipe")
    here = axis_index("pipe")
    block = size // math.gcd(rounds, size)

    def one(leaf):
        chunks = leaf.reshape(rounds, -1, *leaf.shape[1:])
        if rounds == 1 or size == 1:
            return chunks
        placed = jnp.zeros_like(chunks)
        for turn in range(rounds):
            sent = [p * rounds + (turn + p // block) % rounds for p in range(size)]
            arrived = lax.ppermute(
                _at(chunks, (turn + here // block) % rounds),
                "pipe",
                [(p, chunk % size) for p, chunk in enumerate(sent)],
            )
            slots = [chunk // size for chunk in sorted(sent, key=lambda chunk: chunk % size)]
            placed = lax.dynamic_update_index_in_dim(placed, arrived, jnp.asarray(slots)[here], 0)
        return placed

    return jax.tree.map(one, leaves)


# --- circular
# -------------------------------------------------------------------------------------------------


def circular(stage: Callable, x_GBSD, rounds: int = 1):
    """Sends G P micro-batches through all stages: GPipe's memory, the interleaved schedule's bubble
    of (P - 1) / (V M), differentiated by JAX.

    Args:
      stage: (round, micro-batch, x) -> y of x's shape: this device's chunk for that round. What it
        needs of a micro-batch besides x it looks up by the micro-batch's number.
      x_GBSD: the inputs of micro-batches g P + (this device's place), for g in G.
    Returns: their outputs, on the devices where their inputs were.

    One register, ``io``, both feeds stage 0 and carries the finished home: it goes left once a
    tick, and stage 0 swaps a fresh micro-batch for a finished one. Only the inputs of stages are
    kept for the backward pass."""
    size = axis_size("pipe")
    here = axis_index("pipe")
    right, left = _rings(size)
    turn = size * rounds
    groups = x_GBSD.shape[0]

    @jax.checkpoint  # a stage chooses its weights inside, or they would be kept for every tick
    def body(tick, x):
        busy = jnp.clip(tick - here, 0, groups * turn - 1)
        group = busy // turn
        inside = busy % turn
        return vary(stage(inside // size, group * size + inside % size, x))

    def one(carry, tick):
        ring, io, ys = carry
        group = tick // turn
        inside = tick % turn
        io = jnp.where(inside == 0, _at(x_GBSD, jnp.minimum(group, groups - 1)), io)
        swap = (here == 0) & (inside < size)
        x = jnp.where(swap, io, ring)
        io = jnp.where(swap, ring, io)
        ring = lax.ppermute(body(tick, x), "pipe", right)
        io = lax.ppermute(io, "pipe", left)
        home = jnp.maximum(group - 1, 0)
        done = jnp.where(inside == size - 1, io, _at(ys, home))
        return vary((ring, io, lax.dynamic_update_index_in_dim(ys, done, home, 0))), None

    nothing = jnp.zeros_like(x_GBSD)
    (ring, io, ys), _ = lax.scan(
        one, vary((nothing[0], nothing[0], nothing)), jnp.arange(groups * turn + size - 1)
    )
    io = lax.ppermute(jnp.where(here == 0, ring, io), "pipe", left)
    return lax.dynamic_update_index_in_dim(ys, io, groups - 1, 0)


def circular_loss_and_gradients(
    start: Callable,
    stage: Callable,
    finish: Callable,
    weights,
    rest,
    micro_batches: int,
    rounds: int,
):
    """(loss, gradients of ``weights``, gradients of ``rest``), all float32, of ``micro_batches``
    micro-batches.

    Args:
      start: (rest, micro-batches) -> what the first layer reads of each, stacked.
      stage: (weights, round, m, x) -> y. finish: (rest, m, y) -> loss.
      weights: this stage's layers. rest: the parameters outside the pipeline.
    Embedding and head stand outside: each device does those of its own micro-batches, so they cost
        no bubble."""
    size = axis_size("pipe")
    here = axis_index("pipe")
    mine = jnp.arange(micro_batches // size) * size + here

    def forward(weights, rest):
        x_GBSD = vary(start(rest, mine))
        return circular(lambda round, m, x: stage(weights, round, m, x), x_GBSD, rounds)

    y_GBSD, back = jax.vjp(forward, weights, rest)

    def one(group, carry):
        total, held = carry  # each output gives way to its gradient
        part, (d_rest, d_y) = jax.value_and_grad(finish, argnums=(0, 2))(
            rest, mine[group], _at(held, group)
        )
        return add(total, (part, d_rest)), lax.dynamic_update_index_in_dim(held, d_y, group, 0)

    (loss, d_rest), d_y_GBSD = lax.fori_loop(
        0, len(mine), one, (vary((jnp.float32(0), zeros(rest))), y_GBSD)
    )
    d_weights, d_rest_too = back(d_y_GBSD)
    return loss, d_weights, add(d_rest, d_rest_too)


# --- 1F1B
# -----------------------------------------------------------------------------------------------------


def one_f_one_b(
    start: Callable,
    stage: Callable,
    finish: Callable,
    weights,
    rest,
    micro_batches,
    skip: bool = True,
):
    """As ``circular_loss_and_gradients`` with one round and one micro-batch for ``start``, (rest,
    m) -> x, and without the round, (weights, m, x) -> y, for ``stage``, in lockstep 1F1B: gradients
    are formed in the loop, so 2 P - 1 inputs are held whatever the number of micro-batches, which
    may be traced.

    Each tick a stage does one forward and one backward. ``skip`` leaves out what a stage has
    nothing to do for, by a condition; without it the bubble is computed and thrown away."""
    size = axis_size("pipe")
    here = axis_index("pipe")
    right, left = _rings(size)
    held = 2 * size - 1
    last = here == size - 1
    empty = jax.eval_shape(lambda: start(rest, jnp.int32(0)))
    nothing = jnp.zeros(empty.shape, empty.dtype)

    def when(condition, function, otherwise, *args):
        if skip:
            return lax.cond(
                condition, lambda *args: vary(function(*args)), lambda *args: vary(otherwise), *args
            )
        return jax.tree.map(
            lambda a, b: jnp.where(condition, a, b), vary(function(*args)), vary(otherwise)
        )

    def tick(t, carry):
        forward, backward, inputs, d_weights, d_rest, loss = carry
        m = t - here
        busy = (m >= 0) & (m < micro_batches)
        m = jnp.clip(m, 0, micro_batches - 1)
        x = jnp.where(here == 0, vary(start(rest, m)), forward)
        inputs = lax.dynamic_update_index_in_dim(inputs, x, jnp.mod(t - here, held), 0)
        y = when(busy, lambda x: stage(weights, m, x), nothing, x)
        part, d_head, d_y = when(
            busy & last,
            lambda y: _flat(jax.value_and_grad(finish, argnums=(0, 2))(rest, m, y)),
            (jnp.float32(0), _zeros_like(rest), nothing),
            y,
        )

        n = t - 2 * (size - 1) + here
        due = (n >= 0) & (n < micro_batches)
        n = jnp.clip(n, 0, micro_batches - 1)
        x = _at(inputs, jnp.mod(t - 2 * (size - 1) + here, held))
        d_stage, d_x = when(
            due,
            lambda dy, x: jax.vjp(lambda w, x: vary(stage(w, n, x)), weights, x)[1](dy),
            (_zeros_like(weights), nothing),
            jnp.where(last, d_y, backward),
            x,
        )
        d_start = jax.vjp(lambda r: vary(start(r, n)), rest)[1](
            jnp.where(due & (here == 0), d_x, nothing)
        )[0]
        return vary(
            (
                lax.ppermute(y, "pipe", right),
                lax.ppermute(d_x, "pipe", left),
                inputs,
                add(d_weights, d_stage),
                add(add(d_rest, d_head), d_start),
                loss + part,
            )
        )

    begin = vary(
        (
            nothing,
            nothing,
            jnp.zeros((held, *nothing.shape), nothing.dtype),
            zeros(weights),
            zeros(rest),
            jnp.float32(0),
        )
    )
    *_, d_weights, d_rest, loss = lax.fori_loop(0, micro_batches + 2 * (size - 1), tick, begin)
    return loss, d_weights, d_rest


def _flat(value_and_gradients):
    value, (d_rest, d_y) = value_and_gradients
    return value, d_rest, d_y


def zeros(tree):
    """Float32, of the shapes of ``tree``: what ``add`` starts from."""
    return jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), tree)


def _zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def add(total, part):
    """``total`` with ``part``, of whatever type, added in float32."""
    return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, part)
