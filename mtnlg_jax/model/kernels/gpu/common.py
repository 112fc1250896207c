"""What the Hopper kernels share: their walk over tiles, rings of blocks, products, and the
launch."""

import math
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mtnlg_jax.compat import result_like, varying_axes
from mtnlg_jax.model.kernels.blocks import Blocks
from mtnlg_jax.model.kernels.mask import Mask, block_ranges, visible

COMPUTE = 2  # warpgroups that compute
REGISTERS = 240, 24  # of a thread that computes, and of one that feeds; a multiprocessor has 65536
CORES = 132  # multiprocessors of an H100 SXM or H200, where nothing tells
LOG2E = math.log2(math.e)
LOW = -1e30  # below any score; finite, so that a row that has seen no key yet yields no NaN
L2_BYTES = (
    16 << 20
)  # keys and values of the heads in work at a time: well within the 50 MB L2 cache of an H100
TILE = plgpu.Layout.WGMMA  # how a warpgroup holds a product: 64 rows at a time
ROWS = TILE.reduce(1)  # how it holds one number for each row or column of a product
COLUMNS = TILE.reduce(0)


def check(q, k, v) -> None:
    """Raises ValueError where the kernels do not take these arrays."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"the GPU kernels take bfloat16 or float16, all three alike: {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.shape[-1] % 32 or q.shape[-1] > 256:
        raise ValueError(
            f"the GPU kernels take head widths that are multiples of 32, at most 256, not {q.shape[-1]}"
        )


def check_blocks(width: int, outer: str, outer_size: int, inner: str, inner_size: int) -> None:
    """Raises ValueError where the tensor cores do not take blocks of these sizes."""
    piece = 32 if width % 64 else 64  # of a row in shared memory
    if outer_size % 64 or inner_size % piece or not outer_size or not inner_size:
        raise ValueError(
            f"at head width {width} the GPU kernels take blocks of a multiple of 64 {outer} and of "
            f"{piece} {inner}, not of {outer_size} and {inner_size}"
        )


class OverKeys(NamedTuple):
    """How tiles of queries visit blocks of keys: what the forward pass and dq share."""

    plan: "Plan"
    batch: int
    heads: int
    group: int  # query heads of a key/value head
    section: int  # pairs of row and query head in work at a time
    blocks: Blocks

    @classmethod
    def of(cls, q_shape, k_shape, mask: Mask, blocks: Blocks):
        batch, queries, heads, width = q_shape
        keys, kv_heads = k_shape[1:3]
        group = heads // kv_heads
        section = max(1, L2_BYTES // (4 * keys * width)) * group
        return cls(
            Plan(mask, queries, keys, COMPUTE * blocks.q, blocks.kv),
            batch,
            heads,
            group,
            section,
            blocks,
        )

    @property
    def ids(self) -> bool:
        return self.plan.mask.q_ids is not None

    @property
    def tiles(self) -> int:
        return self.batch * self.heads * self.plan.number

    @property
    def padded(self) -> int:
        """Queries of whole tiles."""
        return self.plan.number * self.plan.outer

    def place(self, tile):
        """Row, query head and place of the first query of a tile."""
        pair, number = split_tile(tile, self.batch * self.heads, self.plan.number, self.section)
        number = (
            self.plan.number - 1 - number if self.plan.mask.causal else number
        )  # the longest first
        return *(
            f(pair, jnp.int32(self.heads)) for f in (lax.div, lax.rem)
        ), number * self.plan.outer

    def slot(self, step, j, span):
        """Where in the rings the tile's block j is, if ``step`` blocks came before its first
        one."""
        return lax.rem(step + j - span.first, jnp.int32(self.blocks.stages))

    def feed(self, r, tile, step):
        row, head, base = self.place(tile)
        span = self.plan.span(r, row, base, base, self.plan.outer)
        kv_head = lax.div(head, jnp.int32(self.group))

        def block(j, _):
            at = pl.ds(j * self.blocks.kv, self.blocks.kv)
            i = step + j - span.first
            copies = [(r.k.at[row, at, kv_head], r.k_block)]
            if self.ids:
                copies.append((r.kv_ids.at[row, at], r.kv_ids_block))
            fill(i, self.blocks.stages, r.k_full, r.k_empty, copies)
            fill(
                i, self.blocks.stages, r.v_full, r.v_empty, [(r.v.at[row, at, kv_head], r.v_block)]
            )

        lax.fori_loop(span.first, span.end, block, None)
        return step + span.count

    def inputs(self, q, k, v) -> dict:
        mask = self.plan.mask
        found = {"q": eights(q), "k": eights(k), "v": eights(v)}
        if not mask.known:
            found["spans"] = self.plan.spans(self.batch)
        if self.ids:
            found |= {
                "q_ids": pad_to(mask.q_ids, self.padded),
                "kv_ids": pad_to(mask.kv_ids, self.plan.padded),
            }
        return found

    def scratch(self, width: int, dtype) -> dict:
        rows = self.blocks.q
        kv = self.blocks.kv
        stages = self.blocks.stages
        found = {
            "k_block": tiled((stages, kv, width), dtype),
            "v_block": tiled((stages, kv, width), dtype),
            **ring("k", stages, 1 + self.ids),
            **ring("v", stages, 1),
        }
        if self.ids:
            found |= {
                "q_ids_block": plgpu.SMEM((COMPUTE, rows), jnp.int32),
                "kv_ids_block": plgpu.SMEM((stages, kv), jnp.int32),
            }
        return found


class Weigh(NamedTuple):
    """From products of queries and keys to exponents of two: cap(product) * factor."""

    scale: float
    softcap: float | None

    @property
    def factor(self) -> float:
        return LOG2E * (self.softcap or (self.scale if self.scale > 0 else 1.0))

    def cap(self, product):
        """softcap: tanh, from exp2, as the instruction for tanh is right to only three digits. A
        scale that is not positive is multiplied at once, for the greatest product is not the
        greatest score then."""
        if self.softcap is None:
            return product if self.scale > 0 else product * self.scale
        return 1.0 - 2.0 / (1.0 + jnp.exp2(product * (2 * LOG2E * self.scale / self.softcap)))

    def sloped(self, weights, capped):
        """``weights`` times the derivative of the softcap."""
        return weights if self.softcap is None else weights * (1.0 - capped * capped)


class Span(NamedTuple):
    """Blocks that a warpgroup visits: first <= j < last; of them whole <= j < whole_end need no
    mask. The other warpgroup may need more, up to ``end``."""

    first: int | jax.Array
    whole: jax.Array
    whole_end: jax.Array
    last: int | jax.Array
    end: int | jax.Array
    offset: int | jax.Array  # of the mask
    length: int | jax.Array | None  # keys that exist; None: all keys of every block do
    sections: tuple[
        bool, bool, bool
    ]  # whether there may be masked blocks in front, whole ones, masked ones behind

    @property
    def count(self):
        return self.end - self.first

    def walk(self, block, carry):
        """Calls block(masked, j, carry) -> carry for every j in turn."""
        ends = (self.first, self.whole, self.whole_end, self.last)
        for some, masked, start, end in zip(
            self.sections, (True, False, True), ends[:-1], ends[1:], strict=True
        ):
            if some:
                carry = lax.fori_loop(
                    start, end, lambda j, c, masked=masked: block(masked, j, c), carry
                )
        return carry


class Plan(NamedTuple):
    """Which blocks of the one kind (``inner`` places each) a tile of the other kind (``outer``
    places) visits.
    of_keys: the tiles are of keys, and the blocks of queries."""

    mask: Mask
    queries: int
    keys: int
    outer: int
    inner: int
    of_keys: bool = False

    @property
    def number(self) -> int:
        """Tiles of one row and head."""
        return -(-(self.keys if self.of_keys else self.queries) // self.outer)

    @property
    def blocks(self) -> int:
        return -(-(self.queries if self.of_keys else self.keys) // self.inner)

    @property
    def padded(self) -> int:
        """Places of whole blocks."""
        return self.blocks * self.inner

    @property
    def ragged(self) -> bool:
        """Whether the last block has keys that do not exist. Queries that do not exist have no
        weight anyhow."""
        return not self.of_keys and self.keys % self.inner != 0

    def flushes(self, places: int) -> bool:
        """Whether a warpgroup of ``places`` queries may have blocks at its end that only the other
        one needs, and
        passes over them. One with keys does not: the blocks that keys do not need are in front."""
        bounded = self.mask.causal or self.mask.window is not None
        return (
            self.mask.known
            and not self.of_keys
            and bounded
            and self.inner < self.outer
            and places < self.outer
        )

    def spans(self, batch: int):
        """int32 (B, tiles, 6), what a Span has but for ``last`` and ``sections``, where shapes do
        not tell."""
        mask = self.mask
        sizes = (self.inner, self.outer) if self.of_keys else (self.outer, self.inner)
        first, end = block_ranges(
            mask, batch, self.queries, self.keys, *sizes, of_keys=self.of_keys
        )
        whole = self._wholly_visible(batch, *sizes)
        one = jnp.argmax(whole, -1)
        past = self.blocks - jnp.argmax(whole[..., ::-1], -1)
        whole_in_a_row = whole.sum(-1) == past - one  # never so where there is none
        one = jnp.where(whole_in_a_row, one, first)
        past = jnp.where(whole_in_a_row, past, first)
        offset = jnp.broadcast_to(jnp.asarray(mask.q_offset), (batch,))
        length = jnp.full((batch,), self.keys)
        if mask.kv_lengths is not None:
            length = jnp.minimum(length, mask.kv_lengths)
        columns = jnp.broadcast_arrays(first, one, past, end, offset[:, None], length[:, None])
        return jnp.stack(columns, -1).astype(jnp.int32)

    def _wholly_visible(self, batch: int, block_q: int, block_kv: int):
        """(B, tiles, blocks) booleans: where every query sees every key."""
        mask = self.mask
        number_q = -(-self.queries // block_q)
        number_kv = -(-self.keys // block_kv)
        first_q = jnp.arange(number_q)[:, None] * block_q
        first_kv = jnp.arange(number_kv) * block_kv
        first_q = jnp.broadcast_to(jnp.asarray(mask.q_offset), (batch,))[:, None, None] + first_q
        last_q = first_q + block_q - 1
        last_kv = first_kv + block_kv - 1
        seen = jnp.ones((batch, number_q, number_kv), bool)
        seen &= visible(first_q, last_kv, causal=mask.causal, length=self.keys)
        if mask.window is not None:
            seen &= visible(last_q, first_kv, causal=False, window=mask.window)
            seen &= visible(first_q, last_kv, causal=False, window=mask.window)
        if mask.kv_lengths is not None:
            seen &= last_kv < mask.kv_lengths[:, None, None]
        if mask.q_ids is not None:
            padded = [
                jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), mode="edge")
                for ids, size in ((mask.q_ids, block_q), (mask.kv_ids, block_kv))
            ]
            blocks = [
                x.reshape(batch, -1, size)
                for x, size in zip(padded, (block_q, block_kv), strict=True)
            ]
            low_q, low_kv = [x.min(-1) for x in blocks]
            high_q, high_kv = [x.max(-1) for x in blocks]
            seen &= (low_q == high_q)[:, :, None] & (low_kv == high_kv)[:, None]
            seen &= low_q[:, :, None] == low_kv[:, None]
        return seen.swapaxes(1, 2) if self.of_keys else seen

    def span(self, r, row, base, start, places: int) -> Span:
        """Of ``places`` places from ``start`` on, in the tile at ``base``."""
        mask = self.mask
        if not mask.known:
            tile = lax.div(base, jnp.int32(self.outer))
            first, whole, whole_end, end, offset, length = (
                scalar(r.spans, row, tile, i) for i in range(6)
            )
            length = length if mask.kv_lengths is not None or self.ragged else None
            return Span(first, whole, whole_end, end, end, offset, length, (True, True, True))
        low, high, _, _ = self._reach(base, self.outer)
        first = self._from(low)
        end = self._past(high)
        if low is not None:
            first = jnp.minimum(first, end)
        _, high, whole_low, whole_high = self._reach(start, places)
        whole = jnp.clip(self._from(whole_low, whole=True), first, end)
        whole_end = jnp.clip(self._past(whole_high, whole=True), whole, end)
        last = jnp.clip(self._past(high), whole_end, end) if self.flushes(places) else end
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

    def _reach(self, start, places: int):
        """First and last place that any of ``places`` places from ``start`` on sees (or is seen
        by), and first and last that all of them do; None where there is no bound."""
        wide = None if self.mask.window is None else self.mask.window - 1
        back = wide
        ahead = 0 if self.mask.causal else wide
        if self.of_keys:
            back, ahead, start = ahead, back, start - self.mask.q_offset
        else:
            start = start + self.mask.q_offset
        stop = start + places - 1
        low, whole_low = (None, None) if back is None else (start - back, stop - back)
        high, whole_high = (None, None) if ahead is None else (stop + ahead, start + ahead)
        return low, high, whole_low, whole_high

    def _from(self, place, whole: bool = False):
        """The block of a place, or with ``whole`` the first one that begins there or later."""
        if place is None:
            return 0
        return lax.div(
            jnp.maximum(place, 0) + (self.inner - 1 if whole else 0), jnp.int32(self.inner)
        )

    def _past(self, place, whole: bool = False):
        """One past the block of a place, or with ``whole`` past the last one that ends there or
        earlier."""
        most = self.keys // self.inner if whole and self.ragged else self.blocks
        if place is None:
            return most
        round_up = 0 if whole else self.inner - 1
        return jnp.minimum(
            lax.div(jnp.maximum(place + 1, 0) + round_up, jnp.int32(self.inner)), most
        )


def see(mask: Mask, shape, position, key, length, q_ids, kv_ids, of_keys: bool = False):
    """``visible`` for a block of scores with its first query at ``position`` and its first key at
    ``key``, laid out as a product; the ids as vectors. of_keys: the block is transposed."""
    query_axis = 1 if of_keys else 0
    positions = position + plgpu.broadcasted_iota(jnp.int32, shape, query_axis, layout=TILE)
    keys = key + plgpu.broadcasted_iota(jnp.int32, shape, 1 - query_axis, layout=TILE)
    if q_ids is not None:
        q_ids = along(q_ids, shape, query_axis)
        kv_ids = along(kv_ids, shape, 1 - query_axis)
    return visible(
        positions,
        keys,
        causal=mask.causal,
        window=mask.window,
        length=length,
        q_ids=q_ids,
        kv_ids=kv_ids,
    )


# --- what a kernel is made of
# ----------------------------------------------------------------------------------


def along(vector, shape, axis: int):
    return lax.broadcast_in_dim(vector, shape, [axis])


def scalar(ref, *place):
    """A number from global memory. Inside a shard_map it has a type that varies over the mesh,
    which loops inside the kernel do not take; the sum has not."""
    return ref[place] + 0


def zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE if len(shape) == 2 else ROWS)


def product(shape, left, right):
    def multiply(acc):
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def two_products(shape, first, second, use):
    """use(first product, second) of two pairs of operands, where ``second`` is a function: that
    product is on its way while the first one is looked at."""

    def multiply(acc_first, acc_second):
        plgpu.wgmma(acc_first, *first)
        plgpu.wgmma(acc_second, *second)
        return use(plgpu.wgmma_accumulator_load(acc_first, wait_n=1), lambda: acc_second[...])

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))


def accumulate(total, left, right, fast: bool, meanwhile=lambda: None):
    """total + left @ right, in place in the fast form. meanwhile() is called while the product is
    on its way."""
    if not fast:
        meanwhile()
        return total + product(total.shape, left, right)

    def multiply(acc):
        plgpu.wgmma(acc, left, right)
        meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(total))


def accumulate_and_multiply(total, left, right, left2, right2, fast: bool):
    """(total + left @ right, left2 @ right2): in the fast form with one wait for both."""
    shape = left2.shape[0], right2.shape[1]
    if not fast:
        return accumulate(total, left, right, fast), product(shape, left2, right2)

    def multiply(accs):
        plgpu.wgmma(accs[0], left, right)
        plgpu.wgmma(accs[1], left2, right2)

    return pl.run_state(multiply)((plgpu.ACC.init(total), plgpu.ACC.init(zeros(shape))))


def stored(value, ref):
    """``ref`` after it took ``value``, ready to be an operand of a product."""
    ref[...] = value
    plgpu.commit_smem()
    return ref


def tiled(shape, dtype, width: int | None = None):
    """Shared memory as TMA and wgmma want it: rows in pieces of 128 bytes, or of 64 where 128 does
    not divide them.
    width: of the other operand's rows, whose pieces these must match."""
    size = jnp.dtype(dtype).itemsize
    piece = 64 if (width or shape[-1]) * size % 128 else 128
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, piece // size)), plgpu.SwizzleTransform(piece)),
    )


