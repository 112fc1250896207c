"""The three kernels of flash_tpu, and how they walk over blocks."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mtnlg_jax.model.kernels import mask as masks

LANES = 128
LOG2_E = math.log2(math.e)
HIDDEN = -0.7 * float(
    np.finfo(np.float32).max
)  # an invisible key's score: finite, so that differences are numbers
# Bytes of VMEM. v5p has 64 MiB, v5e and v6e twice that; what a kernel may take is lost to XLA while
# the kernel runs.
VMEM_LIMIT = 28 * 2**20
DQ_LIMIT = 25 * 2**20  # for dq, where the kernel of keys holds all of it


class Plan(NamedTuple):
    """What is known of one kernel before the program runs."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    q_offset: int | None  # None: in the table
    length: int | None  # keys that exist, None where whole blocks do
    has_ids: bool
    queries: int  # T and S before padding
    keys: int
    q: int  # block sizes
    kv: int
    compute: int
    group: int  # query heads of a key/value head
    of_keys: bool  # the kernel streams queries past blocks of keys
    with_dq: bool  # a kernel of keys that makes dq, too
    width: int  # blocks streamed at most
    # ((name, first place, places of a row), ...) of the prefetched vector; empty: nothing is
    # prefetched
    table: tuple

    @property
    def number_q(self):
        return pl.cdiv(self.queries, self.q)

    @property
    def number_kv(self):
        return pl.cdiv(self.keys, self.kv)

    def read(self, table, name, row, place=0):
        """An entry of the prefetched vector."""
        start, size = next(part[1:] for part in self.table if part[0] == name)
        return table[0][start + row * size + place]

    def step(self, turn):
        """Which of the steps of one head turn ``turn`` of the last grid axis is."""
        return turn if self.group == 1 else lax.rem(turn, self.width)

    def head(self, kv_head, turn):
        """The query head of turn ``turn``, of those of a key/value head."""
        return kv_head if self.group == 1 else kv_head * self.group + lax.div(turn, self.width)

    def offset(self, table, row):
        return self.read(table, "offset", row) if self.q_offset is None else self.q_offset

    def keys_of(self, table, row):
        """How many keys row ``row`` has; None where no block holds a key past them."""
        return (
            self.read(table, "length", row)
            if any(part[0] == "length" for part in self.table)
            else self.length
        )


