"""The few communications of the model. Inside the manual region they are collectives; on an axis of
size 1, or outside the region, they do nothing, so the same model code runs on one core and on a
pod."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.parallel.mesh import AXES, dims_of, spec_of


def axis_size(axis: str) -> int:
    """Size of ``axis`` if the caller runs manually over it, else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def axis_index(axis: str):
    return lax.axis_index(axis) if axis_size(axis) > 1 else 0


def gather(x, axis: str, dim: int):
    """Joins the shards of ``x`` along ``dim``. Its transpose is ``scatter_sum``."""
    return lax.all_gather(x, axis, axis=dim, tiled=True) if axis_size(axis) > 1 else x


def scatter_sum(x, axis: str, dim: int):
    """Sums ``x`` over ``axis`` and keeps this device's part of ``dim``. Its transpose is
    ``gather``."""
    return (
        lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True) if axis_size(axis) > 1 else x
    )


def sum_over(x, axis: str):
    return lax.psum(x, axis) if axis_size(axis) > 1 else x


def max_over(x, axis: str):
    return lax.pmax(x, axis) if axis_size(axis) > 1 else x


def own_part(x, axis: str, dim: int):
    """This device's part of ``dim`` of an ``x`` that every device of ``axis`` holds whole."""
    size = axis_size(axis)
    if size == 1:
        return x
    part = x.shape[dim] // size
    return lax.dynamic_slice_in_dim(x, axis_index(axis) * part, part, dim)


def zigzag(length: int, parts: int):
    """The order of a sequence's places when ``context`` splits it over ``parts`` devices: of 2 x
    parts chunks device i has chunks i and 2 x parts - 1 - i, so that causal attention is the same
    work for each."""
    if parts == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.concatenate([np.concatenate([chunks[i], chunks[-1 - i]]) for i in range(parts)])


def sequence_places(length: int):
    """Places in the whole sequence of the ``length`` tokens that this device has between the half
    blocks."""
    inside = axis_index("tensor") * length + jnp.arange(length)
    parts = axis_size("context")
    whole = length * axis_size("tensor")
    if parts == 1:
        return inside
    return jnp.asarray(zigzag(parts * whole, parts))[axis_index("context") * whole + inside]


def vary(tree):
    """Marks every leaf as differing between all devices, so that autodiff sums nothing by itself:
    the reductions of gradients are then written out, once, in ``reduce_gradients``."""
    manual = [axis for axis in AXES if axis in jax.sharding.get_abstract_mesh().manual_axes]

    def one(leaf):
        missing = tuple(
            axis for axis in manual if axis not in jax.typeof(leaf).manual_axis_type.varying
        )
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, tree) if manual else tree


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_weight(w, dim: int, dtype, reduce_dtype):
    return lax.all_gather(w.astype(dtype), "data", axis=dim, tiled=True)


def _gather_weight_forward(w, dim, dtype, reduce_dtype):
    return _gather_weight(w, dim, dtype, reduce_dtype), None


def _gather_weight_backward(dim, dtype, reduce_dtype, _, grad):
    grad = lax.psum_scatter(grad.astype(reduce_dtype), "data", scatter_dimension=dim, tiled=True)
    return (grad.astype(jnp.float32),)


_gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)


def _data_dim(spec, leaf) -> int:
    """Which dim of ``leaf`` is split over data. A layer inside the scan over layers has lost its
    leading L, the rounds of a pipeline have two dims for it: so it is counted from the end."""
    return list(spec).index("data") - len(spec) + leaf.ndim


def gather_weights(params, dtype, zero: int, reduce_dtype=jnp.float32):
    """Float32 master shards -> compute weights in ``dtype``, whole along D. The transpose sums
    gradients over data in ``reduce_dtype``, whatever the weights travel in, and hands each device
    its part (ZeRO)."""

    def one(path, leaf):
        spec = spec_of(dims_of(path), zero)
        if "data" not in spec or axis_size("data") == 1:
            return leaf.astype(dtype)
        return _gather_weight(leaf, _data_dim(spec, leaf), dtype, reduce_dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def reduce_gradients(grads, zero: int, scattered: bool, reduce_dtype=jnp.float32):
    """Local gradients -> float32 gradients as the parameters are stored: summed in ``reduce_dtype``
    over every axis that the parameter is not split over. ``scattered``: the sum over data along D
    was done already (zero=3)."""
    manual = [axis for axis in AXES if axis in jax.sharding.get_abstract_mesh().manual_axes]
    if not manual:
        return grads

    def one(path, grad):
        spec = spec_of(dims_of(path), zero)
        grad = grad.astype(reduce_dtype)
        if "data" in spec and not scattered:
            grad = scatter_sum(grad, "data", _data_dim(spec, grad))
        missing = tuple(axis for axis in manual if axis not in spec)
        return (lax.psum(grad, missing) if missing else grad).astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(one, grads)
