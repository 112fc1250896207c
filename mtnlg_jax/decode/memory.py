"""Whether a model fits the devices that are to decode it, from its config, before it is read.

Counted are weights and caches, as they will be held: exactly, by the shapes and shardings of
decoding itself. Activations, logits and programs come on top, so the need is at least this.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from mtnlg_jax.config import DecodeConfig, ModelConfig
from mtnlg_jax.decode.cache import (
    Decoder,
    bucket,
    capacity,
    check_held,
    split_abstract,
    unstack_params,
)
from mtnlg_jax.decode.quantized import by_rows
from mtnlg_jax.decode.rolling import keeps_windows, slots_of
from mtnlg_jax.decode.sharding import Placement
from mtnlg_jax.decode.stages import stacked
from mtnlg_jax.hardware import size_of
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.memory import Room
from mtnlg_jax.parallel.mesh import AXES, row_shards

MOST_PARTS = 1024  # of tensor, to suggest


class Caches(NamedTuple):
    """Caches of equal length that are held at the same time."""

    rows: int
    positions: int
    floats: bool = False  # in dtype even if rows are held in int8, as prompts and beams are
    split: bool = True  # whether the mesh splits the rows; every device holds all slots of a server
    whole: bool = False  # whether windowed layers keep all positions; see `rolling.check_whole`


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model as it is to be held; the arguments of `unstack`, and what it is used for."""

    config: ModelConfig
    dtype: str = "float32"
    weights: str | None = None
    cache: str | None = None
    mesh: Mesh | AbstractMesh | None = None
    caches: tuple[Caches, ...] = ()
    copies: int = 1  # of the weights

    @functools.cached_property
    def weight_bytes(self) -> int:
        """The bytes of weights of the device that holds the most.

        Raises ValueError if the mesh does not divide the model.
        """
        # All layers have the same parameters. Those of a stage lie on its devices alone.
        one = dataclasses.replace(self.config, num_layers=1)
        mesh = None if self.mesh is None else _with(self.mesh, pipe=1)
        outer, (layer,) = abstract_decoder(one, self.dtype, weights=self.weights, mesh=mesh).params
        return self.copies * (_part_bytes(outer) + self._layers * _part_bytes(layer))

    @property
    def _layers(self) -> int:
        """The layers of a stage at most."""
        stages = 1 if self.mesh is None else self.mesh.shape["pipe"]
        return -(-self.config.num_layers // stages)

    @functools.cached_property
    def cache_bytes(self) -> int:
        """The bytes of keys and values of the device that holds the most."""
        return sum(self._cache_bytes(caches) for caches in self.caches)

    def _cache_bytes(self, caches: Caches) -> int:
        config = self.config
        wide = config.head_width * np.dtype(self.dtype).itemsize
        if self.cache == "int8" and not caches.floats:
            wide = config.head_width + 4  # a float32 scale for each token and head
        sizes = dict.fromkeys(AXES, 1) if self.mesh is None else self.mesh.shape
        rows = -(-caches.rows // (row_shards(sizes) if caches.split else 1))  # rows are padded

        def part(size: int, axis: str) -> int:
            return size if size % sizes[axis] else size // sizes[axis]

        size = caches.positions
        slots = sorted(
            part(size if caches.whole else slots_of(config, number, size), "context")
            for number in range(config.num_layers)
        )
        heads = part(config.kv_heads, "tensor")
        return 2 * rows * heads * wide * sum(slots[-self._layers :])

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes


def _with(mesh: Mesh | AbstractMesh, **sizes: int) -> AbstractMesh:
    """Return ``mesh`` with other ``sizes``, of devices that need not be here."""
    return AbstractMesh(tuple((dict(mesh.shape) | sizes).values()), mesh.axis_names)


def _part_bytes(tree: Any) -> int:
    def size(x) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def abstract_decoder(
    config: ModelConfig,
    dtype="float32",
    *,
    weights: str | None = None,
    cache: str | None = None,
    mesh: Any = None,
) -> Decoder:
    """Return the decoder that `unstack` returns, with ShapeDtypeStructs in place of arrays.

    With ``mesh``, which may be one of devices that are not here, they have its shardings.
    """
    dtype = check_held(dtype, weights, cache)
    form = functools.partial(
        unstack_params, config=config, dtype=dtype, weights=weights, rows=by_rows()
    )
    params = jax.eval_shape(form, abstract_model(config)[1])
    if mesh is not None:
        placement = Placement(config, split_abstract(config), mesh)
        outer, layers = params
        layers = jax.eval_shape(functools.partial(stacked, stages=placement.stages), layers)
        params = placement.abstract(outer), tuple(map(placement.abstract, layers))
    return Decoder(config, params, cache == "int8", mesh)


def caches_of(
    config: ModelConfig, prompts: int, longest: int, decode: DecodeConfig, draft: bool = False
) -> tuple[Caches, ...]:
    """Return the caches of `generate` for ``prompts`` of at most ``longest`` tokens at once.

    ``draft``: whether a draft model guesses.
    """
    context = config.max_position_embeddings
    longest = max(1, min(longest, context))
    new = min(decode.max_new_tokens, context)
    if decode.num_beams > 1:
        # Beams share the cache of their prompt, and keep new tokens in one of their own.
        return (
            Caches(prompts, bucket(longest, context), floats=True, whole=True),
            Caches(prompts * decode.num_beams, new, floats=True, whole=True),
        )
    size = capacity(min(longest + new, context), context)
    whole = draft or not keeps_windows(decode)
    # The prompts stay while their copies are continued.
    return (
        Caches(prompts, size, floats=True, whole=whole),
        Caches(prompts * decode.num_return_sequences, size, whole=whole),
    )


class Choices(NamedTuple):
    """What the user of a command may change."""

    dtype: bool = True  # --dtype=bfloat16
    weights: bool = True  # --weights=int8
    cache: bool = True  # --cache=int8
    mesh: bool = True  # --set=mesh.tensor
    rows: tuple[str, int] | None = None  # the flag for the number of rows, and its value


def check_fits(
    name: str, plans: Sequence[Plan], room: Room, choices: Choices, way_out: str
) -> None:
    """Raise ValueError if the models ``plans`` together do not fit into ``room``.

    The message has the figures, and the changes of ``choices`` with which they fit. ``way_out``
    says how to load them all the same.
    """
    need = sum(plan.bytes for plan in plans)
    if need <= room.bytes:
        return
    weights = sum(plan.weight_bytes for plan in plans)
    caches = need - weights
    held = f"{size_of(weights)} of weights"
    if caches:
        rows = max((each for plan in plans for each in plan.caches), key=lambda each: each.rows)
        held += (
            f" and {size_of(caches)} of cache ({rows.rows} rows of {rows.positions:,} positions)"
        )
    where = "device" if not room.of_host or room.shared > 1 else "machine"
    fits = [
        f"{flags} ({size_of(size)})"
        for flags, size in _changes(plans, room, choices)
        if size is not None
    ]
    more = f"it fits with {' or '.join(fits[:4])}" if fits else _least(plans, room, choices)
    raise ValueError(
        f"{name} does not fit: a {where} would hold at least {held}, and has "
        f"{size_of(room.bytes)} free; {more}; {way_out}"
    )


# A change: its flags, and what it makes of a plan.
_Change = tuple[str, Callable[[Plan], Plan]]


def _changes(
    plans: Sequence[Plan], room: Room, choices: Choices
) -> Iterator[tuple[str, int | None]]:
    """Yield (flags, bytes a device) of changes that fit, the least intrusive first."""
    held = _held(plans, choices)
    for flags, change in held:
        size = _size(plans, change)
        if size is not None and size <= room.bytes:
            yield flags, size
            break
    # A smaller number of rows, or more parts, with the weights as they are, or else in int8.
    for before, first in [("", lambda plan: plan), *held[-1:]]:
        found = list(_of_rows(plans, room, choices, before, first))
        found += _of_tensor(plans, room, choices, before, first)
        yield from found
        if found:
            break


def _held(plans: Sequence[Plan], choices: Choices) -> list[_Change]:
    """Return the ways to hold the models in less memory, by the flags that give them."""
    single: list[_Change] = []
    if choices.weights and any(plan.weights is None for plan in plans):
        single.append(("--weights=int8", lambda plan: dataclasses.replace(plan, weights="int8")))
    if choices.cache and any(plan.cache is None for plan in plans):
        single.append(("--cache=int8", lambda plan: dataclasses.replace(plan, cache="int8")))
    if choices.dtype and any(plan.dtype == "float32" for plan in plans):
        single.insert(
            0, ("--dtype=bfloat16", lambda plan: dataclasses.replace(plan, dtype="bfloat16"))
        )
    found = list(single)
    for count in range(2, len(single) + 1):
        parts = single[-count:]

        def both(plan: Plan, parts=parts) -> Plan:
            return functools.reduce(lambda plan, part: part[1](plan), parts, plan)

        found.append((" ".join(flags for flags, _ in parts), both))
    return found


def _of_rows(plans, room, choices, before, first) -> Iterator[tuple[str, int]]:
    if choices.rows is None:
        return
    flag, count = choices.rows
    fewer = count // 2
    while fewer:

        def change(plan: Plan, fewer=fewer) -> Plan:
            caches = tuple(
                each._replace(rows=-(-each.rows * fewer // count)) for each in plan.caches
            )
            return dataclasses.replace(first(plan), caches=caches)

        size = _size(plans, change)
        if size is not None and size <= room.bytes:
            yield f"{before} {flag}={fewer}".strip(), size
            return
        fewer //= 2


def _of_tensor(plans, room, choices, before, first) -> Iterator[tuple[str, int]]:
    if not choices.mesh:
        return
    now = plans[0].mesh or AbstractMesh((1,) * len(AXES), AXES)
    # More devices that share a host's memory would not help; more hosts do.
    limit = room.bytes * room.shared
    parts = 2 * now.shape["tensor"]
    while parts <= MOST_PARTS:
        mesh = _with(now, tensor=parts)

        def change(plan: Plan, mesh=mesh) -> Plan:
            return dataclasses.replace(first(plan), mesh=mesh)

        size = _size(plans, change)
        if size is not None and size <= limit:
            kind = "hosts like this one" if room.of_host else "such devices"
            flags = f"{before} --set=mesh.tensor={parts}".strip()
            yield f"{flags} over {math.prod(mesh.shape.values())} {kind}", size
            return
        parts *= 2


def _size(plans: Sequence[Plan], change: Callable[[Plan], Plan]) -> int | None:
    """Return the bytes a device after ``change``; None if the mesh does not divide a model."""
    try:
        return sum(change(plan).bytes for plan in plans)
    except ValueError:
        return None


def _least(plans: Sequence[Plan], room: Room, choices: Choices) -> str:
    """Say what the smallest form would still need."""
    held = _held(plans, choices)
    more = "hosts with more memory" if room.of_host else "devices with more memory, or more of them"
    if not held:
        return f"take {more}"
    flags, change = held[-1]
    return f"even {flags} needs {size_of(_size(plans, change) or 0)}; take {more}"
