"""The parts that the Hopper kernels share: checks, scores, products, rings of blocks in shared
memory, and the launch.

TMA is the unit that copies between global and shared memory; wgmma multiplies on the tensor cores.
"""

# Shapes: B rows

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mtnlg_jax.compat import result_like, varying_axes
from mtnlg_jax.model.kernels.mask import Mask, visible

COMPUTE = 2  # warpgroups that compute
# Registers of a thread that computes, and of one that feeds. A multiprocessor has 65536.
# A warpgroup has 128 threads: 2 x 128 x 240 + 128 x 24 = 64512.
REGISTERS = (240, 24)
CORES = 132  # multiprocessors of an H100 SXM or H200, if the device is unknown
LOG2E = math.log2(math.e)
LOW = -1e30  # below any score; finite, so that a row that has seen no key yet yields no NaN
# Bytes of keys and values processed at a time: well within the 50 MB L2 cache of an H100.
L2_BYTES = 16 << 20
TILE = plgpu.Layout.WGMMA  # layout of a product in a warpgroup: 64 rows at a time
ROWS = TILE.reduce(1)  # layout of one number for each row of a product
COLUMNS = TILE.reduce(0)  # and for each column


def check_arrays(q, k, v) -> None:
    """Raise ValueError if the kernels do not take these arrays."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            "the GPU kernels take q, k and v of one dtype, bfloat16 or float16, not "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    check_width(q.shape[-1])


def check_width(width: int) -> None:
    """Raise ValueError if the kernels do not take heads of this width."""
    if width % 32 or width > 256:
        raise ValueError(
            f"the GPU kernels take head widths that are multiples of 32, at most 256, not {width}"
        )


def check_blocks(width: int, outer: str, outer_size: int, inner: str, inner_size: int) -> None:
    """Raise ValueError if the tensor cores do not take blocks of these sizes."""
    piece = 32 if width % 64 else 64  # elements of a row that shared memory holds together
    if outer_size % 64 or inner_size % piece or not outer_size or not inner_size:
        raise ValueError(
            f"at head width {width} the GPU kernels take blocks of a multiple of 64 {outer} and of "
            f"{piece} {inner}, not of {outer_size} and {inner_size}"
        )


class ScoreScale(NamedTuple):
    """Turns products of queries and keys into exponents of two: cap(product) * factor."""

    scale: float
    softcap: float | None

    @property
    def factor(self) -> float:
        # With a softcap the product was scaled before tanh, and is multiplied by the cap after it.
        return LOG2E * (self.softcap or (self.scale if self.scale > 0 else 1.0))

    def cap(self, product):
        """Apply the softcap: tanh, made from exp2, since the instruction for tanh is right to only
        three digits. A scale that is not positive is applied here, before the maximum is taken:
        with it the greatest product is not the greatest score."""
        if self.softcap is None:
            return product if self.scale > 0 else product * self.scale
        # tanh(x) = 1 - 2 / (1 + e^2x).
        return 1.0 - 2.0 / (1.0 + jnp.exp2(product * (2 * LOG2E * self.scale / self.softcap)))

    def times_slope(self, weights, capped):
        """``weights`` times the derivative of the softcap."""
        # The derivative of tanh is 1 - tanh^2.
        return weights if self.softcap is None else weights * (1.0 - capped * capped)


def visible_mask(mask: Mask, shape, position, key, length, q_ids, kv_ids, of_keys: bool = False):
    """visible() for a block of scores whose first query is at ``position`` and whose first key is
    at ``key``, in the layout of a product. The ids are vectors. With ``of_keys`` the block is
    transposed."""
    query_axis = 1 if of_keys else 0
    positions = position + plgpu.broadcasted_iota(jnp.int32, shape, query_axis, layout=TILE)
    keys = key + plgpu.broadcasted_iota(jnp.int32, shape, 1 - query_axis, layout=TILE)
    if q_ids is not None:
        q_ids = broadcast_along(q_ids, shape, query_axis)
        kv_ids = broadcast_along(kv_ids, shape, 1 - query_axis)
    return visible(
        positions,
        keys,
        causal=mask.causal,
        window=mask.window,
        length=length,
        q_ids=q_ids,
        kv_ids=kv_ids,
    )


# --- values in registers and products


def broadcast_along(vector, shape, axis: int):
    """``vector``, which runs along ``axis``, broadcast to ``shape``."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def scalar(ref, *index):
    """A number from global memory. Inside a shard_map its type varies over the mesh, which loops
    inside the kernel do not accept; the type of the sum does not."""
    return ref[index] + 0


