"""Collectives in stages, each along one ring of a TPU's torus.

A mesh axis often lies on a plane of the torus: data=256 on 16x16 chips. The compilers for v5e and
v6e do not scatter over a plane: they sum the whole array on every device and keep a part of it,
which sends twice as much. One collective along each dim does not have this fault
(docs/predicted_step.md).
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from mtnlg_jax.hardware import CHIPS

Groups = tuple[tuple[int, ...], ...]  # positions along an axis; each group communicates by itself
Stages = tuple[Groups | None, ...]  # None: all devices of the axes

# Chips whose compiler does not scatter over a plane.
_KINDS = tuple(kind for chip in CHIPS.values() if chip.staged for kind in chip.kinds)

# Axis -> sizes of its stages, from neighbors to the farthest. The region's code need not carry it.
_SIZES: contextvars.ContextVar[Mapping[str, Sequence[int]] | None] = contextvars.ContextVar(
    "sizes", default=None
)


@contextlib.contextmanager
def staged(sizes: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Trace collectives over the axes of ``sizes`` in stages: {"data": (16, 4)} gathers first over
    16 neighbors, then over the 4 such groups. The product is the size of the axis."""
    token = _SIZES.set(sizes)
    try:
        yield
    finally:
        _SIZES.reset(token)


def stages_over(axes: tuple[str, ...]) -> Stages:
    """Return the groups of each stage of a gather over ``axes``; a scatter takes them from the last
    to the first. (None,) is one collective over all devices of the axes."""
    sizes = (_SIZES.get() or {}).get(axes[0], ()) if len(axes) == 1 else ()
    if len(sizes) < 2:
        return (None,)
    return tuple(_groups(sizes, number) for number in range(len(sizes)))


def _groups(sizes: Sequence[int], number: int) -> Groups:
    # Positions count up as the digits of a number whose last digit is the first stage's.
    digits = np.arange(math.prod(sizes)).reshape(sizes[::-1])
    members = np.moveaxis(digits, len(sizes) - 1 - number, -1).reshape(-1, sizes[number])
    return tuple(tuple(group) for group in members.tolist())


def sizes_on(mesh: Mesh, axis: str) -> tuple[int, ...]:
    """Return the sizes of the stages along ``axis``, each of which lies on one dim of the torus.

    () is one stage: for other chips than v5e and v6e, for an axis on one dim or over several
    slices, and where the devices along ``axis`` do not follow the dims in order.
    """
    if mesh.devices.flat[0].device_kind not in _KINDS or mesh.shape[axis] == 1:
        return ()
    places = np.array([_place(device) for device in mesh.devices.flat])
    places = places.reshape(*mesh.devices.shape, -1)
    # One row for each group along the axis: (groups, size, dims).
    lines = np.moveaxis(places, mesh.axis_names.index(axis), -2)
    lines = lines.reshape(-1, mesh.shape[axis], places.shape[-1])
    # The compiler sends a device's own shard to the other slices. A stage of its own would send
    # what the stages before have gathered, on v5e:4x8*2 32 times as much.
    if (lines[..., 0] != lines[:, :1, 0]).any():
        return ()
    sizes = []
    step = 1
    while step < lines.shape[1]:
        size = _longest(lines[0, ::step])
        if size == 1:
            return ()
        sizes.append(size)
        step *= size
    whole = math.prod(sizes) == lines.shape[1]
    if not whole or len(sizes) == 1 or not all(_are_rings(line, sizes) for line in lines):
        return ()
    return tuple(sizes)


def _place(device) -> tuple[int, ...]:
    # The slice first: only its own chips share a torus.
    return (getattr(device, "slice_index", None) or 0, *device.coords)


def _longest(places: np.ndarray) -> int:
    """Return how many of ``places``, from the first on, differ in one dim only."""
    moved = places != places[0]
    for size in range(len(places), 1, -1):
        if len(places) % size == 0 and moved[:size].any(0).sum() == 1:
            return size
    return 1


def _are_rings(places: np.ndarray, sizes: Sequence[int]) -> bool:
    """Return whether the devices of every group of every stage differ in one dim only."""
    for number in range(len(sizes)):
        members = places[np.array(_groups(sizes, number))]  # (groups, size, dims)
        if ((members != members[:, :1]).any(1).sum(-1) != 1).any():
            return False
    return True
