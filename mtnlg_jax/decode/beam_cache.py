"""The cache of beams: what beams wrote stays where it was written, while the beams are
reordered."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.cache import Prefix, logits_of, run
from mtnlg_jax.model.attention import attention, decode_attention, merge


class BeamCache(NamedTuple):
    """What beams wrote, which stays where it was written: a beam that goes on from another looks at
    other places."""

    layers: tuple[
        tuple[jax.Array, jax.Array], ...
    ]  # (G*P, heads, T*K, H): of each new token all K beams of a group
    writers_GPKT: jax.Array  # which of the K wrote the token that a beam has at T; -1: none yet


def next_logits(
    config: ModelConfig, params, prefix: Prefix, cache: BeamCache, sources_GPK, tokens_GPKW, written
):
    """What follows the ``written`` new tokens of each beam: behind none, what follows the prompt;
    else by ``step_beams``, with the last of them. Within one program, since what chooses among
    logits takes long to compile."""
    shape = sources_GPK.shape

    def first(cache):
        logits_PV = prefix.logits_BV
        return jnp.broadcast_to(logits_PV[None, :, None], (*shape, logits_PV.shape[-1])), cache

    def later(cache):
        last_GPK1 = jnp.broadcast_to((prefix.lengths_B + written - 1)[None, :, None], shape)[
            ..., None
        ]
        tokens_GPK = jnp.take_along_axis(tokens_GPKW, last_GPK1, -1)[..., 0]
        return step_beams(
            config,
            params,
            prefix.cache,
            prefix.lengths_B,
            cache,
            sources_GPK,
            tokens_GPK,
            written - 1,
        )

    return jax.lax.cond(written == 0, first, later, cache)


def step_beams(
    config: ModelConfig,
    params,
    prompt_cache,
    prompts_P,
    cache: BeamCache,
    sources_GPK,
    tokens_GPK,
    read,
):
    """Reads one token a beam behind prompts that all their beams share.

    Args:
      prompt_cache, prompts_P: the cache of P prompts and their lengths; not copied.
      cache: of the new tokens alone, of G groups of K beams for every prompt. Nothing in it is
        moved either: a beam attends to what all K wrote, and sees of it its own line.
      sources_GPK: the beam, 0 to K - 1, that each beam goes on from.
      read: new tokens read so far, the same for all beams.
    Returns: float32 logits of the next (G, P, K, V), the cache with the tokens.
    """
    groups, prompts, beams = tokens_GPK.shape
    rows = groups * prompts * beams
    writers_GPKT = jnp.take_along_axis(cache.writers_GPKT, sources_GPK[..., None], 2)
    writers_GPKT = writers_GPKT.at[..., read].set(jnp.arange(beams))
    seen_GPKTK = writers_GPKT[..., None] == jnp.arange(beams)
    bias = jnp.where(seen_GPKTK, 0.0, -jnp.inf).reshape(groups * prompts, 1, beams, -1)
    positions_R = jnp.broadcast_to((prompts_P + read)[:, None], tokens_GPK.shape).reshape(rows)
    written = []

    def attend(layer, q, k, v):
        def together(x):  # (G*P, K, heads, H) of one row a beam
            return x.reshape(groups * prompts, beams, *x.shape[2:])

        own = tuple(
            jax.lax.dynamic_update_slice(
                x, together(new).swapaxes(1, 2).astype(x.dtype), (0, 0, read * beams, 0)
            )
            for x, new in zip(cache.layers[layer], (k, v), strict=True)
        )
        written.append(own)
        o_own, lse_own = attention(
            together(q),
            *(x.swapaxes(1, 2) for x in own),
            causal=False,
            bias=bias,
            impl="xla",
            return_lse=True,
        )
        o_own = o_own.reshape(q[:, 0].shape)
        lse_own = lse_own.swapaxes(1, 2).reshape(q.shape[0], -1)
        # Before the shared keys, the beams of a prompt are so many more query heads of one row.
        shared_k, shared_v = prompt_cache[layer]
        heads = shared_k.shape[1]
        shape = groups, prompts, beams, heads, q.shape[2] // heads
        grouped = q.reshape(*shape, q.shape[-1]).transpose(1, 3, 0, 2, 4, 5)
        o_shared, lse_shared = decode_attention(
            grouped.reshape(prompts, -1, q.shape[-1]),
            shared_k,
            shared_v,
            prompts_P,
            return_lse=True,
        )
        o_shared = o_shared.reshape(grouped.shape).transpose(2, 0, 3, 1, 4, 5).reshape(o_own.shape)
        lse_shared = (
            lse_shared.reshape(grouped.shape[:-1]).transpose(2, 0, 3, 1, 4).reshape(lse_own.shape)
        )
        return merge(o_shared, lse_shared, o_own, lse_own).astype(q.dtype)[:, None]

    x_RSD, head = run(config, params, tokens_GPK.reshape(rows, 1), positions_R[:, None], attend)
    return logits_of(x_RSD[:, 0], head).reshape(*tokens_GPK.shape, -1), BeamCache(
        tuple(written), writers_GPKT
    )


def empty_beams(prompt_cache, shape: tuple[int, int, int], size: int) -> BeamCache:
    """A cache for ``size`` new tokens of each of (G, P, K) beams."""
    groups, prompts, beams = shape

    def empty(x):
        return jnp.zeros((groups * prompts, x.shape[1], size * beams, x.shape[3]), x.dtype)

    return BeamCache(jax.tree.map(empty, prompt_cache), jnp.full((*shape, size), -1, jnp.int32))