def zeros(shape):
    """Float32 zeros in the layout of a product, or of one number for each of its rows."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE if len(shape) == 2 else ROWS)


def product(shape, left, right):
    """left @ right, in float32."""

    def multiply(acc):
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def two_products(shape, first, second, use: Callable):
    """use(first product, second) for two pairs of operands. ``second`` is a function: its product
    is still being computed while ``use`` works on the first one."""

    # Both products are issued at once; wait_n=1 lets the second one run on.
    def multiply(acc_first, acc_second):
        plgpu.wgmma(acc_first, *first)
        plgpu.wgmma(acc_second, *second)
        return use(plgpu.wgmma_accumulator_load(acc_first, wait_n=1), lambda: acc_second[...])

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))


def accumulate(total, left, right, fast: bool, meanwhile=lambda: None):
    """total + left @ right, in place in the fast form. meanwhile() is called while the product is
    being computed."""
    if not fast:
        meanwhile()
        return total + product(total.shape, left, right)

    def multiply(acc):
        plgpu.wgmma(acc, left, right)
        meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(total))


def accumulate_and_multiply(total, left, right, left2, right2, fast: bool):
    """(total + left @ right, left2 @ right2). The fast form waits once for both."""
    shape = left2.shape[0], right2.shape[1]
    if not fast:
        return accumulate(total, left, right, fast), product(shape, left2, right2)

    def multiply(accs):
        plgpu.wgmma(accs[0], left, right)
        plgpu.wgmma(accs[1], left2, right2)

    return pl.run_state(multiply)((plgpu.ACC.init(total), plgpu.ACC.init(zeros(shape))))


def stored(value, ref):
    """Store ``value`` in shared memory and return ``ref``, ready to be an operand of a product."""
    ref[...] = value
    plgpu.commit_smem()
    return ref


# --- shared memory and barriers


def tiled(shape, dtype, width: int | None = None):
    """Shared memory in the layout that TMA and wgmma need: rows in pieces of 128 bytes, or of 64 if
    128 does not divide them. ``width``: that of the other operand's rows, whose pieces these must
    match."""
    size = jnp.dtype(dtype).itemsize
    piece = 64 if (width or shape[-1]) * size % 128 else 128
    # JAX's base class declares a method that these two never need as abstract.
    tiling = plgpu.TilingTransform((8, piece // size))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(piece)  # type: ignore[abstract]
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(tiling, swizzle),
    )


def ring(name: str, stages: int, copies: int, readers: int = COMPUTE) -> dict:
    """The barriers of a ring of ``stages`` slots. A slot is full after ``copies`` copies, and empty
    after ``readers`` warpgroups have read it."""
    return {
        f"{name}_full": plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
        f"{name}_empty": plgpu.Barrier(num_barriers=stages, num_arrivals=readers),
    }


def load(copies, barrier) -> None:
    """Copy (from, to) pairs to shared memory and wait. The barrier expects that many arrivals."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def fill(step, stages: int, full, empty, copies) -> None:
    """The feeding warpgroup's side of a ring: copy into the slot of ``step`` as soon as it is
    empty."""
    slot = lax.rem(step, jnp.int32(stages))

    # The first ``stages`` slots have never been filled, so there is nothing to wait for.
    @pl.when(step >= stages)
    def _():
        plgpu.barrier_wait(empty.at[slot])

    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])


def release(empty, was_loaded: bool) -> None:
    """Mark a slot as empty. If it was read by ordinary loads, a fence comes first: the TMA writes
    by another path."""
    if was_loaded:
        plgpu.commit_smem()
    plgpu.barrier_arrive(empty)


