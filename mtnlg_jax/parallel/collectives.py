"""The collectives the model uses.

Outside the manual region, and on an axis of size 1, they do nothing. So the same model code runs on
one core and on a pod.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.parallel.mesh import (
    AXES,
    EXPERT_BIAS,
    ROWS,
    axes_in,
    dims_of,
    parameter_name,
    spec_of,
)
from mtnlg_jax.parallel.rings import Stages, stages_over


def axis_size(axis: str) -> int:
    """Return the size of ``axis`` if the caller runs manually over it, else 1."""
    # The mesh in context, so that a module need not carry one. A Python number: shapes may depend
    # on it.
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def axis_index(axis: str) -> jax.Array | int:
    """Return this device's position along ``axis``; 0 outside the manual region."""
    # A plain 0 on an axis of size 1 lets XLA fold what depends on it.
    return lax.axis_index(axis) if axis_size(axis) > 1 else 0


def to_next(parts: int) -> list[tuple[int, int]]:
    """Return the permutation (source, target) in which each of ``parts`` devices of an axis sends
    to the next one, and the last to the first."""
    return [(i, (i + 1) % parts) for i in range(parts)]


def gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Concatenate the shards of ``x`` along ``dim``. The transpose is `scatter_sum`."""
    # ``tiled`` concatenates along an existing dim and adds none.
    return lax.all_gather(x, axis, axis=dim, tiled=True) if axis_size(axis) > 1 else x


def scatter_sum(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Sum ``x`` over ``axis`` and keep this device's part of ``dim``. The transpose is `gather`."""
    if axis_size(axis) == 1:
        return x
    return lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


def sum_over(x: jax.Array, axis: str) -> jax.Array:
    """Return the sum of ``x`` over ``axis``, on every device of it."""
    return lax.psum(x, axis) if axis_size(axis) > 1 else x


def max_over(x: jax.Array, axis: str) -> jax.Array:
    """Return the maximum of ``x`` over ``axis``, on every device of it."""
    return lax.pmax(x, axis) if axis_size(axis) > 1 else x


def own_part(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Return this device's part of ``dim``, where every device of ``axis`` holds ``x`` whole."""
    size = axis_size(axis)
    if size == 1:
        return x
    # A slice and no communication: the data are here already.
    part = x.shape[dim] // size
    return lax.dynamic_slice_in_dim(x, axis_index(axis) * part, part, dim)


def zigzag(length: int, parts: int) -> np.ndarray:
    """Return the order of a sequence's positions when ``context`` splits it over ``parts`` devices.

    Of 2 x parts chunks, device i holds the chunks i and 2 x parts - 1 - i. Late positions attend to
    more keys than early ones. Such a pair makes causal attention the same work on every device.
    """
    if parts == 1:
        return np.arange(length)
    # Cut into equal chunks, so the length must be divisible by 2 x parts.
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.concatenate([np.concatenate([chunks[i], chunks[-1 - i]]) for i in range(parts)])


def sequence_positions(length: int) -> jax.Array:
    """Return the positions in the whole sequence of this device's ``length`` tokens.

    These are the tokens that it holds between half blocks.
    """
    # Context splits the sequence first, and tensor the part of each of its devices.
    inside = axis_index("tensor") * length + jnp.arange(length)
    parts = axis_size("context")
    whole = length * axis_size("tensor")
    if parts == 1:
        return inside
    return jnp.asarray(zigzag(parts * whole, parts))[axis_index("context") * whole + inside]


def vary(tree: Any) -> Any:
    """Mark every leaf as varying between all devices.

    Autodiff would sum the gradient of an unvarying value at every use. For varying ones it sums
    nothing: the reductions are written out once, in `reduce_gradients`.
    """
    manual = [axis for axis in AXES if axis in jax.sharding.get_abstract_mesh().manual_axes]

    def one(leaf):
        # pcast takes only axes over which the leaf does not vary yet.
        missing = tuple(
            axis for axis in manual if axis not in jax.typeof(leaf).manual_axis_type.varying
        )
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, tree) if manual else tree


def _gather_in_stages(x: jax.Array, axes: tuple[str, ...], stages: Stages, dim: int) -> jax.Array:
    for groups in stages:
        x = lax.all_gather(x, axes, axis=dim, tiled=True, axis_index_groups=groups)
    return x


def _scatter_in_stages(x: jax.Array, axes: tuple[str, ...], stages: Stages, dim: int) -> jax.Array:
    # The transpose: the last gather, whose parts are the largest, comes first.
    for groups in reversed(stages):
        x = lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True, axis_index_groups=groups)
    return x


# The transpose by autodiff would reduce in ``dtype``. A rule of its own lets the sum have another
# type than the products.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _gather_weight(w, axes: tuple[str, ...], stages: Stages, dim: int, dtype, reduce_dtype):
    # Cast before the gather: bfloat16 halves what is sent.
    return _gather_in_stages(w.astype(dtype), axes, stages, dim)


