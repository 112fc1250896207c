"""How the Hopper kernels divide attention: tiles, the blocks that each tile visits, and how the
feeding warpgroup follows them.

A tile is a run of queries (forward pass, dq) or of keys (dk and dv) of one row and one head. It
visits blocks of the other kind. Which ones follows from the mask's arithmetic, done by each
warpgroup on scalars, or, where the mask holds arrays, from a table that XLA computes before the
kernel starts.
"""

# Shapes: B rows, S query positions, T key positions, N query heads, K key/value heads, H head width

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mtnlg_jax.model.kernels.blocks import Blocks
from mtnlg_jax.model.kernels.gpu.common import (
    COMPUTE,
    L2_BYTES,
    fill,
    pad_to,
    pad_to_8,
    ring,
    scalar,
    split_tile,
    tiled,
)
from mtnlg_jax.model.kernels.mask import (
    Mask,
    block_ranges,
    end_block,
    first_block,
    reach,
    wholly_visible_blocks,
)


class Span(NamedTuple):
    """The blocks that one warpgroup visits, first <= j < last. Of these, whole <= j < whole_end
    need no mask. The other warpgroup may need more, up to ``end``:

        first      whole      whole_end      last      end
          | masked   |  no mask   |   masked   |  passed |
    """

    first: int | jax.Array
    whole: int | jax.Array
    whole_end: int | jax.Array
    last: int | jax.Array
    end: int | jax.Array
    offset: int | jax.Array  # of the mask
    length: int | jax.Array | None  # number of keys; None: every key of every block exists
    # Whether there may be masked blocks in front, whole blocks, and masked blocks behind.
    sections: tuple[bool, bool, bool]

    @property
    def count(self):
        return self.end - self.first

    def walk(self, block: Callable, carry):
        """Call block(masked, j, carry) -> carry for every j in turn."""
        ends = (self.first, self.whole, self.whole_end, self.last)
        sections = zip(self.sections, (True, False, True), ends[:-1], ends[1:], strict=True)
        for present, masked, start, end in sections:
            if present:
                carry = lax.fori_loop(start, end, functools.partial(block, masked), carry)
        return carry


