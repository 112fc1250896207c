"""A rolling cache for windowed layers: only the keys that the next query sees are kept.

Position p is held in slot p mod the window (the rolling buffer of Jiang 2023, Mistral 7B). A new
key overwrites the one that just left the window before its query attends, so every slot in use is
visible: no mask of the window is needed, and the kernels of decode_attention take it like any other
cache. The order of keys does not matter: a softmax does not depend on it, and keys are rotated
before they are cached.
"""

# Shapes: B rows, S new tokens, N query heads, K key/value heads, T key positions, W slots in use,
# H head width

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtnlg_jax.config import DecodeConfig, ModelConfig
from mtnlg_jax.model.attention import attention

# The GPU kernels copy a cache that is not a multiple of 8 long, and TPUs pad it in memory.
MULTIPLE = 8


class Rolling(NamedTuple):
    """The cache of a windowed layer, in slots instead of positions."""

    arrays: tuple[jax.Array, ...]  # as in other layers: (k, v), in int8 followed by their scales


def slots_of(config: ModelConfig, number: int, size: int) -> int:
    """Return how many positions of a row layer ``number`` holds in a cache for ``size`` tokens.

    This is less than ``size`` only if the layer has a shorter window. ALiBi depends on the distance
    of each key, so its layers keep all positions.
    """
    window = config.layer(number).window
    if window is None or config.position_embedding_type == "alibi":
        return size
    # The slots that rounding adds are never written and never seen.
    return min(-(-window // MULTIPLE) * MULTIPLE, size)


def roll(config: ModelConfig, number: int, layer, lengths_B, size: int):
    """Return the cache of layer ``number`` as decoding keeps it: a `Rolling` if that is shorter.

    Args:
      layer: arrays (B, K, T, H) or (B, K, T) whose first ``lengths_B`` positions are known. A
        `Rolling` is returned as it is.
      size: the tokens for which a cache of all positions would have room, T or more.
    """
    slots = slots_of(config, number, size)
    if isinstance(layer, Rolling) or slots == size:
        return layer
    window = config.layer(number).window
    assert window is not None, "only a window makes a layer hold fewer positions"
    last_B1 = lengths_B[:, None] - 1
    # The newest position of each slot. Positions below 0 do not exist: a slot that has none is not
    # seen before a token is written there.
    positions_BW = last_B1 - (last_B1 - jnp.arange(slots)[None, :]) % window
    positions_BW = jnp.maximum(positions_BW, 0)

    def gather(x):
        at = positions_BW.reshape(len(positions_BW), 1, slots, *(1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, at, 2)

    return Rolling(jax.tree.map(gather, layer))


def keeps_windows(config: DecodeConfig) -> bool:
    """Return whether a windowed layer may keep only its window under these settings.

    Beams share the prompt's cache, which each of them continues, and so do the candidates of
    contrastive search. Guesses overwrite keys, and if a guess is rejected those keys are still
    needed.
    """
    shared = config.num_beams > 1 or config.penalty_alpha > 0
    return not shared and not config.prompt_lookup_num_tokens


def keeps_positions(cache: Sequence[Any]) -> bool:
    """Return whether every layer keeps all positions, not only a window."""
    return not any(isinstance(layer, Rolling) for layer in cache)


def check_whole(cache: Sequence[Any], reader: str) -> None:
    """Raise ValueError if ``cache`` lacks earlier keys of windowed layers, which ``reader`` needs.

    Speculation overwrites keys by guesses that may be rejected; candidates and beams share a prompt
    that each of them continues.
    """
    if not keeps_positions(cache):
        raise ValueError(
            f"this prefix keeps only the last keys of windowed layers, and {reader} needs all; "
            "read the prompts with prefill(..., rolling=False)"
        )


def read_window(q, k, v, held: Rolling, window: int, starts_B, counts_B, **options):
    """Attend from S new tokens of each row to its window and to each other.

    Args:
      q, k, v: (B, S, N or K, H) of the new tokens, at positions from ``starts_B`` on; rounded as
        the cache holds them.
      counts_B: how many of the S are tokens of the row; those behind are padding, which may not
        take the slots of keys that are still needed.
      options: those of `attention` besides the window.

    Returns: what `attention` returns, and the slots to write (B, S), past the last one for tokens
    that are not kept.
    """
    batch, length = q.shape[:2]
    # The window before the first new token, in the order of positions, and then the new tokens.
    before_BW = starts_B[:, None] - window + jnp.arange(window)[None, :]
    slots_BW = before_BW % window

    def ordered(x, scale=None):
        index = slots_BW[:, None, :]
        if scale is not None:
            x = x * scale[..., None]
        return jnp.take_along_axis(x, index[..., None], 2, mode="clip").swapaxes(1, 2)

    keys, values, *scales = held.arrays
    old_k = ordered(keys, *scales[:1]).astype(k.dtype)
    old_v = ordered(values, *scales[1:]).astype(v.dtype)
    # Positions below 0 do not exist.
    exists_BW = (before_BW >= 0).astype(jnp.int32)
    new_BS = jnp.ones((batch, length), jnp.int32)
    out = attention(
        q,
        jnp.concatenate([old_k, k], 1),
        jnp.concatenate([old_v, v], 1),
        q_offset=window,
        window=window,
        segment_ids=(new_BS, jnp.concatenate([exists_BW, new_BS], 1)),
        **options,
    )
    index_1S = jnp.arange(length)[None, :]
    # A chunk longer than the window would write a slot twice: only its last tokens are kept.
    kept_BS = (index_1S < counts_B[:, None]) & (index_1S >= counts_B[:, None] - window)
    at_BS = jnp.where(kept_BS, (starts_B[:, None] + index_1S) % window, keys.shape[2])
    return out, at_BS
