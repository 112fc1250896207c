"""Which keys a query sees, defined once for every implementation and for any block of queries and
keys.

Causal, window=3, two documents (segment ids 1 and 2), six queries and six keys; # is visible:

                   keys
                   0 1 2 3 4 5    segment
    queries    0   # . . . . .    1
               1   # # . . . .    1
               2   # # # . . .    1
               3   . # # # . .    1    the window hides key 0
               4   . . . . # .    2    the segment hides keys 2 and 3
               5   . . . . # #    2

In blocks of two queries and two keys the kernels visit four of the nine blocks, (0, 0), (1, 0),
(1, 1) and (2, 2), and skip the rest, in which nothing is visible.
"""

# Shapes: B rows, S query positions, T key positions

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Mask(NamedTuple):
    """The mask of one call. ``q_offset`` is an int where it is known before the program runs."""

    causal: bool
    window: int | None = None
    q_offset: int | jax.Array = 0  # or int32 (B,)
    q_ids: jax.Array | None = None  # int32 (B, S); given together with kv_ids
    kv_ids: jax.Array | None = None  # int32 (B, T)
    kv_lengths: jax.Array | None = None  # int32 (B,)

    @property
    def known(self) -> bool:
        """Whether the shapes alone determine which blocks are visible."""
        return isinstance(self.q_offset, int) and self.q_ids is None and self.kv_lengths is None


# --- one query and one key


def visible(
    positions,
    keys,
    *,
    causal: bool,
    window: int | None = None,
    length=None,
    q_ids=None,
    kv_ids=None,
):
    """Whether queries at ``positions`` of the key axis (q_offset + i) see ``keys``. None if nothing
    restricts them.

    The arguments are integers or integer arrays that broadcast against each other. Keys at or past
    ``length`` are invisible. ``q_ids`` and ``kv_ids`` are the segment ids of the queries and of the
    keys."""
    tests = []
    if causal:
        tests.append(keys <= positions)
    # A window counts the query's own key: with window=1 a query sees nothing else.
    if window is not None:
        tests.append(keys > positions - window)
        if not causal:
            tests.append(keys < positions + window)
    if length is not None:
        tests.append(keys < length)
    if q_ids is not None:
        tests.append(q_ids == kv_ids)
    return functools.reduce(jnp.logical_and, tests) if tests else None


# --- one block of queries and one block of keys


def any_visible(
    first_q,
    last_q,
    first_kv,
    last_kv,
    *,
    causal: bool,
    window: int | None = None,
    length=None,
    q_ids=None,
    kv_ids=None,
):
    """Whether some query of a block may see some key of a block. None if nothing restricts them.

    ``first_q`` to ``last_kv`` are positions on the key axis. ``q_ids`` and ``kv_ids`` are pairs of
    the lowest and the highest id of a block: the answer is exact if ids are sorted, and otherwise
    may be True for a block in which nothing is visible."""
    tests = []
    if causal:
        tests.append(first_kv <= last_q)
    if window is not None:
        tests.append(last_kv > first_q - window)
        if not causal:
            tests.append(first_kv < last_q + window)
    if length is not None:
        tests.append(first_kv < length)
    if q_ids is not None:
        # Two ranges of ids overlap.
        tests += [q_ids[0] <= kv_ids[1], kv_ids[0] <= q_ids[1]]
    return functools.reduce(jnp.logical_and, tests) if tests else None


def all_visible(
    first_q,
    last_q,
    first_kv,
    last_kv,
    *,
    causal: bool,
    window: int | None = None,
    length=None,
    q_ids=None,
    kv_ids=None,
):
    """Whether every query of a block sees every key of a block: such a block needs no mask.
    Arguments as for any_visible()."""
    tests = []
    if causal:
        tests.append(last_kv <= first_q)
    if window is not None:
        tests.append(first_kv > last_q - window)
        if not causal:
            tests.append(last_kv < first_q + window)
    if length is not None:
        tests.append(last_kv < length)
    if q_ids is not None:
        # Lowest equals the other side's highest both ways only if all ids are one.
        tests += [q_ids[0] == kv_ids[1], q_ids[1] == kv_ids[0]]
    return functools.reduce(jnp.logical_and, tests) if tests else None


# --- the range of blocks that one block visits, from the mask's arithmetic alone. The kernels call
# these on traced scalars, so that a known mask costs no table; numpy serves sizes known in advance.


def reach(
    causal: bool, window: int | None, *, of_keys: bool = False
) -> tuple[int | None, int | None]:
    """(back, ahead): how far before and after its own position a query sees keys, or with
    ``of_keys`` how far before and after its own position a key is seen. None means no bound."""
    back = None if window is None else window - 1
    ahead = 0 if causal else back
    return (ahead, back) if of_keys else (back, ahead)


def _divide(a, b: int, lib: ModuleType):
    # lax.div rounds towards zero, which is right for what is never negative and costs the kernels
    # no correction of the sign.
    return a // b if lib is np else lax.div(a, jnp.int32(b))


def first_block(position, block: int, *, whole: bool = False, lib: ModuleType = jnp):
    """Index of the block that holds ``position``; with ``whole``, of the first block that starts
    there or later. ``position`` None means no bound: block 0."""
    if position is None:
        return 0
    # A range may begin before position 0, for example with a window: then block 0 is the first.
    position = lib.maximum(position, 0)
    return _divide(position + (block - 1) if whole else position, block, lib)