def _gather_weight_forward(w, axes, stages, dim, dtype, reduce_dtype):
    return _gather_weight(w, axes, stages, dim, dtype, reduce_dtype), None


def _gather_weight_backward(axes, stages, dim, dtype, reduce_dtype, _, grad):
    # Master gradients are float32, whatever the type of the sum on the network.
    grad = _scatter_in_stages(grad.astype(reduce_dtype), axes, stages, dim)
    return (grad.astype(jnp.float32),)


_gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)


def _shared_dim(spec, leaf: jax.Array) -> tuple[tuple[str, ...], int]:
    """Return (axes, dim) of the dim of ``leaf`` that ZeRO splits, and () where none is split.

    The dim is counted from the end: inside the scan over layers the leading L is gone, and the
    rounds of a pipeline have two dims in its place. Axes of size 1 are left out.
    """
    for number, entry in enumerate(spec):
        if "data" in axes_in(entry):
            axes = tuple(axis for axis in axes_in(entry) if axis_size(axis) > 1)
            return axes, number - len(spec) + leaf.ndim
    return (), 0


def gather_weights(params: Any, dtype, zero: int, reduce_dtype=jnp.float32) -> Any:
    """Gather float32 master shards into compute weights in ``dtype``, whole along D.

    The transpose is ZeRO's reduce-scatter: it sums gradients over data in ``reduce_dtype``,
    independent of ``dtype``, and leaves each device its own part.
    """

    def one(path, leaf):
        # The name of a parameter decides; no list of shardings is passed along.
        spec = spec_of(dims_of(path), zero)
        if parameter_name(path) == EXPERT_BIAS:
            return leaf
        axes, dim = _shared_dim(spec, leaf)
        # A parameter without D (b_q_NH), ZeRO off, or one device along data: nothing is split over
        # data.
        if not axes:
            return leaf.astype(dtype)
        return _gather_weight(leaf, axes, stages_over(axes), dim, dtype, reduce_dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def gather_unchanged(params: Any, zero: int) -> Any:
    """Gather shards of frozen parameters, whole along D, in the type that they have."""

    def one(path, leaf):
        axes, dim = _shared_dim(spec_of(dims_of(path), zero), leaf)
        return _gather_in_stages(leaf, axes, stages_over(axes), dim) if axes else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def reduce_gradients(
    grads: Any, zero: int, scattered: bool, reduce_dtype=jnp.float32, whole: str = ""
) -> Any:
    """Reduce local gradients to float32 gradients, split as the parameters are stored.

    They are summed in ``reduce_dtype`` over every axis that the parameter is not split over.
    ``scattered``: the transpose of `gather_weights` has done the sum over data along D (ZeRO-3).
    ``whole``: dims that stay whole on this mesh.
    """
    manual = [axis for axis in AXES if axis in jax.sharding.get_abstract_mesh().manual_axes]
    if not manual:
        return grads

    def one(path, grad):
        spec = spec_of(dims_of(path), zero, whole)
        # Counts of tokens stay exact.
        grad = grad.astype(jnp.float32 if parameter_name(path) == EXPERT_BIAS else reduce_dtype)
        # First the sum over data, which leaves each device a part: the sums that follow are over
        # less.
        axes, dim = _shared_dim(spec, grad)
        if axes and not scattered:
            grad = _scatter_in_stages(grad, axes, stages_over(axes), dim)
        # For example pipe for the embedding: each stage has a part of its gradient, or 0.
        split = {axis for entry in spec for axis in axes_in(entry)}
        missing = tuple(axis for axis in manual if axis not in split)
        return (lax.psum(grad, missing) if missing else grad).astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(one, grads)


def squared_norm(grads: Any, whole: str = "") -> jax.Array:
    """Return the squared norm of the gradient of this device's rows alone, a float32 scalar.

    ``grads`` are local gradients, whole along D, as `reduce_gradients` takes them. They are summed
    over the axes whose devices have parts of the same rows, and not over ROWS. Each parameter
    counts once: squares are summed over the axes that split it, and devices that share it agree.
    """
    manual = [axis for axis in AXES if axis not in ROWS and axis_size(axis) > 1]
    groups: dict[tuple[str, ...], list[jax.Array]] = {}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        spec = spec_of(dims_of(path), 0, whole)
        split = {axis for entry in spec for axis in axes_in(entry)}
        over = tuple(axis for axis in manual if axis in split)
        groups.setdefault(over, []).append(grad.astype(jnp.float32))
    total = vary(jnp.float32(0))
    for over, parts in groups.items():
        missing = tuple(axis for axis in manual if axis not in over)
        # One collective for all of a group.
        parts = lax.psum(parts, missing) if missing else parts
        square = sum((jnp.sum(jnp.square(part)) for part in parts), start=jnp.float32(0))
        total = total + vary(lax.psum(square, over) if over else square)
    return total