def known_range(plan: Plan, block, lib=jnp):
    """(first, number) of the blocks that block number ``block`` is streamed past, by the mask's
    arithmetic."""
    divide = (lambda a, b: a // b) if lib is np else lax.div
    size, other = (plan.kv, plan.q) if plan.of_keys else (plan.q, plan.kv)
    number = plan.number_q if plan.of_keys else plan.number_kv
    shift = -plan.q_offset if plan.of_keys else plan.q_offset
    first_place = block * size + shift  # on the axis of the streamed side
    last_place = (
        lib.minimum((block + 1) * size, plan.keys if plan.of_keys else plan.queries) - 1 + shift
    )
    below = above = (
        None  # how far before the first and after the last place something is seen; None: all of it
    )
    if plan.window is not None:
        below = above = plan.window - 1
    if plan.causal:
        below, above = (0, above) if plan.of_keys else (below, 0)
    first = 0 if below is None else divide(lib.maximum(first_place - below, 0), other)
    end = number if above is None else divide(lib.maximum(last_place + above + other, 0), other)
    return first, lib.maximum(lib.minimum(end, number) - first, 0)


def streamed(plan: Plan, table, row, block, step):
    """(number of the block streamed in step ``step``, whether anything is to be done). The idle
    steps come first: the first block then arrives while the work before it is still being done."""
    if table:
        first, count = (plan.read(table, name, row, block) for name in ("first", "count"))
    else:
        first, count = known_range(plan, block)
    ahead = step - (plan.width - count)
    last = (plan.number_q if plan.of_keys else plan.number_kv) - 1
    return jnp.minimum(first + jnp.maximum(ahead, 0), last), ahead >= 0


def _wholly_visible(plan: Plan, table, row, i, j):
    """Whether every query of block i is known to see every key of block j."""
    first_q = plan.offset(table, row) + i * plan.q
    first_kv = j * plan.kv
    last_q = first_q + plan.q - 1
    last_kv = first_kv + plan.kv - 1
    tests = []
    if plan.causal:
        tests.append(last_kv <= first_q)
    if plan.window is not None:
        tests.append(first_kv > last_q - plan.window)
        if not plan.causal:
            tests.append(last_kv < first_q + plan.window)
    length = plan.keys_of(table, row)
    if length is not None:
        tests.append(last_kv < length)
    if plan.has_ids:
        low_q, high_q = (plan.read(table, name, row, i) for name in ("low_q", "high_q"))
        low_kv, high_kv = (plan.read(table, name, row, j) for name in ("low_kv", "high_kv"))
        tests += [low_q == high_kv, high_q == low_kv]
    return functools.reduce(jnp.logical_and, tests) if tests else None


def _hide(plan: Plan, table, row, i, j, start, part, scores, ids):
    """``scores`` with those of invisible keys HIDDEN: of block i of queries and part ``part`` of
    block j of keys, (queries, keys), or (keys, queries) in a kernel of keys. ``ids``: those of the
    rows and of the columns."""
    key_axis = 0 if plan.of_keys else 1
    first_key = j * plan.kv + part * plan.compute
    keys = lax.broadcasted_iota(jnp.int32, scores.shape, key_axis)
    gap = (
        plan.offset(table, row) + i * plan.q + start - first_key
    )  # from the first key to the first query's position
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


def _scores(plan: Plan, table, row, i, j, q, k, ids, id_column):
    """scores_of(first query, masked, part) of a block: (scores in base 2, the softcap's slope),
    with those of invisible keys HIDDEN where ``masked``; (queries, keys), or in a kernel of keys
    (keys, queries)."""

    def scores_of(start, masked, part):
        queries = pl.ds(start, plan.q - start)
        keys = pl.ds(part * plan.compute, plan.compute)
        rows, columns = (keys, queries) if plan.of_keys else (queries, keys)
        left, right = (k, q) if plan.of_keys else (q, k)
        scores, slope = _capped(plan, _product(left[rows, :], right[columns, :], 1, 1))
        if masked:
            pair = (id_column[rows, :], ids[0 if plan.of_keys else 1][:, columns]) if ids else None
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
    """a and b contracted over an axis each, in float32. Precision is JAX's to choose where the
    inputs are float32."""
    precision = None if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _capped(plan: Plan, products):
    """Scores in base 2 from products q k, and the softcap's slope (None without one)."""
    if plan.softcap is None:
        return products * (plan.scale * LOG2_E), None
    capped = jnp.tanh(products * (plan.scale / plan.softcap))
    return capped * (plan.softcap * LOG2_E), 1 - capped * capped


def _lane_sums(x):
    """(n, LANES * m) -> (n, LANES): sums over m. Adding up lanes is left for the end, when it costs
    nothing."""
    return functools.reduce(jnp.add, (x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)))


