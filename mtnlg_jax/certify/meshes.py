"""Bring a mesh down to a few devices: the axes above 1 stay above 1.

Where the devices are too few for all of these axes together, several meshes cover every pair.
"""

import dataclasses
import itertools
import math
from typing import Any

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.parallel.mesh import AXES, described

# Of data=-1: all devices that the other axes leave.
_UNBOUNDED = 2**20

Sizes = dict[str, int]  # of AXES, in their order


def sizes_of(mesh: MeshConfig) -> Sizes:
    """Return the sizes of the axes of ``mesh``; data=-1 is a large number."""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    return sizes | {"data": _UNBOUNDED if mesh.data == -1 else mesh.data}


def used_axes(sizes: Sizes) -> tuple[str, ...]:
    """Return the axes above 1."""
    return tuple(axis for axis, size in sizes.items() if size > 1)


def with_sizes(mesh: MeshConfig, sizes: Sizes) -> MeshConfig:
    """Return ``mesh`` with other ``sizes``."""
    changes: dict[str, Any] = {**sizes}
    return dataclasses.replace(mesh, **changes)


def small_meshes(mesh: MeshConfig, devices: int) -> list[Sizes]:
    """Return meshes of at most ``devices`` devices which together cover every pair of the axes that
    ``mesh`` uses: one mesh where the devices allow it.

    Raises ValueError where ``mesh`` is one device, or ``devices`` cannot show two axes together.
    """
    sizes = sizes_of(mesh)
    axes = used_axes(sizes)
    if not axes:
        raise ValueError(
            "the mesh of this config is one device, so there is nothing to compare; give a mesh, "
            "such as --set=mesh.data=-1"
        )
    together = int(math.log2(devices)) if devices > 0 else 0
    needed = min(2, len(axes))
    if together < needed:
        raise ValueError(
            f"--devices={devices} is too few to show {' x '.join(axes)}, each above 1 and two of "
            f"them together; give --devices={2**needed} or more"
        )
    return [_shrunk(sizes, chosen, devices) for chosen in covering(axes, together)]


def _shrunk(sizes: Sizes, axes: tuple[str, ...], devices: int) -> Sizes:
    """Return ``sizes`` brought down to ``devices``, with 1 for all but ``axes``."""
    kept = {axis: sizes[axis] if axis in axes else 1 for axis in AXES}
    others = math.prod(size for axis, size in kept.items() if axis != "data")
    if kept["data"] == _UNBOUNDED and 2 * others <= devices:
        kept["data"] = devices // others
    if math.prod(kept.values()) <= devices:
        return kept
    small = {axis: 2 if axis in axes else 1 for axis in AXES}
    while 2 * math.prod(small.values()) <= devices:
        # The axis that lost most grows first, as long as it stays within its own size.
        grown = [axis for axis in axes if 2 * small[axis] <= kept[axis]]
        if not grown:
            break
        small[max(grown, key=lambda axis: kept[axis] / small[axis])] *= 2
    return small


def covering(axes: tuple[str, ...], together: int) -> list[tuple[str, ...]]:
    """Return sets of at most ``together`` axes which contain every pair of ``axes``."""
    size = min(together, len(axes))
    candidates = list(itertools.combinations(axes, size))
    missing = set(itertools.combinations(axes, 2))
    chosen: list[tuple[str, ...]] = []
    while missing or not chosen:
        best = max(candidates, key=lambda each: len(missing & _pairs(each)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(axes: tuple[str, ...]) -> set[tuple[str, str]]:
    return set(itertools.combinations(axes, 2))


def covered_pairs(meshes: list[Sizes]) -> list[str]:
    """Return the pairs of axes that are above 1 together in one of ``meshes``: "pipe x data"."""
    found = {pair: None for sizes in meshes for pair in sorted(_pairs(used_axes(sizes)))}
    return [" x ".join(pair) for pair in found]


def other_meshes(sizes: Sizes) -> list[Sizes]:
    """Return meshes to resume on, unlike ``sizes`` and with at most as many devices, the one that
    moves most first."""
    found = []
    for source, target in (
        ("pipe", "data"),
        ("context", "tensor"),
        ("data", "tensor"),
        ("tensor", "data"),
        ("expert", "data"),
    ):
        if sizes[source] > 1:
            found.append(sizes | {source: 1, target: sizes[target] * sizes[source]})
            if sizes[source] > 2 and sizes[source] % 2 == 0:
                half = sizes[source] // 2
                found.append(sizes | {source: half, target: sizes[target] * 2})
    # Where nothing else fits, fewer devices do.
    found += [sizes | {axis: 1} for axis in used_axes(sizes)]
    return found


def devices_of(sizes: Sizes) -> int:
    """Return the number of devices of a mesh of ``sizes``."""
    return math.prod(sizes.values())


def text_of(sizes: Sizes) -> str:
    """Return text such as "pipe 2 x data 2 x tensor 2": the axes above 1."""
    used = {axis: size for axis, size in sizes.items() if size > 1}
    return described(used) if used else "one device"
