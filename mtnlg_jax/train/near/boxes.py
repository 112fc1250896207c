"""Ranges of arrays: which part of each array of the state a process holds, and whether parts cover
a whole."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

# [start, stop) along each dim of an array; () of a number.
Box = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of an array of the state."""

    name: str
    box: Box
    bytes: int


def box_of(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Box:
    """Return the ranges of JAX's ``index`` into an array of ``shape``."""
    pairs = zip(index or (), shape, strict=True)
    return tuple(
        (part.start or 0, size if part.stop is None else part.stop) for part, size in pairs
    )


def volume(box: Box) -> int:
    """Return the number of elements."""
    return math.prod(stop - start for start, stop in box)


def common(one: Box, other: Box) -> Box | None:
    """Return the ranges that both have; None where they share no element."""
    pairs = zip(one, other, strict=True)
    both = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in pairs)
    return both if all(start < stop for start, stop in both) else None


def within(box: Box, outer: Box) -> tuple:
    """Return the index of ``box`` in an array that holds ``outer``; it selects a view."""
    pairs = zip(box, outer, strict=True)
    # The ellipsis makes it a view of a number as well.
    return (*(slice(a[0] - b[0], a[1] - b[0]) for a, b in pairs), ...)


def holders(flat: Mapping[str, Any]) -> dict[tuple[str, Box], set[int]]:
    """Return {(array, ranges): processes that hold this shard} of arrays with shardings."""
    found: dict[tuple[str, Box], set[int]] = {}
    for name, leaf in flat.items():
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            box = box_of(index, leaf.shape)
            found.setdefault((name, box), set()).add(device.process_index)
    return found


def shards_of(
    flat: Mapping[str, Any], held: Mapping[tuple[str, Box], set[int]], mine: Callable
) -> list[Shard]:
    """Return the shards for whose holders ``mine(processes)`` is true, in a fixed order."""
    return [
        Shard(name, box, volume(box) * np.dtype(flat[name].dtype).itemsize)
        for (name, box), processes in held.items()
        if mine(processes)
    ]


def covers(boxes: Iterable[tuple[str, Box]], sizes: Mapping[str, int]) -> bool:
    """Return whether the distinct ``boxes`` of one save make up arrays of ``sizes`` (elements).

    Those of one save do not overlap: each array has one sharding.
    """
    found = dict.fromkeys(sizes, 0)
    for name, box in set(boxes):
        if name in found:
            found[name] += volume(box)
    return found == dict(sizes)


def bytes_of(data: jax.Array) -> np.ndarray:
    """Return the bytes of an array of one device on the host: a view of them where there is one."""
    return np.ascontiguousarray(np.asarray(data)).reshape(-1).view(np.uint8)
