"""The three kernels of flash.py, and how they walk over blocks."""

# Shapes: B rows, S query positions, T key positions, H head width

import functools
import math
from types import ModuleType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mtnlg_jax.model.kernels import mask as masks

LANES = 128
LOG2_E = math.log2(math.e)
# The score of an invisible key: finite, so that differences are numbers.
HIDDEN = -0.7 * float(np.finfo(np.float32).max)
# Bytes of VMEM. v5p has 64 MiB, v5e and v6e twice that. XLA loses what a kernel may take while the
# kernel runs.
VMEM_LIMIT = 28 * 2**20
DQ_LIMIT = 25 * 2**20  # for dq, if the kernel for dk and dv holds all of it


class KernelPlan(NamedTuple):
    """The static part of one kernel. With ``of_keys`` the kernel streams blocks of queries past
    each block of keys, and otherwise blocks of keys past each block of queries."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    q_offset: int | None  # None: in the table
    length: int | None  # number of keys; None if they fill whole blocks
    has_ids: bool
    queries: int  # before padding
    keys: int
    q: int  # block sizes
    kv: int
    compute: int
    group: int  # query heads of a key/value head
    of_keys: bool
    with_dq: bool  # a kernel of_keys that computes dq as well
    width: int  # most blocks streamed past any one block
    # ((name, first index, entries of a row), ...) of the prefetched vector; empty if nothing is
    # prefetched
    table: tuple

    @property
    def number_q(self) -> int:
        return pl.cdiv(self.queries, self.q)

    @property
    def number_kv(self) -> int:
        return pl.cdiv(self.keys, self.kv)

    def read(self, table, name: str, row, index=0):
        """An entry of the prefetched vector."""
        # The layout of the vector is static, so this is one read at a computed index.
        start, size = next(part[1:] for part in self.table if part[0] == name)
        return table[0][start + row * size + index]

    def step(self, turn):
        """The step within one head of turn ``turn`` of the last grid axis."""
        return turn if self.group == 1 else lax.rem(turn, self.width)

    def head(self, kv_head, turn):
        """The query head of turn ``turn``, among those of a key/value head."""
        return kv_head if self.group == 1 else kv_head * self.group + lax.div(turn, self.width)

    def offset(self, table, row):
        return self.read(table, "offset", row) if self.q_offset is None else self.q_offset

    def keys_of(self, table, row):
        """The number of keys of row ``row``, or None if no block holds a key past them."""
        if any(part[0] == "length" for part in self.table):
            return self.read(table, "length", row)
        return self.length


def known_range(plan: KernelPlan, block, lib: ModuleType = jnp):
    """(first, count) of the blocks that are streamed past block ``block``, from the mask's
    arithmetic alone."""
    assert plan.q_offset is not None, "an offset in a table leaves nothing to arithmetic"
    if plan.of_keys:
        size = plan.kv
        other = plan.q
        number = plan.number_q
        stop = plan.keys
        shift = -plan.q_offset
    else:
        size = plan.q
        other = plan.kv
        number = plan.number_kv
        stop = plan.queries
        shift = plan.q_offset
    # Positions on the axis of the streamed side.
    first_position = block * size + shift
    last_position = lib.minimum((block + 1) * size, stop) - 1 + shift
    back, ahead = masks.reach(plan.causal, plan.window, of_keys=plan.of_keys)
    low = None if back is None else first_position - back
    first = masks.first_block(low, other, lib=lib)
    high = None if ahead is None else last_position + ahead
    end = masks.end_block(high, other, number, lib=lib)
    return first, lib.maximum(end - first, 0)


def streamed(plan: KernelPlan, table, row, block, step):
    """(index of the block streamed in step ``step``, whether there is anything to do). The idle
    steps come first, so that the first block is fetched while the previous work is still being
    done."""
    # Two ways to the same range: a table where the mask holds arrays, arithmetic otherwise.
    if table:
        first, count = (plan.read(table, name, row, block) for name in ("first", "count"))
    else:
        first, count = known_range(plan, block)
    ahead = step - (plan.width - count)
    # An index past the last block would be a read outside the array, even in an idle step.
    last = (plan.number_q if plan.of_keys else plan.number_kv) - 1
    return jnp.minimum(first + jnp.maximum(ahead, 0), last), ahead >= 0


def _wholly_visible(plan: KernelPlan, table, row, i, j):
    """Whether every query of block i is known to see every key of block j. None if nothing is
    masked."""
    first_q = plan.offset(table, row) + i * plan.q
    first_kv = j * plan.kv
    ids = {}
    if plan.has_ids:
        ids["q_ids"] = [plan.read(table, name, row, i) for name in ("low_q", "high_q")]
        ids["kv_ids"] = [plan.read(table, name, row, j) for name in ("low_kv", "high_kv")]
    return masks.all_visible(
        first_q,
        first_q + plan.q - 1,
        first_kv,
        first_kv + plan.kv - 1,
        causal=plan.causal,
        window=plan.window,
        length=plan.keys_of(table, row),
        **ids,
    )


def _hide(plan: KernelPlan, table, row, i, j, start, part, scores, ids):
    """Set the scores of invisible keys to HIDDEN. ``scores`` are those of block i of queries and
    part ``part`` of block j of keys: (queries, keys), or with of_keys (keys, queries). ``ids``:
    those of the rows and of the columns."""
    key_axis = 0 if plan.of_keys else 1
    first_key = j * plan.kv + part * plan.compute
    keys = lax.broadcasted_iota(jnp.int32, scores.shape, key_axis)
    # From the first key to the first query's position.
    gap = plan.offset(table, row) + i * plan.q + start - first_key
    seen = []
    if plan.causal or plan.window is not None:
        queries = lax.broadcasted_iota(jnp.int32, scores.shape, 1 - key_axis)
        seen.append(masks.visible(gap, keys - queries, causal=plan.causal, window=plan.window))
    length = plan.keys_of(table, row)
    if length is not None:
        seen.append(masks.visible(0, keys, causal=False, length=length - first_key))
    if plan.has_ids:
        seen.append(
            masks.visible(0, 0, causal=False, q_ids=_widen(ids[0], scores.shape[1]), kv_ids=ids[1])
        )
    return jnp.where(functools.reduce(jnp.logical_and, seen), scores, HIDDEN)


def _scores(plan: KernelPlan, table, row, i, j, q, k, ids, id_column):
    """Return scores_of(first query, masked, part), which gives (scores in base 2, the softcap's
    slope) of a part of a block: (queries, keys), or with of_keys (keys, queries). With ``masked``
    the scores of invisible keys are HIDDEN."""

    def scores_of(start, masked, part):
        queries = pl.ds(start, plan.q - start)
        keys = pl.ds(part * plan.compute, plan.compute)
        rows, columns = (keys, queries) if plan.of_keys else (queries, keys)
        left, right = (k, q) if plan.of_keys else (q, k)
        scores, slope = _capped(plan, _product(left[rows, :], right[columns, :], 1, 1))
        if masked:
            pair = None
            if ids:
                pair = (id_column[rows, :], ids[0 if plan.of_keys else 1][:, columns])
            scores = _hide(plan, table, row, i, j, start, part, scores, pair)
        return scores, slope

    return scores_of


def _widen(column, width: int):
    """(rows, LANES) of equal lanes -> (rows, width)."""
    repeated = jnp.concatenate([column] * pl.cdiv(width, LANES), -1) if width > LANES else column
    return repeated[:, :width]


def column(row):
    """(1, n) -> (n, LANES) of equal lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _row(column):
    """(n, LANES) of equal lanes -> (1, n)."""
    return column.T[:1]


