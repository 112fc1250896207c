"""The cache of beams: tokens stay where they were written while the beams are reordered."""

# Shapes: G groups of beams, P prompts, W beams of a group, S positions, T new-token positions (the
# keys of the cache of beams), B rows: one for each beam of each prompt and group, D width,
# V vocabulary, R rows of a prompt, N query heads, K key/value heads, H head width

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.cache import Prefix, options_of_heads
from mtnlg_jax.decode.forward import logits_of, run
from mtnlg_jax.model.attention import attention, decode_attention, merge, merge_lse


class BeamCache(NamedTuple):
    """Keys and values of the tokens that beams wrote.

    Nothing in it moves: a beam that continues another one reads other entries.
    """

    # (k, v) of each layer, each (P*G, heads, T*W, H): for each new token all W beams of a group
    layers: tuple[tuple[jax.Array, jax.Array], ...]
    writers_GPWT: jax.Array  # which of the W beams wrote a beam's token at T; -1: none yet


def next_logits(
    config: ModelConfig, params, prefix: Prefix, cache: BeamCache, sources_GPW, tokens_GPWS, written
) -> tuple[jax.Array, BeamCache]:
    """Return the logits after the ``written`` new tokens of each beam, and the cache.

    After none they are those of the prompt; otherwise ``step_beams`` reads the last token. Both
    cases are one program, since the code that chooses from the logits takes long to compile.
    """
    shape = sources_GPW.shape

    def first(cache):
        logits_PV = prefix.logits_BV
        return jnp.broadcast_to(logits_PV[None, :, None], (*shape, logits_PV.shape[-1])), cache

    def later(cache):
        last_GPW = jnp.broadcast_to((prefix.lengths_B + written - 1)[None, :, None], shape)
        tokens_GPW = jnp.take_along_axis(tokens_GPWS, last_GPW[..., None], -1)[..., 0]
        return step_beams(config, params, prefix, cache, sources_GPW, tokens_GPW, written - 1)

    return jax.lax.cond(written == 0, first, later, cache)


def step_beams(
    config: ModelConfig,
    params,
    prefix: Prefix,
    cache: BeamCache,
    sources_GPW,
    tokens_GPW,
    read,
) -> tuple[jax.Array, BeamCache]:
    """Read one token of each beam.

    Args:
      prefix: the prompts, shared by all their beams and never copied.
      cache: of the new tokens alone. A beam attends to the tokens of all W beams, masked to its
        own ancestry.
      sources_GPW: the beam, 0 to W - 1, that each beam continues.
      read: number of new tokens already read, the same for all beams.

    Returns: float32 logits of the next token (G, P, W, V), and the cache with the tokens.
    """
    groups, prompts, beams = tokens_GPW.shape
    writers_GPWT = jnp.take_along_axis(cache.writers_GPWT, sources_GPW[..., None], 2)
    writers_GPWT = writers_GPWT.at[..., read].set(jnp.arange(beams))
    visible_GPWTW = writers_GPWT[..., None] == jax.lax.broadcast_to_rank(jnp.arange(beams), 5)
    # The rows of a prompt stand together, so that prompts can be split.
    visible = visible_GPWTW.swapaxes(0, 1).reshape(prompts * groups, 1, beams, -1)
    tokens_B1 = tokens_GPW.swapaxes(0, 1).reshape(-1, 1)
    positions_P = prefix.lengths_B + read
    positions_B1 = jnp.repeat(positions_P, groups * beams)[:, None]

    def attend(layer, q, k, v, return_lse=False, **options):
        visible, positions_P, lengths_P, read = layer.rows
        prompts = len(lengths_P)  # those of a micro-batch, as far as there are stages

        def per_group(x):  # from one row a beam to (P*G, W, heads, H)
            return x.reshape(prompts * groups, beams, *x.shape[2:])

        def write(old, new):
            new = per_group(new).swapaxes(1, 2).astype(old.dtype)
            at = (0, 0, read * beams, 0)
            if layer.live is not None:
                new = jnp.where(layer.live, new, jax.lax.dynamic_slice(old, at, new.shape))
            return jax.lax.dynamic_update_slice(old, new, at)

        own = tuple(write(x, new) for x, new in zip(layer.cache, (k, v), strict=True))
        o_own, lse_own = attention(
            per_group(q),
            *(x.swapaxes(1, 2) for x in own),
            causal=False,
            impl="xla",
            return_lse=True,
            **_own_options(options, visible, read),
        )
        o_own = o_own.reshape(q[:, 0].shape)
        lse_own = lse_own.swapaxes(1, 2).reshape(q.shape[0], -1)
        o_shared, lse_shared = attend_shared(q, layer.shared, lengths_P, positions_P, options)
        out = merge(o_shared, lse_shared, o_own, lse_own).astype(q.dtype)[:, None]
        found = (out, merge_lse(lse_shared, lse_own)[..., None]) if return_lse else out
        return found, own

    x_BSD, head, layers = run(
        config,
        params,
        tokens_B1,
        positions_B1,
        attend,
        cache=cache.layers,
        shared=prefix.cache,
        rows=(visible, positions_P, jnp.asarray(prefix.lengths_B), jnp.asarray(read)),
        units=prompts,
    )
    logits_BV = logits_of(x_BSD[:, 0], head)
    logits_GPWV = logits_BV.reshape(prompts, groups, beams, -1).swapaxes(0, 1)
    return logits_GPWV, BeamCache(layers, writers_GPWT)


