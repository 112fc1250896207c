"""Grouped products: rows sorted by expert, each multiplied with the matrix of its expert.

Accelerators have `jax.lax.ragged_dot`. On a CPU JAX computes it as a product of every row with
every expert, so there a loop goes over blocks of rows of one expert (Gale 2022, MegaBlocks).
"""

# Shapes: U rows, I inputs, O outputs, E experts

import jax
import jax.numpy as jnp
from jax import lax

from mtnlg_jax.parallel.collectives import vary

# Rows of a full block, and the step between the sizes of a group's last block. Smaller blocks are
# slow, and larger ones waste more on rows of other groups.
BLOCK = 256
STEP = 64


# Jitted, so that it is traced once for each shape: a step calls it in several places.
@jax.jit
def grouped_product(x_UI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Return the product of each row with the matrix of its expert, (U, O).

    The first ``sizes_E[0]`` rows belong to expert 0, the next to expert 1, and so on. Rows behind
    the last group have no meaning, in the result and in the gradient of ``x_UI``.
    """
    return lax.platform_dependent(
        x_UI, w_EIO, sizes_E, cpu=_product_in_blocks, default=lax.ragged_dot
    )


@jax.custom_vjp
def _product_in_blocks(x_UI, w_EIO, sizes_E):
    return _rows_by_experts(x_UI, w_EIO, sizes_E, transposed=False)


def _forward(x_UI, w_EIO, sizes_E):
    return _product_in_blocks(x_UI, w_EIO, sizes_E), (x_UI, w_EIO, sizes_E)


def _backward(kept, d_UO):
    x_UI, w_EIO, sizes_E = kept
    d_UI = _rows_by_experts(d_UO, w_EIO, sizes_E, transposed=True)
    return d_UI, _inputs_by_outputs(x_UI, d_UO, sizes_E).astype(w_EIO.dtype), None


_product_in_blocks.defvjp(_forward, _backward)


def _in_blocks(sizes_E: jax.Array, rows: int, visit, carry):
    """Return ``carry`` after carry = visit(carry, block, expert, start, own) for all blocks.

    A block has ``block`` rows from ``start`` on. ``own``, (block,), marks those that belong to
    ``expert``; it is None if all do.
    """
    full = min(BLOCK, rows)
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    rest_E = sizes_E % full if rows > full else sizes_E

    def over(count_E, block, first_E, carry, is_full=False):
        """Visit ``count_E`` blocks of each expert, from row ``first_E`` on.

        ``is_full``: all rows of each block belong to its expert.
        """
        until_E = jnp.cumsum(count_E)

        def one(number, carry):
            # Not searchsorted, which has no type where only some axes are manual (jax 0.12).
            expert = (until_E <= number).sum(dtype=jnp.int32)
            turn = number - (until_E - count_E)[expert]
            first = first_E[expert] + turn * block
            if is_full:
                return vary(visit(carry, block, expert, first, None))
            # Fewer than ``block`` rows may follow the first one; the block then starts earlier.
            start = jnp.minimum(first, rows - block)
            row = start + jnp.arange(block)
            own = (row >= first) & (row < starts_E[expert] + sizes_E[expert])
            return vary(visit(carry, block, expert, start, own))

        return lax.fori_loop(0, until_E[-1], one, vary(carry))

    # With few rows a group has at most one full block, which the loop below visits as well.
    if rows > full:
        carry = over(sizes_E // full, full, starts_E, carry, is_full=True)
    # The rest of each group goes into one block of the smallest size that holds it.
    lasts = list(range(STEP, full, STEP)) + [full]
    for smaller, block in zip([0, *lasts], lasts, strict=False):
        fits_E = (rest_E > smaller) & (rest_E <= block)
        carry = over(fits_E.astype(jnp.int32), block, starts_E + sizes_E - rest_E, carry)
    return carry


def _rows_by_experts(x_UI, w_EIO, sizes_E, transposed: bool):
    """Return x W, or x W^T for (U, O) rows, by expert; rows behind the last group are 0."""
    outputs = w_EIO.shape[1 if transposed else 2]
    contracted = ((1,), (1 if transposed else 0,))

    def visit(y_UO, block, expert, start, own):
        part = lax.dynamic_slice_in_dim(x_UI, start, block)
        weight = lax.dynamic_index_in_dim(w_EIO, expert, keepdims=False)
        product = lax.dot_general(part, weight, (contracted, ((), ())))
        if own is not None:
            before = lax.dynamic_slice_in_dim(y_UO, start, block)
            product = jnp.where(own[:, None], product, before)
        return lax.dynamic_update_slice_in_dim(y_UO, product, start, 0)

    return _in_blocks(sizes_E, len(x_UI), visit, jnp.zeros((len(x_UI), outputs), x_UI.dtype))


def _inputs_by_outputs(x_UI, d_UO, sizes_E):
    """Return x^T d of the rows of each expert, float32 (E, I, O)."""

    def visit(total_EIO, block, expert, start, own):
        inputs = lax.dynamic_slice_in_dim(x_UI, start, block)
        if own is not None:
            inputs = jnp.where(own[:, None], inputs, 0)
        outputs = lax.dynamic_slice_in_dim(d_UO, start, block)
        product = lax.dot_general(
            inputs, outputs, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        before = lax.dynamic_index_in_dim(total_EIO, expert, keepdims=False)
        return lax.dynamic_update_index_in_dim(total_EIO, before + product, expert, 0)

    shape = (sizes_E.shape[0], x_UI.shape[1], d_UO.shape[1])
    return _in_blocks(sizes_E, len(x_UI), visit, jnp.zeros(shape, jnp.float32))