def split_tile(tile, pairs: int, number: int, section: int):
    """(pair of row and head, index of the tile in it). The kernel goes through ``section`` pairs at
    a time, whose keys and values fit the L2 cache: first the first tile of each, then the second
    tile of each, and so on."""
    section = min(section, pairs)
    part = lax.div(tile, jnp.int32(section * number))
    inside = tile - part * (section * number)
    size = jnp.minimum(section, pairs - part * section)
    return part * section + lax.rem(inside, size), lax.div(inside, size)


# --- the launch


def launch(
    name: str,
    compute: Callable,
    feed: Callable,
    tiles: int,
    stages: int,
    rings: Sequence[str],
    inputs: dict,
    outputs: dict,
    scratch: dict,
    interpret,
    walks: bool = True,
):
    """Run a kernel whose thread blocks walk over ``tiles`` tiles.

    Args:
      compute: compute(refs, warpgroup, tile, step) -> step, where step counts the blocks that went
          through the rings.
      feed: feed(refs, tile, step) -> step.
      rings: names of the rings, to drain them at the end.
      inputs: arrays by name. outputs: (shape, dtype) by name.
      scratch: shared memory and barriers by name.
      walks: False gives every tile a thread block of its own, which saves a few registers."""
    like = inputs.values()
    types = [result_like(*shape_and_dtype, *like) for shape_and_dtype in outputs.values()]
    # Two when interpreted: then small tests walk as well.
    blocks = 2 if interpret is not None else multiprocessors()
    blocks = min(tiles, blocks) if walks else tiles

    def walk(visit):
        """Call visit(tile, step) -> step for every tile of this thread block. Every other wave runs
        backwards: tiles are ordered by length, so the block with the longest gets the shortest
        next."""
        block = lax.axis_index("block")
        waves, rest = divmod(tiles, blocks)
        mirrored = blocks - 1 - block
        last = mirrored if waves % 2 else block

        def wave(i, step):
            own = jnp.where(lax.rem(i, jnp.int32(2)) == 0, block, mirrored)
            return visit(i * blocks + own, step)

        # The last wave is not full: only the blocks whose turn comes before ``rest`` take part.
        own_waves = jnp.where(last < rest, waves + 1, waves) if rest else waves
        return lax.fori_loop(0, own_waves, wave, jnp.int32(0))

    def body(*refs, **scratch_refs):
        r = SimpleNamespace(**dict(zip((*inputs, *outputs), refs, strict=True)), **scratch_refs)
        wg = lax.axis_index("wg")

        @pl.when(wg < COMPUTE)
        def _():
            # Feeding needs few registers, so they go to the warpgroups that hold sums.
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            walk(lambda tile, step: compute(r, wg, tile, step))

        @pl.when(wg == COMPUTE)
        def _():
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            steps = walk(lambda tile, step: feed(r, tile, step))

            def drain(i, _):
                for key in rings:
                    empty = scratch_refs[f"{key}_empty"]
                    plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(stages))])

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
    """Mark ``results`` as varying over the mesh axes that ``inputs`` vary over, which plgpu.kernel
    drops."""
    missing = [tuple(varying_axes(*inputs) - varying_axes(x)) for x in results]
    return [
        lax.pcast(x, names, to="varying") if names else x
        for x, names in zip(results, missing, strict=True)
    ]


def interpret_params(interpret):
    """Return the argument ``interpret`` of plgpu.kernel: True becomes the default parameters."""
    return plgpu.InterpretGPUParams() if interpret is True else interpret


def multiprocessors() -> int:
    """Number of multiprocessors of the device that the program is compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    # Ahead-of-time compilation names the device that it compiles for.
    if device is not None and device.num_cores:
        return device.num_cores
    if jax.default_backend() == "gpu":
        return jax.devices()[0].core_count
    return CORES


def pad_to(array, size: int):
    """(B, x) -> (B, size). The TMA needs whole rows of 16 bytes."""
    return jnp.pad(array, ((0, 0), (0, size - array.shape[1])))


def pad_to_8(array, axis: int = 1):
    """Pad ``axis`` to a multiple of eight, the tile in which the TMA fills shared memory. It fills
    the rest of a block with zeros by itself."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % 8)
    return jnp.pad(array, widths)
