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

from mtnlg_jax.parallel.mesh import ROWS, row_shards

# Axes that split the dims of activations and caches: B rows, P prompts of beams, K key/value heads,
# L those of a layer of every stage, V vocabulary, T positions of a cache, Q positions of long
# texts. The others stay whole.
ACTIVATION_AXES = {
    "B": ROWS,
    "P": ROWS,
    "K": ("tensor",),
    "L": ("pipe", "tensor"),
    "V": ("tensor",),
    "T": ("context",),
    "Q": ("context",),
}
# Of Q on a device: fewer positions, as those of guesses, are not worth an exchange.
LEAST_POSITIONS = 4


def auto_size(axis: str) -> int:
    """Return the size of ``axis`` in the mesh in context if XLA splits programs over it, else 1."""
    return jax.sharding.get_abstract_mesh().shape[axis] if axis in auto_axes() else 1


def auto_axes() -> frozenset[str]:
    """Return the axes of the mesh in context over which XLA splits programs."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in kinds if kind == AxisType.Auto)


def axes_of(dim: str, size: int) -> tuple[str, ...]:
    """Return the axes of the mesh in context over which XLA splits a dim of ``size``.

    These are the axes of ACTIVATION_AXES that divide it; () where it stays whole.
    """
    axes: tuple[str, ...] = ()
    for axis in ACTIVATION_AXES.get(dim, ()):
        parts = auto_size(axis)
        least = LEAST_POSITIONS if dim == "Q" else 1
        if parts > 1 and size % parts == 0 and size // parts >= least:
            axes += (axis,)
            size //= parts
    return axes


def split(x: jax.Array, dims: str) -> jax.Array:
    """Return ``x`` split over the mesh in context as ACTIVATION_AXES says for its ``dims``.

    A dim is not split over an axis that does not divide it. What leaves a program is always split
    like this, so that the next program is compiled once.
    """
    if not auto_axes():
        return x
    return jax.lax.with_sharding_constraint(x, _spec_of(x.shape, dims))


def _spec_of(shape: Sequence[int], dims: str) -> P:
    return P(*(axes_of(dim, size) or None for dim, size in zip(dims, shape, strict=True)))


def placed(mesh: Mesh) -> Callable[[Any, str], jax.ShapeDtypeStruct]:
    """Return a function that does to shapes what `split` does to arrays on ``mesh``, which must be
    in context."""

    def place(x: Any, dims: str) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, _spec_of(x.shape, dims))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return place


def whole[T](tree: T) -> T:
    """Return arrays that every device of the mesh in context holds all of."""
    if not auto_axes():
        return tree
    return jax.lax.with_sharding_constraint(tree, P())


def padded_positions(length: int) -> int:
    """Return ``length`` rounded up so that the mesh in context divides positions."""
    return length + -length % auto_size("context")


def padded(rows: int, mesh: Mesh | None) -> int:
    """Return ``rows`` rounded up so that ``mesh`` divides them."""
    return rows if mesh is None else rows + -rows % row_shards(mesh.shape)


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