def _product(a, b, a_axis: int, b_axis: int):
    """a and b contracted over one axis each, in float32. For float32 inputs JAX's own setting
    chooses the precision."""
    precision = None if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _capped(plan: KernelPlan, products):
    """Scores in base 2 from products of queries and keys, and the softcap's slope or None."""
    if plan.softcap is None:
        return products * (plan.scale * LOG2_E), None
    capped = jnp.tanh(products * (plan.scale / plan.softcap))
    return capped * (plan.softcap * LOG2_E), 1 - capped * capped


def _lane_sums(x):
    """(n, LANES * m) -> (n, LANES): sums over m. Lanes are summed once, at the end."""
    return functools.reduce(jnp.add, (x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)))


def _visit(plan: KernelPlan, table, row, i, j, live, tile):
    """Run tile(first query, masked, part) over the parts of a block if it is ``live``. The mask is
    computed only if it may be needed, and on a causal diagonal the queries before a part's first
    key are left out."""

    def parts(masked, diagonal=False):
        # A Python loop: sizes are static, so the parts are unrolled.
        for part in range(plan.kv // plan.compute):
            tile(part * plan.compute if diagonal else 0, masked, part)

    whole = _wholly_visible(plan, table, row, i, j)
    if whole is None:
        pl.when(live)(lambda: parts(False))
        return
    pl.when(jnp.logical_and(live, whole))(lambda: parts(False))
    edge = jnp.logical_and(live, jnp.logical_not(whole))
    # The diagonal crosses a block from corner to corner only if blocks are square and aligned.
    if not plan.causal or plan.q != plan.kv or (plan.q_offset or 0) % plan.q:
        pl.when(edge)(lambda: parts(True))
        return
    diagonal = plan.offset(table, row) + i * plan.q == j * plan.kv
    if table or plan.length is not None or plan.window is not None:
        pl.when(jnp.logical_and(edge, jnp.logical_not(diagonal)))(lambda: parts(True))
        edge = jnp.logical_and(edge, diagonal)
    pl.when(edge)(lambda: parts(True, True))


def forward_kernel(plan: KernelPlan, *refs):
    """Add one block of keys to one block of queries."""
    table, refs = (refs[:1], refs[1:]) if plan.table else ((), refs)
    q, k, v, *ids, out, lse, top, total, acc, id_column = refs
    row = pl.program_id(0)
    i = pl.program_id(2)
    step = pl.program_id(3)
    j, live = streamed(plan, table, row, i, step)
    scores_of = _scores(plan, table, row, i, j, q, k, ids, id_column)

    @pl.when(step == 0)
    def _():
        # Statistics of a query are held in all lanes: a narrower array would be padded to them.
        top[...] = jnp.full(top.shape, HIDDEN, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)
        if ids:
            id_column[...] = column(ids[0][...])

    def tile(start, masked, part):
        queries = pl.ds(start, plan.q - start)
        keys = pl.ds(part * plan.compute, plan.compute)
        scores, _ = scores_of(start, masked, part)
        old = top[queries, :]
        # Online softmax (Milakov 2018), in base 2.
        new = jnp.maximum(old, scores.max(-1, keepdims=True))
        weights = jnp.exp2(scores - _widen(new, plan.compute))
        shrink = jnp.exp2(old - new)
        top[queries, :] = new
        total[queries, :] = total[queries, :] * shrink + _lane_sums(weights)
        # In the type of the values: bfloat16 products are faster, and their sums are float32 all
        # the same.
        part_out = _product(weights.astype(v.dtype), v[keys, :], 1, 0)
        acc[queries, :] = acc[queries, :] * _widen(shrink, acc.shape[1]) + part_out

    _visit(plan, table, row, i, j, live, tile)

    @pl.when(step == plan.width - 1)
    def _():
        # A query that sees nothing gave its hidden keys weights of 1; its top is still HIDDEN.
        seen = top[...] > HIDDEN
        sums = jnp.where(seen, jnp.broadcast_to(total[...].sum(-1, keepdims=True), top.shape), 1.0)
        inverse = jnp.where(seen, 1 / sums, 0.0)
        out[...] = (acc[...] * _widen(inverse, acc.shape[1])).astype(out.dtype)
        lse[...] = _row(jnp.where(seen, (top[...] + jnp.log2(sums)) / LOG2_E, -jnp.inf))


def dq_kernel(plan: KernelPlan, *refs):
    """Add one block of keys to the gradient of one block of queries."""
    table, refs = (refs[:1], refs[1:]) if plan.table else ((), refs)
    q, k, v, d_out, lse, delta, *ids, dq, acc, lse_column, delta_column, id_column = refs
    row = pl.program_id(0)
    i = pl.program_id(2)
    step = pl.program_id(3)
    j, live = streamed(plan, table, row, i, step)
    scores_of = _scores(plan, table, row, i, j, q, k, ids, id_column)

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros(acc.shape, jnp.float32)
        lse_column[...] = column(lse[...])
        delta_column[...] = column(delta[...])
        if ids:
            id_column[...] = column(ids[0][...])

    def tile(start, masked, part):
        queries = pl.ds(start, plan.q - start)
        keys = pl.ds(part * plan.compute, plan.compute)
        scores, slope = scores_of(start, masked, part)
        # Weights are computed again from the log-sum-exp instead of being kept: O(S) memory.
        weights = jnp.exp2(scores - _widen(lse_column[queries, :], plan.compute))
        d_weights = _product(d_out[queries, :], v[keys, :], 1, 1)
        # The gradient of softmax: p (dp - sum p dp), with the sum in delta.
        d_scores = weights * (d_weights - _widen(delta_column[queries, :], plan.compute))
        if slope is not None:
            d_scores = d_scores * slope
        acc[queries, :] += _product(d_scores.astype(k.dtype), k[keys, :], 1, 0)

    _visit(plan, table, row, i, j, live, tile)

    @pl.when(step == plan.width - 1)
    def _():
        # The scale of the scores is applied once to the sum.
        dq[...] = (acc[...] * plan.scale).astype(dq.dtype)


def dkv_kernel(plan: KernelPlan, *refs):
    """Add one block of queries of one head to the gradients of one block of keys and values.

    Scores are transposed, (keys, queries): no product then needs a transposed operand, and the
    numbers of a query are a row. If dq of all heads that share the keys fits VMEM, it is summed
    here as well, so that scores are computed once instead of twice."""
    table, refs = (refs[:1], refs[1:]) if plan.table else ((), refs)
    q, k, v, d_out, lse, delta, *ids = refs[: 6 + 2 * plan.has_ids]
    *results, id_column = refs[6 + 2 * plan.has_ids :]
    if plan.with_dq:
        dk, dv, dq, dk_acc, dv_acc, dq_acc = results
    else:
        dk, dv, dk_acc, dv_acc = results
    row = pl.program_id(0)
    j = pl.program_id(2)
    turn = pl.program_id(3)
    i, live = streamed(plan, table, row, j, plan.step(turn))
    scores_of = _scores(plan, table, row, i, j, q, k, ids, id_column)
    mine = plan.head(0, turn) * plan.number_q + i  # index of this block in dq_acc

    @pl.when(turn == 0)
    def _():
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)
        if ids:
            id_column[...] = column(ids[1][...])

    if plan.with_dq:
        # The sums of dq live through all blocks of keys that share a head: cleared before the
        # first, stored after the last.
        @pl.when(jnp.logical_and(turn == 0, j == 0))
        def _():
            dq_acc[...] = jnp.zeros(dq_acc.shape, jnp.float32)

    def tile(start, masked, part):
        queries = pl.ds(start, plan.q - start)
        keys = pl.ds(part * plan.compute, plan.compute)
        scores, slope = scores_of(start, masked, part)
        # Transposed, so the numbers of a query are a row and broadcast over sublanes.
        weights = jnp.exp2(scores - lse[:, queries])
        dv_acc[keys, :] += _product(weights.astype(d_out.dtype), d_out[queries, :], 1, 0)
        d_scores = weights * (_product(v[keys, :], d_out[queries, :], 1, 1) - delta[:, queries])
        if slope is not None:
            d_scores = d_scores * slope
        d_scores = d_scores.astype(q.dtype)
        dk_acc[keys, :] += _product(d_scores, q[queries, :], 1, 0)
        if plan.with_dq:
            # Transposing k is cheaper than transposing the scores.
            dq_acc[mine, :, queries] += _product(k[keys, :], d_scores, 0, 0)

    _visit(plan, table, row, i, j, live, tile)

    @pl.when(turn == plan.width * plan.group - 1)
    def _():
        dk[...] = (dk_acc[...] * plan.scale).astype(dk.dtype)
        dv[...] = dv_acc[...].astype(dv.dtype)

    if plan.with_dq:

        @pl.when(jnp.logical_and(turn == plan.width * plan.group - 1, j == plan.number_kv - 1))
        def _():
            for head in range(plan.group):

                def store(block, _, head=head):
                    at = pl.ds(pl.multiple_of(block * plan.q, LANES), plan.q)
                    total = dq_acc[head * plan.number_q + block].T
                    dq[head, at, :] = (total * plan.scale).astype(dq.dtype)
                    return 0

                lax.fori_loop(0, plan.number_q, store, 0)
