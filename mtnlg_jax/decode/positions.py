"""Write to a cache whose positions ``context`` may split: each device writes to those it holds."""

# Shapes: B rows, S new tokens, K key/value heads, T key positions, H head width

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from mtnlg_jax.model.kernels.over_mesh import CONTEXT
from mtnlg_jax.model.quantize import quantize
from mtnlg_jax.parallel.auto import auto_axes, axes_of
from mtnlg_jax.parallel.collectives import axis_index, axis_size, to_next

NOWHERE = jnp.iinfo(jnp.int32).max


def write(layer, k_BSKH, v_BSKH, positions_BS, live=None):
    """Return a layer's cache with new keys and values.

    Positions past it are not written, and none if ``live`` is False.
    """
    if live is not None:
        positions_BS = jnp.where(live, positions_BS, NOWHERE)
    new: tuple[jax.Array, ...] = (k_BSKH, v_BSKH)
    if len(layer) == 4:
        (k, k_scale), (v, v_scale) = (quantize(x, -1) for x in new)
        new = k, v, k_scale, v_scale

    def own(layer, new, positions_BS):
        def one(old, x):
            written = old.at[rows_B1, :, at_BS].set(x.astype(old.dtype), mode="drop")
            # Without the barrier XLA:CPU writes again inside the attention's fusion, and so copies
            # the whole cache.
            return lax.optimization_barrier(written)

        rows_B1 = jnp.arange(positions_BS.shape[0])[:, None]
        at_BS = positions_BS
        if axis_size(CONTEXT) > 1:
            size = layer[0].shape[2]
            at_BS = positions_BS - axis_index(CONTEXT) * size
            # Below 0 an index would count from the end.
            at_BS = jnp.where((at_BS >= 0) & (at_BS < size), at_BS, NOWHERE)
        return tuple(one(old, x) for old, x in zip(layer, new, strict=True))

    of_cache = _spec(layer[0])
    rows, heads, context = of_cache
    if context is None:
        return own(tuple(layer), new, positions_BS)
    # Of all axes: XLA aborts where it splits the rows of a scatter and positions are not its own.
    return jax.shard_map(
        own,
        in_specs=(of_cache, P(rows, None, heads), P(rows)),
        out_specs=of_cache,
        axis_names=auto_axes(),
    )(tuple(layer), new, positions_BS)


def _spec(x_BKTH) -> P:
    """Return how the first three dims of a layer's cache are split."""
    return P(*(axes_of(dim, size) or None for dim, size in zip("BLT", x_BKTH.shape, strict=False)))


def lengthened(x_BKTH, size: int):
    """Return keys or values with zeros behind them, for ``size`` positions.

    Where ``context`` splits both, the parts move from device to device, since the longer array has
    other positions on each.
    """
    length = x_BKTH.shape[2]
    if length == size:
        return x_BKTH
    longer = jax.ShapeDtypeStruct((*x_BKTH.shape[:2], size), x_BKTH.dtype)
    of_cache = _spec(longer)
    if of_cache[2] is None or not axes_of("Q", length):
        return jnp.pad(x_BKTH, ((0, 0), (0, 0), (0, size - length), (0, 0)))

    def own(part_BKTH):
        parts = axis_size(CONTEXT)
        here = axis_index(CONTEXT)
        had = part_BKTH.shape[2]
        positions_T = here * (size // parts) + jnp.arange(size // parts)

        def copied(hop, part_BKTH, found_BKTH):
            """Copy what belongs here of the part that began ``hop`` devices before this one."""
            at_T = positions_T - (here - hop) % parts * had
            mine_T = (at_T >= 0) & (at_T < had)
            taken_BKTH = part_BKTH[:, :, jnp.clip(at_T, 0, had - 1)]
            return jnp.where(mine_T[None, None, :, None], taken_BKTH, found_BKTH)

        def one(hop, carry):
            part_BKTH, found_BKTH = carry
            part_BKTH = lax.ppermute(part_BKTH, CONTEXT, to_next(parts))
            return part_BKTH, copied(hop, part_BKTH, found_BKTH)

        empty = jnp.zeros(
            (*part_BKTH.shape[:2], size // parts, part_BKTH.shape[3]), part_BKTH.dtype
        )
        start = part_BKTH, copied(0, part_BKTH, empty)
        return lax.fori_loop(1, parts, one, start)[1]

    return jax.shard_map(own, in_specs=of_cache, out_specs=of_cache, axis_names=auto_axes())(x_BKTH)
