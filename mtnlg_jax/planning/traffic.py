"""Seconds a byte of collectives over mesh axes, by arithmetic.

On GPUs an axis inside a domain has the fast network. On a TPU slice it has the links of the dims of
the torus on which jax.make_mesh lays it: the innermost axis takes its dims first, whole dims if
their product fits. Rules of the links are those of torus.py.
"""

import functools
import itertools
import math
from typing import NamedTuple

from mtnlg_jax.config import Config
from mtnlg_jax.hardware import CHIPS, Chip
from mtnlg_jax.parallel.mesh import AXES
from mtnlg_jax.planning.layout import Layout
from mtnlg_jax.planning.topology import Topology, slice_of, wrapped

Sizes = tuple[int, ...]  # of parallel.mesh.AXES


class _Line(NamedTuple):
    """Part of an axis along one dim of the torus."""

    dim: int
    size: int  # devices
    stride: int  # hops from one to the next; other groups use the same links
    directions: int  # 2 in a closed ring

    @property
    def links(self) -> float:
        return self.directions / self.stride

    @property
    def hops_back(self) -> int:
        """From the last device to the first."""
        return self.stride * (1 if self.directions == 2 else self.size - 1)


@functools.cache
def lines_of(kind: str, sizes: Sizes) -> tuple[tuple[_Line, ...], ...] | None:
    """Return the lines of each axis of a mesh of ``sizes`` on a slice of ``kind``, from neighbors
    to the farthest; None if no slice has as many chips."""
    try:
        topology = slice_of(kind, math.prod(sizes))
    except ValueError:
        return None
    left = list(topology.dims)
    found: list[tuple[_Line, ...]] = []
    for size in reversed(sizes):
        found.append(tuple(_take(topology, left, size)))
    return tuple(reversed(found))


def _take(topology: Topology, left: list[int], size: int) -> list[_Line]:
    """Lay an axis of ``size`` on what is ``left`` of each dim, and take it from there."""
    dims = topology.dims
    closed = wrapped(topology)
    free = [dim for dim, whole in enumerate(dims) if left[dim] == whole > 1]
    chosen = next(
        (
            some
            for count in range(len(free), 0, -1)
            for some in itertools.combinations(free, count)
            if math.prod(dims[dim] for dim in some) == size
        ),
        # Whole dims first, then parts.
        sorted(range(len(dims)), key=lambda dim: left[dim] < dims[dim] or size % dims[dim] > 0),
    )
    lines = []
    for dim in chosen:
        part = math.gcd(size, left[dim])
        if part == 1:
            continue
        stride = dims[dim] // left[dim]
        ring = closed[dim] and part * stride == dims[dim]
        lines.append(_Line(dim, part, stride, 2 if ring else 1))
        left[dim] //= part
        size //= part
    # The last dim counts fastest.
    return sorted(lines, reverse=True)