def end_block(position, block: int, blocks: int, *, whole: bool = False, lib: ModuleType = jnp):
    """One past the index of the block that holds ``position``; with ``whole``, past the last block
    that ends there or earlier. At most ``blocks``, which None, no bound, gives as well."""
    if position is None:
        return blocks
    past = position + (1 if whole else block)
    return lib.minimum(_divide(lib.maximum(past, 0), block, lib), blocks)


# --- all blocks at once, for masks that hold arrays


def id_range(ids, blocks: int, block: int):
    """Lowest and highest id of each block, (B, blocks) each."""
    padding = ((0, 0), (0, blocks * block - ids.shape[1]))
    # The padding repeats the last id, so it does not widen the range of its block.
    ids = jnp.pad(ids, padding, mode="edge").reshape(ids.shape[0], blocks, block)
    return ids.min(-1), ids.max(-1)


def _edges(mask: Mask, rows: int, queries: int, keys: int, block_q: int, block_kv: int, clip: bool):
    """First and last positions of all blocks, as any_visible() takes them. Without ``clip`` the
    last block ends where its padding ends."""
    blocks_q = -(-queries // block_q)
    blocks_kv = -(-keys // block_kv)
    first_q = jnp.arange(blocks_q)[None, :, None] * block_q
    last_q = first_q + (block_q - 1)
    first_kv = jnp.arange(blocks_kv)[None, None, :] * block_kv
    last_kv = first_kv + (block_kv - 1)
    # With ``clip`` padding does not make a block visible. Without it padding counts, as keys that
    # no query sees.
    if clip:
        last_q = jnp.minimum(last_q, queries - 1)
        last_kv = jnp.minimum(last_kv, keys - 1)
    # Positions of queries are on the axis of the keys from here on.
    offset = jnp.broadcast_to(jnp.asarray(mask.q_offset), (rows,))[:, None, None]
    return offset + first_q, offset + last_q, first_kv, last_kv


def _id_ranges(mask: Mask, queries: int, keys: int, block_q: int, block_kv: int) -> dict:
    """The segment ids of all blocks, as any_visible() takes them."""
    if mask.q_ids is None:
        return {}
    q_ids = id_range(mask.q_ids, -(-queries // block_q), block_q)
    kv_ids = id_range(mask.kv_ids, -(-keys // block_kv), block_kv)
    return {"q_ids": [x[:, :, None] for x in q_ids], "kv_ids": [x[:, None] for x in kv_ids]}


def visible_blocks(mask: Mask, rows: int, queries: int, keys: int, block_q: int, block_kv: int):
    """Booleans (B, blocks of queries, blocks of keys), False only if no query of the one sees a key
    of the other. Segment ids enter by their range in a block, which is exact if they are sorted."""
    sizes = (queries, keys, block_q, block_kv)
    length = None if mask.kv_lengths is None else mask.kv_lengths[:, None, None]
    seen = any_visible(
        *_edges(mask, rows, *sizes, clip=True),
        causal=mask.causal,
        window=mask.window,
        length=length,
        **_id_ranges(mask, *sizes),
    )
    shape = (rows, -(-queries // block_q), -(-keys // block_kv))
    return jnp.broadcast_to(True if seen is None else seen, shape)


def wholly_visible_blocks(
    mask: Mask, rows: int, queries: int, keys: int, block_q: int, block_kv: int
):
    """Booleans (B, blocks of queries, blocks of keys), True only if every query of the one sees
    every key of the other. Padding counts as invisible keys."""
    sizes = (queries, keys, block_q, block_kv)
    # Always with a length, because keys of the last block may not exist.
    length = jnp.full((rows,), keys)
    if mask.kv_lengths is not None:
        length = jnp.minimum(length, mask.kv_lengths)
    seen = all_visible(
        *_edges(mask, rows, *sizes, clip=False),
        causal=mask.causal,
        window=mask.window,
        length=length[:, None, None],
        **_id_ranges(mask, *sizes),
    )
    return jnp.broadcast_to(seen, (rows, -(-queries // block_q), -(-keys // block_kv)))


def block_ranges(
    mask: Mask,
    rows: int,
    queries: int,
    keys: int,
    block_q: int,
    block_kv: int,
    *,
    of_keys: bool = False,
):
    """int32 (first, end), each (B, blocks of queries): a block of queries sees keys only in blocks
    first <= j < end, which is (0, 0) if it sees none. With ``of_keys``, for each block of keys, the
    blocks of queries that see it."""
    seen = visible_blocks(mask, rows, queries, keys, block_q, block_kv)
    if of_keys:
        seen = seen.swapaxes(1, 2)
    some = seen.any(-1)
    # The first True. One range for each block: blocks inside of it in which nothing is visible are
    # visited and masked.
    first = jnp.argmax(seen, -1)
    end = seen.shape[-1] - jnp.argmax(seen[..., ::-1], -1)
    return jnp.where(some, first, 0).astype(jnp.int32), jnp.where(some, end, 0).astype(jnp.int32)
