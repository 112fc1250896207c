"""The products of a half block, and how the sequence is gathered before and scattered after them.

Between half blocks the mesh axis ``tensor`` splits the sequence. The first products need all of it,
and the last one leaves each device a part of a sum. With mesh.tp_comm_overlap both become rings
(Wang 2023): a device multiplies the chunk that it holds while the next one is under way.
"""

# Shapes: B rows, S query positions, D inputs, F outputs (the other way round for a last product). A
# chunk is the part of S that one device holds.

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
    weights = _arrays([weight for _, weight in factors])
    if weights is None:
        return multiply_each(gather(x_BSD, "tensor", 1), factors)
    # Heads are one dim in products and in what the backward pass keeps. TPUs hold the last dim in
    # parts of 128: MT-NLG's heads of 160 would take the room and the time of 256.
    flat = tuple(weight.reshape(weight.shape[0], -1) for weight in weights)
    if overlap:
        products = checkpoint_name(_multiply_gathered(x_BSD, flat), "product")
    else:
        whole_BSD = gather(x_BSD, "tensor", 1)
        products = [_product(whole_BSD, weight_DF) for weight_DF in flat]
    return [
        product_BSF.reshape(*product_BSF.shape[:2], *weight.shape[1:])
        for product_BSF, weight in zip(products, weights, strict=True)
    ]


def multiply_scattered(
    dims: str, x: jax.Array, weight: jax.Array | Callable, overlap: bool = False
) -> jax.Array:
    """Return this device's chunk of the product of ``x`` and ``weight``, summed over tensor."""
    # Each device has the sum over its own heads or its part of F only; the sum completes it.
    weights = _arrays([weight])
    if weights is None:
        return scatter_sum(multiply(dims, x, weight), "tensor", 1)
    x_BSF = x.reshape(*x.shape[:2], -1)
    weight_FD = weights[0].reshape(-1, weights[0].shape[-1])
    if overlap:
        return _multiply_scattered(x_BSF, weight_FD)
    return scatter_sum(_product(x_BSF, weight_FD), "tensor", 1)


def _arrays(weights: Sequence[jax.Array | Callable]) -> list[jax.Array] | None:
    """Return ``weights`` if tensor splits them and all are arrays, else None."""
    # A callable weight, as one with an adapter, has products of its own.
    arrays = [weight for weight in weights if not callable(weight)]
    return arrays if axis_size("tensor") > 1 and len(arrays) == len(weights) else None


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
    """Return the sum that arrives, to which each device on the way adds its own of ``parts``."""
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


# --- the two products with their gradients

# The transpose by autodiff would keep all chunks. These keep the device's own chunk, as a gather
# does.
# The gradient of a weight is one product of all chunks: a sum of one for each would be slower.


def _product(x_BSD: jax.Array, weight_DF: jax.Array) -> jax.Array:
    return jnp.einsum("BSD,DF->BSF", x_BSD, weight_DF)


def _of_input(grad_BSF: jax.Array, weight_DF: jax.Array) -> jax.Array:
    return jnp.einsum("BSF,DF->BSD", grad_BSF, weight_DF)


def _of_weight(x_BSD: jax.Array, grad_BSF: jax.Array) -> jax.Array:
    return jnp.einsum("BSD,BSF->DF", x_BSD, grad_BSF)


@jax.custom_vjp
def _multiply_gathered(x_BSD, weights):
    products: list = [None] * len(weights)
    for offset, chunk in _chunks(x_BSD):
        for number, weight_DF in enumerate(weights):
            part = _product(chunk, weight_DF)
            whole = _room_for(part) if products[number] is None else products[number]
            products[number] = _put(whole, part, offset)
    return products


def _multiply_gathered_forward(x_BSD, weights):
    return _multiply_gathered(x_BSD, weights), (x_BSD, weights)


def _multiply_gathered_backward(kept, grads):
    x_BSD, weights = kept

    def part(offset):
        terms = zip(grads, weights, strict=True)
        return sum(_of_input(_chunk_of(grad, offset), weight) for grad, weight in terms)

    whole_BSD = gather(x_BSD, "tensor", 1)
    return _sum_of_chunks(part), tuple(_of_weight(whole_BSD, grad) for grad in grads)


_multiply_gathered.defvjp(_multiply_gathered_forward, _multiply_gathered_backward)


@jax.custom_vjp
def _multiply_scattered(x_BSF, weight_FD):
    return _sum_of_chunks(lambda offset: _product(_chunk_of(x_BSF, offset), weight_FD))


def _multiply_scattered_forward(x_BSF, weight_FD):
    return _multiply_scattered(x_BSF, weight_FD), (x_BSF, weight_FD)


def _multiply_scattered_backward(kept, grad_BSD):
    x_BSF, weight_FD = kept
    whole_BSD = gather(grad_BSD, "tensor", 1)
    return _of_input(whole_BSD, weight_FD), _of_weight(x_BSF, whole_BSD)


_multiply_scattered.defvjp(_multiply_scattered_forward, _multiply_scattered_backward)