def attend_shared(q, shared, lengths_P, positions_P, options: dict):
    """Attend from the rows of each prompt to the prompt's keys, which are not copied.

    Args:
      q: (P*R, 1, N, H), one query of each of the R rows of a prompt.
      shared: (k, v) of the prompts, (P, K, T, H) each.
      lengths_P: the keys that are visible.
      positions_P: of the queries.
      options: those of `decode_attention`.

    Returns: (P*R, N, H), and the log-sum-exp (P*R, N).
    """
    k, v = shared
    heads = k.shape[1]
    shape = len(lengths_P), q.shape[0] // len(lengths_P), heads, q.shape[2] // heads
    # To attend to the keys once, present the rows of a prompt as more query heads of one row.
    grouped = q.reshape(*shape, q.shape[-1]).transpose(0, 2, 1, 3, 4)
    # Slopes (N,) are those of (heads, rest); the presented heads are (heads, R, rest).
    shared_options = options_of_heads(options, grouped.shape[1:4], 1)
    if "window" in options or "alibi_slopes" in options:
        shared_options["positions"] = positions_P
    out, lse = decode_attention(
        grouped.reshape(len(lengths_P), -1, q.shape[-1]),
        k,
        v,
        lengths_P,
        return_lse=True,
        **shared_options,
    )
    out = out.reshape(grouped.shape).transpose(0, 2, 1, 3, 4).reshape(q[:, 0].shape)
    lse = lse.reshape(grouped.shape[:-1]).transpose(0, 2, 1, 3).reshape(q.shape[0], -1)
    return out, lse


def _own_options(options: dict, visible, read) -> dict:
    """Return options for the tokens of the beams, whose positions are folded into a bias.

    ``visible``: (P*G, 1, W, T*W), which keys each beam sees.
    """
    seen = visible
    beams, keys = visible.shape[-2:]
    # How far after the query each key is: 0 for the token that is read now.
    distance = jnp.repeat(jnp.arange(keys // beams) - read, beams)[None, None, None]
    bias = jnp.zeros(())
    options = dict(options)
    window = options.pop("window", None)
    if window is not None:
        seen = seen & (distance > -window)
    slopes = options.pop("alibi_slopes", None)
    if slopes is not None:
        bias = slopes[None, :, None, None] * distance.astype(jnp.float32)
    return options | {"bias": jnp.where(seen, bias, -jnp.inf)}


def empty_beams(prompt_cache, shape: tuple[int, ...], size: int) -> BeamCache:
    """Return a cache for ``size`` new tokens of each of (G, P, W) beams."""
    groups, prompts, beams = shape

    def empty(x):
        return jnp.zeros((prompts * groups, x.shape[1], size * beams, x.shape[3]), x.dtype)

    return BeamCache(jax.tree.map(empty, prompt_cache), jnp.full((*shape, size), -1, jnp.int32))
