"""Which keys a query sees: said once, for every implementation and for any block of queries and
keys."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mask(NamedTuple):
    """B rows, T queries, S keys. ``q_offset`` is an int where it is known before the program
    runs."""

    causal: bool
    window: int | None = None
    q_offset: int | jax.Array = 0  # or int32 (B,)
    q_ids: jax.Array | None = None  # int32 (B, T); given together with kv_ids
    kv_ids: jax.Array | None = None  # int32 (B, S)
    kv_lengths: jax.Array | None = None  # int32 (B,)

    @property
    def known(self) -> bool:
        """True where shapes alone say which blocks are visible."""
        return isinstance(self.q_offset, int) and self.q_ids is None and self.kv_lengths is None


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
    """Whether queries at ``positions`` of the key axis (q_offset + i) see ``keys``; None where all
    is visible.

    The arguments are integers or integer arrays that broadcast against each other. ``length``: keys
    at or past it are invisible; the ids are those of the queries and of the keys."""
    parts = []
    if causal:
        parts.append(keys <= positions)
    if window is not None:
        parts.append(keys > positions - window)
        if not causal:
            parts.append(keys < positions + window)
    if length is not None:
        parts.append(keys < length)
    if q_ids is not None:
        parts.append(q_ids == kv_ids)
    return functools.reduce(jnp.logical_and, parts) if parts else None


def _span(count: int, block: int, size: int):
    """First and last place of each of ``count`` blocks of ``block`` places, of ``size`` in all."""
    first = jnp.arange(count) * block
    return first, jnp.minimum(first + block, size) - 1


def id_span(ids, count: int, block: int):
    """The least and the greatest id of each block, (B, count) twice."""
    ids = jnp.pad(ids, ((0, 0), (0, count * block - ids.shape[1])), mode="edge").reshape(
        ids.shape[0], count, block
    )
    return ids.min(-1), ids.max(-1)


def visible_blocks(mask: Mask, rows: int, queries: int, keys: int, block_q: int, block_kv: int):
    """(rows, blocks of queries, blocks of keys) booleans: False only where no query of the one sees
    a key of the other. Of segment ids only their range in a block is looked at, which is exact
    where they rise or fall."""
    number_q = -(-queries // block_q)
    number_kv = -(-keys // block_kv)
    first_q, last_q = _span(number_q, block_q, queries)
    first_kv, last_kv = _span(number_kv, block_kv, keys)
    offset = jnp.broadcast_to(jnp.asarray(mask.q_offset), (rows,))[:, None, None]
    first_q = offset + first_q[:, None]
    last_q = offset + last_q[:, None]
    seen = jnp.ones((rows, number_q, number_kv), bool)
    if mask.causal:
        seen &= first_kv <= last_q
    if mask.window is not None:
        seen &= last_kv > first_q - mask.window
        if not mask.causal:
            seen &= first_kv < last_q + mask.window
    if mask.kv_lengths is not None:
        seen &= first_kv < mask.kv_lengths[:, None, None]
    if mask.q_ids is not None:
        low_q, high_q = id_span(mask.q_ids, number_q, block_q)
        low_kv, high_kv = id_span(mask.kv_ids, number_kv, block_kv)
        seen &= (low_q[:, :, None] <= high_kv[:, None]) & (low_kv[:, None] <= high_q[:, :, None])
    return seen


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
    """int32 (first, end) of the blocks of keys that each block of queries sees, (rows, blocks of
    queries) each: it sees none outside of first <= j < end, and (0, 0) where it sees none at all.
    ``of_keys``: for each block of keys, of the blocks of queries that see it."""
    seen = visible_blocks(mask, rows, queries, keys, block_q, block_kv)
    if of_keys:
        seen = seen.swapaxes(1, 2)
    some = seen.any(-1)
    count = seen.shape[-1]
    first = jnp.argmax(seen, -1)
    end = count - jnp.argmax(seen[..., ::-1], -1)
    return jnp.where(some, first, 0).astype(jnp.int32), jnp.where(some, end, 0).astype(jnp.int32)
