"""Seconds of collectives over the links of a TPU slice.

A collective of n devices moves (n - 1)/n of its bytes past every device, twice for a sum. It uses
one ring for each dim of the torus along which its group lies, or a single one where the compiler
says so, and both directions of a ring that is closed. Source: JAX scaling book, "Sharded
matrices", 2025; the choice of rings is in the compiled program (``emitter``, ``colors``,
``phase_rings``).
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from mtnlg_jax.planning import hlo_cost
from mtnlg_jax.planning.timeline import Transfer

# Seconds of one hop, below which no collective falls (scaling book).
HOP = 1e-6


@dataclasses.dataclass(frozen=True)
class Torus:
    """The chips of a slice.

    ``coords``: place of each device, in the order in which a program numbers them, (devices, dims);
    ``extent``: chips along each dim; ``wrapped``: whether the last one is linked to the first;
    ``link``: bytes/s of one link in one direction; ``between``: bytes/s of a device to other
    slices.
    """

    coords: tuple[tuple[int, ...], ...]
    extent: tuple[int, ...]
    wrapped: tuple[bool, ...]
    link: float
    between: float

    def seconds(self, transfer: Transfer) -> float:
        """Return the seconds of a collective that has the links of its axes to itself."""
        if transfer.axes == "slices":
            return transfer.sent / self.between
        members = hlo_cost.members_of(transfer.attributes, len(self.coords))
        if transfer.kind == "collective-permute":
            hops = max(sum(self._steps(pair)) for pair in members)
            return max(transfer.given * max(hops, 1) / self.link, HOP * hops)
        lines = self._lines(members[0])
        if not lines:  # the devices of one chip
            return 0.0
        rings = min(len(lines), _rings(transfer.attributes, len(lines)))
        speed = rings * min(self.link * line.directions / line.stride for line in lines)
        if transfer.kind == "all-to-all":
            # Each device sends 1/n of its bytes to each other one, n/4 hops away on a closed ring.
            # Hops along one dim pass beside those along another.
            part = max(line.size * line.stride / (4 * line.directions) for line in lines)
            return max(
                transfer.given * part / self.link, HOP * sum(line.size / 2 for line in lines)
            )
        return max(transfer.sent / speed, HOP * sum(line.size / 2 for line in lines))

    def _steps(self, pair: Sequence[int]) -> list[int]:
        """Return the hops from one device to another, along each dim."""
        start, end = (self.coords[device] for device in pair)
        found = []
        for a, b, size, wrapped in zip(start, end, self.extent, self.wrapped, strict=True):
            away = abs(a - b)
            found.append(min(away, size - away) if wrapped else away)
        return found

    def _lines(self, group: Sequence[int]) -> list["_Line"]:
        """Return the dims along which the devices of a group lie."""
        places = np.array([self.coords[device] for device in group])
        found = []
        for dim, size in enumerate(self.extent):
            used = np.unique(places[:, dim])
            if len(used) == 1:
                continue
            stride = int(np.diff(used).min())
            closed = self.wrapped[dim] and len(used) * stride == size
            found.append(_Line(len(used), stride, 2 if closed else 1))
        return found


@dataclasses.dataclass(frozen=True)
class _Line:
    size: int  # devices
    stride: int  # hops from one to the next: other groups use the same links
    directions: int  # in which data flows: 2 in a closed ring


def _rings(attributes: str, dims: int) -> int:
    """Return the rings that the compiler lays through a group on ``dims`` dims of the torus."""
    emitter = re.search(r'"emitter":"(\w+)"', attributes)
    if emitter:
        one = emitter[1].startswith(("1D", "SinglePhaseRing")) or "colors:1 " in attributes
        return 1 if one else dims
    # SparseCore: a list for each color, which is one direction of a ring.
    colors = attributes.count('"phase_rings"')
    return max(1, colors // 2) if colors else dims