class TilePlan(NamedTuple):
    """Which blocks of the one kind, of ``inner`` positions each, a tile of the other kind, of
    ``outer`` positions, visits. With ``of_keys`` the tiles are of keys and the blocks of
    queries."""

    mask: Mask
    queries: int
    keys: int
    outer: int
    inner: int
    of_keys: bool = False

    @property
    def number(self) -> int:
        """Number of tiles of one row and head."""
        return -(-(self.keys if self.of_keys else self.queries) // self.outer)

    @property
    def blocks(self) -> int:
        return -(-(self.queries if self.of_keys else self.keys) // self.inner)

    @property
    def padded(self) -> int:
        """Number of positions in whole blocks."""
        return self.blocks * self.inner

    @property
    def ragged(self) -> bool:
        """Whether the last block holds keys that do not exist. Queries that do not exist need no
        mask: they have no weight."""
        return not self.of_keys and self.keys % self.inner != 0

    def flushes(self, count: int) -> bool:
        """Whether a warpgroup of ``count`` queries may have blocks at its end that only the other
        warpgroup needs, and passes over them. A warpgroup of keys never does: the blocks that it
        does not need come first."""
        bounded = self.mask.causal or self.mask.window is not None
        return (
            self.mask.known
            and not self.of_keys
            and bounded
            and self.inner < self.outer
            and count < self.outer
        )

    def spans(self, batch: int):
        """int32 (B, tiles, 6): the numbers of each Span except ``last``, for masks with arrays."""
        mask = self.mask
        block_q, block_kv = (self.inner, self.outer) if self.of_keys else (self.outer, self.inner)
        sizes = (batch, self.queries, self.keys, block_q, block_kv)
        first, end = block_ranges(mask, *sizes, of_keys=self.of_keys)
        whole = wholly_visible_blocks(mask, *sizes)
        if self.of_keys:
            whole = whole.swapaxes(1, 2)
        whole_first = jnp.argmax(whole, -1)
        whole_end = self.blocks - jnp.argmax(whole[..., ::-1], -1)
        # A Span can only leave the mask out in one run of blocks; no block at all is not a run.
        one_run = whole.sum(-1) == whole_end - whole_first
        whole_first = jnp.where(one_run, whole_first, first)
        whole_end = jnp.where(one_run, whole_end, first)
        offset = jnp.broadcast_to(jnp.asarray(mask.q_offset), (batch,))
        length = jnp.full((batch,), self.keys)
        if mask.kv_lengths is not None:
            length = jnp.minimum(length, mask.kv_lengths)
        # Six numbers of each tile, in the order in which `span` reads them.
        columns = jnp.broadcast_arrays(
            first, whole_first, whole_end, end, offset[:, None], length[:, None]
        )
        return jnp.stack(columns, -1).astype(jnp.int32)

    def span(self, r, row, base, start, count: int) -> Span:
        """The Span of ``count`` positions from ``start``, in the tile at ``base``."""
        mask = self.mask
        if not mask.known:
            tile = lax.div(base, jnp.int32(self.outer))
            first, whole, whole_end, end, offset, length = (
                scalar(r.spans, row, tile, i) for i in range(6)
            )
            length = length if mask.kv_lengths is not None or self.ragged else None
            return Span(first, whole, whole_end, end, end, offset, length, (True, True, True))
        # The whole tile's range: both warpgroups and the feeding one must count the same blocks.
        low, high, _, _ = self._bounds(base, self.outer)
        first = first_block(low, self.inner)
        end = end_block(high, self.inner, self.blocks)
        # The range may lie behind the last block.
        if low is not None:
            first = jnp.minimum(first, end)
        # This warpgroup's own range: where it needs no mask, and where it may stop.
        _, high, whole_low, whole_high = self._bounds(start, count)
        whole = jnp.clip(first_block(whole_low, self.inner, whole=True), first, end)
        # A block with keys that do not exist always needs its mask.
        existing = self.keys // self.inner if self.ragged else self.blocks
        whole_end = end_block(whole_high, self.inner, existing, whole=True)
        whole_end = jnp.clip(whole_end, whole, end)
        last = end
        if self.flushes(count):
            last = jnp.clip(end_block(high, self.inner, self.blocks), whole_end, end)
        return Span(
            first,
            whole,
            whole_end,
            last,
            end,
            mask.q_offset,
            self.keys if self.ragged else None,
            (whole_low is not None, True, whole_high is not None or self.ragged),
        )

    def _bounds(self, start, count: int):
        """(first, last) position that any of ``count`` positions from ``start`` sees or is seen by,
        and (first, last) position for which that holds of all of them. None means no bound."""
        back, ahead = reach(self.mask.causal, self.mask.window, of_keys=self.of_keys)
        # From here on a position on the axis of the other side.
        offset = self.mask.q_offset
        start = start - offset if self.of_keys else start + offset
        stop = start + count - 1
        low, whole_low = (None, None) if back is None else (start - back, stop - back)
        high, whole_high = (None, None) if ahead is None else (stop + ahead, start + ahead)
        return low, high, whole_low, whole_high


class QueryTiles(NamedTuple):
    """Tiles of queries that visit blocks of keys: shared by the forward pass and dq."""

    plan: TilePlan
    batch: int
    heads: int
    group: int  # query heads of a key/value head
    section: int  # pairs of row and query head processed at a time
    blocks: Blocks

    @classmethod
    def of(cls, q_shape, k_shape, mask: Mask, blocks: Blocks) -> "QueryTiles":
        batch, queries, heads, width = q_shape
        keys, kv_heads = k_shape[1:3]
        group = heads // kv_heads
        # Keys and values have two bytes a number. The query heads of a group share them.
        section = max(1, L2_BYTES // (4 * keys * width)) * group
        plan = TilePlan(mask, queries, keys, COMPUTE * blocks.q, blocks.kv)
        return cls(plan, batch, heads, group, section, blocks)

    @property
    def has_ids(self) -> bool:
        return self.plan.mask.q_ids is not None

    @property
    def tiles(self) -> int:
        return self.batch * self.heads * self.plan.number

    @property
    def padded(self) -> int:
        """Number of queries in whole tiles."""
        return self.plan.number * self.plan.outer

    def locate(self, tile):
        """Row, query head and position of the first query of a tile."""
        pair, number = split_tile(tile, self.batch * self.heads, self.plan.number, self.section)
        # Long tiles last would leave most multiprocessors idle at the end.
        if self.plan.mask.causal:  # the longest tiles first
            number = self.plan.number - 1 - number
        heads = jnp.int32(self.heads)
        return lax.div(pair, heads), lax.rem(pair, heads), number * self.plan.outer

    def slot(self, step, j, span: Span):
        """Slot of the rings that holds block j of the tile, if ``step`` blocks came before the
        tile's first one."""
        return lax.rem(step + j - span.first, jnp.int32(self.blocks.stages))

    def feed(self, r, tile, step):
        """Fill the rings with the tile's blocks of keys and values."""
        row, head, base = self.locate(tile)
        # The same blocks in the same order as the computing warpgroups, which find them by the same
        # arithmetic.
        span = self.plan.span(r, row, base, base, self.plan.outer)
        kv_head = lax.div(head, jnp.int32(self.group))
        stages = self.blocks.stages

        def block(j, _):
            at = pl.ds(j * self.blocks.kv, self.blocks.kv)
            # Slots are numbered over all tiles of a thread block, so the rings never restart.
            i = step + j - span.first
            # Keys and values have rings of their own: keys are free after the first product.
            copies = [(r.k.at[row, at, kv_head], r.k_block)]
            if self.has_ids:
                copies.append((r.kv_ids.at[row, at], r.kv_ids_block))
            fill(i, stages, r.k_full, r.k_empty, copies)
            fill(i, stages, r.v_full, r.v_empty, [(r.v.at[row, at, kv_head], r.v_block)])

        lax.fori_loop(span.first, span.end, block, None)
        return step + span.count

    def inputs(self, q, k, v) -> dict:
        mask = self.plan.mask
        found = {"q": pad_to_8(q), "k": pad_to_8(k), "v": pad_to_8(v)}
        if not mask.known:
            found["spans"] = self.plan.spans(self.batch)
        if self.has_ids:
            found["q_ids"] = pad_to(mask.q_ids, self.padded)
            found["kv_ids"] = pad_to(mask.kv_ids, self.plan.padded)
        return found

    def scratch(self, width: int, dtype) -> dict:
        rows = self.blocks.q
        kv = self.blocks.kv
        stages = self.blocks.stages
        found = {
            "k_block": tiled((stages, kv, width), dtype),
            "v_block": tiled((stages, kv, width), dtype),
            **ring("k", stages, 1 + self.has_ids),
            **ring("v", stages, 1),
        }
        if self.has_ids:
            found["q_ids_block"] = plgpu.SMEM((COMPUTE, rows), jnp.int32)
            found["kv_ids_block"] = plgpu.SMEM((stages, kv), jnp.int32)
        return found


class KeyTiles(NamedTuple):
    """Tiles of keys that visit blocks of queries: for dk and dv. The query heads of a key/value
    head come one after the other and add to the same sums."""

    plan: TilePlan
    batch: int
    kv_heads: int
    group: int  # query heads of a key/value head
    section: int  # pairs of row and key/value head processed at a time
    blocks: Blocks
    runs: int  # runs of keys of a tile, one a warpgroup: 1 if both have the same keys

    @classmethod
    def of(cls, q_shape, k_shape, mask: Mask, blocks: Blocks, runs: int) -> "KeyTiles":
        batch, queries, heads, width = q_shape
        keys, kv_heads = k_shape[1:3]
        group = heads // kv_heads
        # Queries and cotangents have two bytes a number, and a group has several heads of them.
        section = max(1, L2_BYTES // (4 * queries * width * group))
        plan = TilePlan(mask, queries, keys, runs * blocks.kv, blocks.q, of_keys=True)
        return cls(plan, batch, kv_heads, group, section, blocks, runs)

    @property
    def has_ids(self) -> bool:
        return self.plan.mask.q_ids is not None

    @property
    def tiles(self) -> int:
        return self.batch * self.kv_heads * self.plan.number

    def locate(self, tile):
        """Row, key/value head and position of the first key of a tile. The first keys come first,
        since most queries see them."""
        plan = self.plan
        pair, number = split_tile(tile, self.batch * self.kv_heads, plan.number, self.section)
        kv_heads = jnp.int32(self.kv_heads)
        return lax.div(pair, kv_heads), lax.rem(pair, kv_heads), number * plan.outer

    def slot(self, step, i, span: Span):
        """As for QueryTiles, of block i of queries of one head."""
        return lax.rem(step + i - span.first, jnp.int32(self.blocks.stages))

    def visit(self, span: Span, step, block: Callable, totals):
        """Call block(step, masked, i, totals) -> totals for every query head and block of
        queries."""

        def one_head(g, totals):
            # The rings run on from one head of the group to the next.
            return span.walk(functools.partial(block, step + g * span.count), totals)

        return lax.fori_loop(0, self.group, one_head, totals)

    def feed(self, r, tile, step):
        """Fill the rings with the tile's blocks of queries and of the output's cotangents."""
        row, kv_head, base = self.locate(tile)
        span = self.plan.span(r, row, base, base, self.plan.outer)
        size = self.blocks.q
        stages = self.blocks.stages

        def block(g, step, i, _):
            head = kv_head * self.group + g
            at = pl.ds(i * size, size)
            i = step + i - span.first
            copies = [(r.q.at[row, at, head], r.q_block), (r.lse.at[row, head, at], r.lse_block)]
            if self.has_ids:
                copies.append((r.q_ids.at[row, at], r.q_ids_block))
            fill(i, stages, r.q_full, r.q_empty, copies)
            copies = [
                (r.d_out.at[row, at, head], r.d_out_block),
                (r.delta.at[row, head, at], r.delta_block),
            ]
            fill(i, stages, r.d_out_full, r.d_out_empty, copies)

        def one_head(g, step):
            lax.fori_loop(span.first, span.end, functools.partial(block, g, step), None)
            return step + span.count

        return lax.fori_loop(0, self.group, one_head, step)

    def inputs(self, q, k, v, d_out) -> dict:
        mask = self.plan.mask
        arrays = {"q": q, "k": k, "v": v, "d_out": d_out}
        found = {name: pad_to_8(x) for name, x in arrays.items()}
        if not mask.known:
            found["spans"] = self.plan.spans(self.batch)
        if self.has_ids:
            found["q_ids"] = pad_to(mask.q_ids, self.plan.padded)
            found["kv_ids"] = pad_to(mask.kv_ids, self.plan.number * self.plan.outer)
        return found

    def scratch(self, width: int, dtype) -> dict:
        rows = self.blocks.kv
        size = self.blocks.q
        stages = self.blocks.stages
        found = {
            "k_block": tiled((self.runs, rows, width), dtype),
            "v_block": tiled((self.runs, rows, width), dtype),
            "q_block": tiled((stages, size, width), dtype),
            "d_out_block": tiled((stages, size, width), dtype),
            "lse_block": plgpu.SMEM((stages, size), jnp.float32),
            "delta_block": plgpu.SMEM((stages, size), jnp.float32),
            **ring("q", stages, 2 + self.has_ids),
            **ring("d_out", stages, 2),
        }
        if self.has_ids:
            found["kv_ids_block"] = plgpu.SMEM((COMPUTE, rows), jnp.int32)
            found["q_ids_block"] = plgpu.SMEM((stages, size), jnp.int32)
        return found