def ring(name: str, stages: int, copies: int, readers: int = COMPUTE) -> dict:
    """Barriers of a ring whose slots take ``copies`` copies each."""
    return {
        f"{name}_full": plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
        f"{name}_empty": plgpu.Barrier(num_barriers=stages, num_arrivals=readers),
    }


def load(copies, barrier) -> None:
    """Copies (from, to) pairs to shared memory and waits; the barrier counts their number."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def fill(step, stages: int, full, empty, copies) -> None:
    """The feeding warpgroup's side of a ring: copies into the slot of ``step`` as soon as it is
    empty."""
    slot = lax.rem(step, jnp.int32(stages))

    @pl.when(step >= stages)
    def _():
        plgpu.barrier_wait(empty.at[slot])

    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])


def release(empty, was_loaded: bool) -> None:
    """A slot may be filled again. What ordinary loads read needs a fence first: the TMA writes by
    another path."""
    if was_loaded:
        plgpu.commit_smem()
    plgpu.barrier_arrive(empty)


def split_tile(tile, pairs: int, number: int, section: int):
    """(pair of row and head, number within it). Tiles go through ``section`` pairs at a time, whose
    keys and values fit the L2 cache, and there all first ones come first, then all second ones."""
    section = min(section, pairs)
    part = lax.div(tile, jnp.int32(section * number))
    inside = tile - part * (section * number)
    size = jnp.minimum(section, pairs - part * section)
    return part * section + lax.rem(inside, size), lax.div(inside, size)


def launch(
    name: str,
    compute,
    feed,
    tiles: int,
    stages: int,
    rings,
    inputs,
    outputs,
    scratch,
    interpret,
    walks: bool = True,
):
    """Runs a kernel whose thread blocks walk over ``tiles`` tiles: compute(refs, warpgroup, tile,
    step) -> step, and feed(refs, tile, step) -> step, where step counts the blocks that went
    through the rings. inputs: arrays by name;
    outputs: (shape, dtype) by name; scratch: shared memory and barriers by name. walks: False gives
    every tile a thread block of its own, which spares a few registers."""
    like = inputs.values()
    types = [result_like(*shape_and_dtype, *like) for shape_and_dtype in outputs.values()]
    blocks = 2 if interpret is not None else multiprocessors()  # two: so that small tests walk, too
    blocks = min(tiles, blocks) if walks else tiles

    def walk(visit):
        """Calls visit(tile, step). Every other wave runs backwards: tiles come by length, and who
        had the longest has the shortest next."""
        block = lax.axis_index("block")
        waves, rest = divmod(tiles, blocks)
        mirrored = blocks - 1 - block
        last = mirrored if waves % 2 else block

        def wave(i, step):
            return visit(
                i * blocks + jnp.where(lax.rem(i, jnp.int32(2)) == 0, block, mirrored), step
            )

        waves = jnp.where(last < rest, waves + 1, waves) if rest else waves
        return lax.fori_loop(0, waves, wave, jnp.int32(0))

    def body(*refs, **scratch_refs):
        r = SimpleNamespace(**dict(zip((*inputs, *outputs), refs, strict=True)), **scratch_refs)
        wg = lax.axis_index("wg")

        @pl.when(wg < COMPUTE)
        def _():
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            walk(lambda tile, step: compute(r, wg, tile, step))

        @pl.when(wg == COMPUTE)
        def _():
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            steps = walk(lambda tile, step: feed(r, tile, step))

            def drain(i, _):
                for key in rings:
                    plgpu.barrier_wait(
                        scratch_refs[f"{key}_empty"].at[lax.rem(i, jnp.int32(stages))]
                    )

            lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)

    results = plgpu.kernel(
        body,
        out_type=types,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        kernel_name=name,
        interpret=interpret_params(interpret),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*like)
    return varying_like(results, *like)


def varying_like(results, *inputs):
    """``results`` of plgpu.kernel, which drops the mesh axes that its results vary over, as varying
    over those of ``inputs``."""
    missing = [tuple(varying_axes(*inputs) - varying_axes(x)) for x in results]
    return [
        lax.pcast(x, names, to="varying") if names else x
        for x, names in zip(results, missing, strict=True)
    ]


def interpret_params(interpret):
    return plgpu.InterpretGPUParams() if interpret is True else interpret


def multiprocessors() -> int:
    """Of the device that the program is made for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.num_cores:
        return device.num_cores
    if jax.default_backend() == "gpu":
        return jax.devices()[0].core_count
    return CORES


def pad_to(array, size: int):
    """(B, x) -> (B, size). The TMA wants whole rows of 16 bytes."""
    return jnp.pad(array, ((0, 0), (0, size - array.shape[1])))


def eights(array):
    """(B, x, ...) with x padded to whole tiles of eight, which is how the TMA fills shared memory.
    What a block has beyond that it fills with zeros by itself."""
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % 8), *[(0, 0)] * (array.ndim - 2)))