def _visit(plan: Plan, table, row, i, j, live, tile):
    """Runs tile(first query, masked, part) over the parts of a block if it is ``live``: with mask
    arithmetic only where it may be needed, and on a causal diagonal without the queries before a
    part's first key."""

    def parts(masked, diagonal=False):
        for part in range(plan.kv // plan.compute):
            tile(part * plan.compute if diagonal else 0, masked, part)

    whole = _wholly_visible(plan, table, row, i, j)
    if whole is None:
        pl.when(live)(lambda: parts(False))
        return
    pl.when(jnp.logical_and(live, whole))(lambda: parts(False))
    edge = jnp.logical_and(live, jnp.logical_not(whole))
    if not plan.causal or plan.q != plan.kv or (plan.q_offset or 0) % plan.q:
        pl.when(edge)(lambda: parts(True))
        return
    diagonal = plan.offset(table, row) + i * plan.q == j * plan.kv
    if table or plan.length is not None or plan.window is not None:
        pl.when(jnp.logical_and(edge, jnp.logical_not(diagonal)))(lambda: parts(True))
        edge = jnp.logical_and(edge, diagonal)
    pl.when(edge)(lambda: parts(True, True))


def forward_kernel(plan: Plan, *refs):
    """One block of keys for one block of queries."""
    table, refs = (refs[:1], refs[1:]) if plan.table else ((), refs)
    q, k, v, *ids, out, lse, top, total, acc, id_column = refs
    row = pl.program_id(0)
    i = pl.program_id(2)
    step = pl.program_id(3)
    j, live = streamed(plan, table, row, i, step)
    scores_of = _scores(plan, table, row, i, j, q, k, ids, id_column)

    @pl.when(step == 0)
    def _():
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
        new = jnp.maximum(old, scores.max(-1, keepdims=True))
        weights = jnp.exp2(scores - _widen(new, plan.compute))
        shrink = jnp.exp2(old - new)
        top[queries, :] = new
        total[queries, :] = total[queries, :] * shrink + _lane_sums(weights)
        part_out = _product(weights.astype(v.dtype), v[keys, :], 1, 0)
        acc[queries, :] = acc[queries, :] * _widen(shrink, acc.shape[1]) + part_out

    _visit(plan, table, row, i, j, live, tile)

    @pl.when(step == plan.width - 1)
    def _():
        # A query that saw nothing has weights of 1 for what it was shown; its top has stayed where
        # it was.
        seen = top[...] > HIDDEN
        sums = jnp.where(seen, jnp.broadcast_to(total[...].sum(-1, keepdims=True), top.shape), 1.0)
        inverse = jnp.where(seen, 1 / sums, 0.0)
        out[...] = (acc[...] * _widen(inverse, acc.shape[1])).astype(out.dtype)
        lse[...] = _row(jnp.where(seen, (top[...] + jnp.log2(sums)) / LOG2_E, -jnp.inf))


def dq_kernel(plan: Plan, *refs):
    """One block of keys for the gradient of one block of queries."""
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
        weights = jnp.exp2(scores - _widen(lse_column[queries, :], plan.compute))
        d_weights = _product(d_out[queries, :], v[keys, :], 1, 1)
        d_scores = weights * (d_weights - _widen(delta_column[queries, :], plan.compute))
        if slope is not None:
            d_scores = d_scores * slope
        acc[queries, :] += _product(d_scores.astype(k.dtype), k[keys, :], 1, 0)

    _visit(plan, table, row, i, j, live, tile)

    @pl.when(step == plan.width - 1)
    def _():
        dq[...] = (acc[...] * plan.scale).astype(dq.dtype)


def dkv_kernel(plan: Plan, *refs):
    """One block of queries of one head for the gradients of one block of keys and values. Scores
    stand transposed, (keys, queries): then no product needs a transposed one, and what belongs to a
    query is a row. Where dq fits VMEM, for all queries of the heads that share the keys, it is
    summed up here: then scores are made once, not twice."""
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
    mine = plan.head(0, turn) * plan.number_q + i  # this block's place in dq_acc

    @pl.when(turn == 0)
    def _():
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)
        if ids:
            id_column[...] = column(ids[1][...])

    if plan.with_dq:

        @pl.when(jnp.logical_and(turn == 0, j == 0))
        def _():
            dq_acc[...] = jnp.zeros(dq_acc.shape, jnp.float32)

    def tile(start, masked, part):
        queries = pl.ds(start, plan.q - start)
        keys = pl.ds(part * plan.compute, plan.compute)
        scores, slope = scores_of(start, masked, part)
        weights = jnp.exp2(scores - lse[:, queries])
        dv_acc[keys, :] += _product(weights.astype(d_out.dtype), d_out[queries, :], 1, 0)
        d_scores = weights * (_product(v[keys, :], d_out[queries, :], 1, 1) - delta[:, queries])
        if slope is not None:
            d_scores = d_scores * slope
        d_scores = d_scores.astype(q.dtype)
        dk_acc[keys, :] += _product(d_scores, q[queries, :], 1, 0)
        if plan.with_dq:
            dq_acc[mine, :, queries] += _product(
                k[keys, :], d_scores, 0, 0
            )  # turning k over is cheaper than scores

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
                    dq[head, at, :] = (dq_acc[head * plan.number_q + block].T * plan.scale).astype(
                        dq.dtype
                    )
                    return 0

                lax.fori_loop(0, plan.number_q, store, 0)