class Network:
    """The links of a kind of chip. ``sizes``, which all methods take: of the mesh, as Layout.sizes.
    A search asks for the same ones very often."""

    def __init__(self, chip: Chip):
        self.chip = chip
        # Where links are not known, an axis has the fast network, as on GPUs.
        self.kind = next(name for name in CHIPS if CHIPS[name] is chip) if chip.link else ""
        self.speed = functools.cache(self._speed)
        self.seconds = functools.cache(self._seconds)

    def _lines(self, sizes: Sizes, *axes: str) -> tuple[_Line, ...]:
        """Lines of a group over ``axes``, one for each dim."""
        laid = lines_of(self.kind, sizes) if self.kind else None
        if laid is None:
            return ()
        found: dict[int, _Line] = {}
        for axis in reversed(axes):
            for line in laid[AXES.index(axis)]:
                inner = found.get(line.dim)
                if inner:  # the outer axis continues its line
                    line = line._replace(size=inner.size * line.size, stride=inner.stride)
                found[line.dim] = line
        return tuple(found.values())

    def _speed(self, sizes: Sizes, *axes: str, rings: int = 3) -> float:
        """Bytes a second in and out of a device for a collective over ``axes``, on at most
        ``rings`` dims of the torus at once; tensor is the innermost axis. Members within one domain
        share its links: a ring over the nodes enters each node once."""
        chip = self.chip
        lines = self._lines(sizes, *axes)
        if lines:
            return min(rings, len(lines)) * min(line.links for line in lines) * chip.link
        if len(axes) > 1:
            return min(self.speed(sizes, axis) for axis in axes)
        (axis,) = axes
        place = AXES.index(axis)
        size = sizes[place]
        near = min(size, max(1, chip.domain // math.prod(sizes[place + 1 :])))
        return chip.fast if near == size else min(chip.fast, near * chip.slow)

    def _seconds(self, sizes: Sizes, axes: tuple[str, ...], rings: int = 3) -> float:
        """Seconds of a collective over ``axes`` for each byte of the whole array: (n - 1)/n of it
        passes a device. In stages, where the chip has them, the last one moves the largest
        parts."""
        if self.chip.staged and len(axes) == 1 and (lines := self._lines(sizes, *axes)):
            seconds = 0.0
            share = 1.0
            for line in reversed(lines):
                seconds += share * (1 - 1 / line.size) / (line.links * self.chip.link)
                share /= line.size
            return seconds
        size = math.prod(sizes[AXES.index(axis)] for axis in axes)
        return (size - 1) / size / self.speed(sizes, *axes, rings=1 if self.chip.staged else rings)

    def over_tensor(self, sizes: Sizes, scheduled: bool) -> tuple[float, float]:
        """Seconds of a collective over tensor for each byte of the whole array, and the share of
        those in the backward pass that runs beside products. On v5p all do; if tensor lies on
        several dims none does, and of ten collectives four, scatters, are on one of them."""
        seconds = self.seconds(sizes, ("tensor",))
        if not scheduled or not self.chip.sparse or self.chip.staged:
            return seconds, 0.0
        if len(self._lines(sizes, "tensor")) < 2:
            return seconds, 1.0
        return 0.6 * seconds + 0.4 * self.seconds(sizes, ("tensor",), 1), 0.0

    def exchange(self, sizes: Sizes, axis: str) -> float:
        """Seconds of an all-to-all over ``axis`` for each byte that a device sends to others, which
        are a quarter of the ring away in the mean."""
        lines = self._lines(sizes, axis)
        if not lines:
            return 1 / self.speed(sizes, axis)
        size = sizes[AXES.index(axis)]
        part = max(line.size / (4 * line.links) for line in lines)
        return part * size / (size - 1) / self.chip.link

    def hop(self, sizes: Sizes, axis: str = "pipe") -> float:
        """Seconds of a byte from each device along ``axis`` to the next. The last one sends to the
        first, which on an open line is the longest way."""
        chip = self.chip
        lines = self._lines(sizes, axis)
        if lines:
            return sum(line.hops_back for line in lines) / chip.link
        if axis != "pipe":
            return 1 / self.speed(sizes, axis)
        inside = math.prod(sizes) <= chip.domain
        link = (chip.fast / 2 if chip.tpu else chip.fast) if inside else chip.slow
        return 1 / link


def context_mode(config: Config, layout: Layout) -> str:
    mode = config.mesh.context_mode
    if mode != "auto":
        return mode
    heads = max(1, config.model.kv_heads // layout.tensor)
    return "gather" if heads % layout.context else "ulysses"


def context_seconds(config: Config, network: Network, layout: Layout) -> float:
    """Seconds of a byte that a device sends to others in attention."""
    mode = context_mode(config, layout)
    if mode == "ulysses":
        return network.exchange(layout.sizes, "context")
    if mode == "ring":
        return network.hop(layout.sizes, "context")
    return 1 / network.speed(layout.sizes, "context")


def context_width(config: Config, layout: Layout) -> float:
    """Numbers that a device sends for each of its tokens in one layer's forward pass: queries,
    keys, values and outputs, or all keys and values. The backward pass sends as much, and so does
    each recomputation: every policy recomputes keys and values."""
    model = config.model
    context = layout.context
    width = model.num_attention_heads * model.head_width / layout.tensor
    kv = model.kv_heads * model.head_width / layout.tensor
    if context_mode(config, layout) == "ulysses":
        return 2 * (width + kv) * (context - 1) / context
    return 2 * kv * (context - 1)


def expert_width(config: Config, layout: Layout, twice: bool) -> float:
    """Numbers that a device sends for each of its tokens in one layer for its experts, forward and
    backward: tokens gathered over expert, whole along tensor, and outputs reduce-scattered after
    tensor is. The backward pass gathers the tokens again; a stage that is recomputed (``twice``)
    does both again."""
    sent = config.model.hidden_size * (layout.expert - 1)
    return sent * (3 + 2 / layout.tensor + twice * (1 + 1 / layout.tensor))
