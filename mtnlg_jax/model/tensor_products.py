"""The products of a half block, and how the sequence is gathered before and scattered after them.

Between half blocks the mesh axis ``tensor`` splits the sequence. The first products need all of it,
and the last one leaves each device a part of a sum. With mesh.tp_comm_overlap both become rings
(Wang 2023): a device multiplies the chunk that it holds while the next one is under way.
"""

# Shapes: B rows, S query positions, D width; a chunk is the part of S that one device holds

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mtnlg_jax.model.parts import apart, multiply
from mtnlg_jax.parallel.collectives import axis_index, axis_size, gather, scatter_sum, to_next, vary

# The einsum of a product, and its weight.
Factor = tuple[str, jax.Array | Callable]


def multiply_each(x: jax.Array, factors: Sequence[Factor]) -> list[jax.Array]:
    """Return the product of ``x`` with each of ``factors``."""
    return [multiply(dims, x, weight) for dims, weight in factors]


def multiply_gathered(
    x_BSD: jax.Array, factors: Sequence[Factor], overlap: bool = False
) -> list[jax.Array]:
    """Return the product of the whole sequence with each of ``factors``, from this device's chunk.

    With ``overlap`` one ring serves all of them.
    """
    if not _rings(overlap, [weight for _, weight in factors]):
        return multiply_each(gather(x_BSD, "tensor", 1), factors)
    dims = tuple(dims for dims, _ in factors)
    weights = tuple(weight for _, weight in factors)
    return checkpoint_name(_multiply_gathered(dims, x_BSD, weights), "product")


def multiply_scattered(
    dims: str, x: jax.Array, weight: jax.Array | Callable, overlap: bool = False
) -> jax.Array:
    """Return this device's chunk of the product of ``x`` and ``weight``, summed over tensor."""
    # Each device has the sum over its own heads or its part of F only; the sum completes it.
    if not _rings(overlap, [weight]):
        return scatter_sum(multiply(dims, x, weight), "tensor", 1)
    return _multiply_scattered(dims, x, weight)


def _rings(overlap: bool, weights: Sequence[jax.Array | Callable]) -> bool:
    # A callable weight, as one with an adapter, has products of its own.
    return overlap and axis_size("tensor") > 1 and not any(map(callable, weights))


# --- rings: both ways round, so that both directions of a link are used


def _chunks(x: jax.Array) -> Iterator[tuple[int, jax.Array]]:
    """Yield (offset, chunk of the device ``offset`` places further on in the ring)."""
    parts = axis_size("tensor")
    onward = to_next(parts)
    back = [(target, source) for source, target in onward]
    yield 0, x
    before = after = x
    for step in range(1, parts // 2 + 1):
        before = lax.ppermute(before, "tensor", onward)
        yield -step, before
        if 2 * step < parts:
            after = lax.ppermute(after, "tensor", back)
            yield step, after


def _sum_of_chunks(part: Callable[[int], jax.Array]) -> jax.Array:
    """Return the sum over devices of this device's chunk; the transpose of `_chunks`.

    ``part(offset)`` is what this device adds to the chunk of the device ``offset`` places further
    on, just before the sum is passed on.
    """
    parts = axis_size("tensor")
    onward = to_next(parts)
    back = [(target, source) for source, target in onward]
    total = part(0)
    from_after = _passed([part(-step) for step in range((parts - 1) // 2, 0, -1)], back)
    if from_after is not None:
        total = total + from_after
    from_before = _passed([part(step) for step in range(parts // 2, 0, -1)], onward)
    assert from_before is not None, "a ring has two devices or more"
    # Apart: the last product does not wait for what arrives last.
    return apart(total) + from_before


def _passed(parts: Sequence[jax.Array], direction: list[tuple[int, int]]) -> jax.Array | None:
    """Return the sum that arrives, where each device on the way adds its own of ``parts``."""
    total = None
    for part in parts:
        total = lax.ppermute(part if total is None else total + part, "tensor", direction)
    return total


def _start(offset: int, length: int) -> jax.Array | int:
    """Return the first position of the chunk at ``offset``."""
    return (axis_index("tensor") + offset) % axis_size("tensor") * length


def _chunk_of(x: jax.Array, offset: int) -> jax.Array:
    length = x.shape[1] // axis_size("tensor")
    return lax.dynamic_slice_in_dim(x, _start(offset, length), length, 1)


def _room_for(chunk: jax.Array) -> jax.Array:
    """Return an array for all chunks of the sequence."""
    shape = list(chunk.shape)
    shape[1] *= axis_size("tensor")
    return vary(jnp.zeros(shape, chunk.dtype))


def _put(whole: jax.Array, chunk: jax.Array, offset: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, chunk, _start(offset, chunk.shape[1]), 1)


def _gathered(x: jax.Array) -> jax.Array:
    whole = _room_for(x)
    for offset, chunk in _chunks(x):
        whole = _put(whole, chunk, offset)
    return whole


# --- the two products with their gradients

# The transpose by autodiff would keep all chunks. These keep the device's own, as a gather does.


def _of_input(dims: str) -> str:
    """Return the einsum (gradient of the product, weight) -> gradient of the input."""
    terms, product = dims.split("->")
    x, weight = terms.split(",")
    return f"{product},{weight}->{x}"


def _of_weight(dims: str) -> str:
    """Return the einsum (input, gradient of the product) -> gradient of the weight."""
    terms, product = dims.split("->")
    x, weight = terms.split(",")
    return f"{x},{product}->{weight}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply_gathered(dims: tuple[str, ...], x, weights: tuple):
    products: list = [None] * len(dims)
    for offset, chunk in _chunks(x):
        for number, (each, weight) in enumerate(zip(dims, weights, strict=True)):
            part = jnp.einsum(each, chunk, weight)
            whole = _room_for(part) if products[number] is None else products[number]
            products[number] = _put(whole, part, offset)
    return products


def _multiply_gathered_forward(dims, x, weights):
    return _multiply_gathered(dims, x, weights), (x, weights)


def _multiply_gathered_backward(dims, kept, grads):
    x, weights = kept

    def part(offset):
        terms = zip(dims, grads, weights, strict=True)
        return sum(
            jnp.einsum(_of_input(each), _chunk_of(grad, offset), weight)
            for each, grad, weight in terms
        )

    whole = _gathered(x)
    d_weights = tuple(
        jnp.einsum(_of_weight(each), whole, grad) for each, grad in zip(dims, grads, strict=True)
    )
    return _sum_of_chunks(part), d_weights


_multiply_gathered.defvjp(_multiply_gathered_forward, _multiply_gathered_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply_scattered(dims: str, x, weight):
    return _sum_of_chunks(lambda offset: jnp.einsum(dims, _chunk_of(x, offset), weight))


def _multiply_scattered_forward(dims, x, weight):
    return _multiply_scattered(dims, x, weight), (x, weight)


def _multiply_scattered_backward(dims, kept, grad):
    x, weight = kept
    whole = _room_for(grad)
    d_x = None
    for offset, chunk in _chunks(grad):
        whole = _put(whole, chunk, offset)
        part = jnp.einsum(_of_input(dims), chunk, weight)
        d_x = _put(_room_for(part) if d_x is None else d_x, part, offset)
    return d_x, jnp.einsum(_of_weight(dims), x, whole)


_multiply_scattered.defvjp(_multiply_scattered_forward, _multiply_scattered_backward)
