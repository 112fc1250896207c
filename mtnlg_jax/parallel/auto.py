"""Programs that XLA splits over a mesh: decoding, which needs no gradients and so no manual region.

Training writes its collectives out (`collectives`). Decoding places parameters by the same plan and
names, for a few arrays, the axes that split their dims; XLA derives the rest. Outside a mesh
nothing here has an effect, so the same code runs on one device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Axes that split the dims of activations and caches: rows, prompts of beams, key/value heads,
# vocabulary. The others stay whole.
ACTIVATION_AXES = {"B": "data", "P": "data", "K": "tensor", "V": "tensor"}


def auto_size(axis: str) -> int:
    """Return the size of ``axis`` in the mesh in context if XLA splits programs over it, else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[axis] if kinds.get(axis) == AxisType.Auto else 1


def split(x: jax.Array, dims: str) -> jax.Array:
    """Return ``x`` split over the mesh in context as ACTIVATION_AXES says for its ``dims``.

    A dim that its axis does not divide stays whole. What leaves a program is always split like
    this, so that the next program is compiled once.
    """
    if AxisType.Auto not in jax.sharding.get_abstract_mesh().axis_types:
        return x
    return jax.lax.with_sharding_constraint(x, _split_of(x.shape, dims))


def _split_of(shape: Sequence[int], dims: str) -> P:
    spec = []
    for dim, size in zip(dims, shape, strict=True):
        axis = ACTIVATION_AXES.get(dim)
        parts = 1 if axis is None else auto_size(axis)
        spec.append(axis if parts > 1 and size % parts == 0 else None)
    return P(*spec)


def placed(mesh: Mesh) -> Callable[[Any, str], jax.ShapeDtypeStruct]:
    """Return a function that does to shapes what `split` does to arrays on ``mesh``, which must be
    in context."""

    def place(x: Any, dims: str) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, _split_of(x.shape, dims))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return place


def row_multiple(mesh: Mesh | None) -> int:
    """Return the number by which the rows of a batch should be divisible on ``mesh``."""
    return 1 if mesh is None else mesh.shape["data"]


def padded(rows: int, mesh: Mesh | None) -> int:
    """Return ``rows`` rounded up to `row_multiple`."""
    return rows + -rows % row_multiple(mesh)


def over_its_mesh[**A, R](function: Callable[A, R]) -> Callable[A, R]:
    """Run ``function(model, ...)`` with the mesh of its first argument, ``model.mesh``, in
    context.

    The programs that it calls are then split over that mesh. None: one device.
    """

    @functools.wraps(function)
    def run(*args: A.args, **options: A.kwargs) -> R:
        mesh = getattr(args[0], "mesh", None)
        if mesh is None:
            return function(*args, **options)
        with jax.set_mesh(mesh):
            return function(*args, **options)

    return run


def fetch(x: Any) -> np.ndarray:
    """Return ``x`` on the host, also where devices of other processes hold parts of it.

    All processes must call this together.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def agreed(values: np.ndarray, mesh: Mesh | None) -> np.ndarray:
    """Return the ``values`` of process 0 in every process of ``mesh``, such as what a clock says.

    All processes of a mesh must call this together.
    """
    if mesh is None or not mesh.is_multi_process:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def spread(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Return ``values`` split over the devices of ``sharding``.

    Every process gives the same values and sends its devices their parts; nothing is compared.
    """
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)
