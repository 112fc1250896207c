"""Drop the oldest tokens of rows whose cache is full, so that they can be written without end.

A row has a position for each token that its cache holds, 0 to W - 1, whatever the length of its
text (Xiao 2023, arXiv 2309.17453, section 3.2). When all W are taken, the row keeps the first
tokens of the text (the attention sinks) and the last ones; the tokens between them are dropped, and
the last ones move down to the positions behind the sinks. That happens once in many tokens, so a
token costs the same wherever it stands.

- *Shift* moves cached keys and values. Rotated keys turn back by the distance that they move:
  rotations add up, so they become what they would be at the new position. ALiBi and layers without
  positions need no more than the move.
- *Recompute* reads the kept tokens again, as a text of their own. Learned positions need that: they
  enter before the first layer, and every cached key and value depends on them.

Keys and values of deeper layers depend on the tokens that their layer saw then. So after a shift
they still know of dropped tokens, and after a recomputation they do not: the two differ from the
second layer on.
"""

# Shapes: B rows, R rows whose cache is full, S positions of the whole text, W positions of the
# cache, K key/value heads, H head width, V vocabulary

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.adapters import of_rows
from mtnlg_jax.decode.batched_settings import Settings
from mtnlg_jax.decode.cache import Decoder, prefill, split_cache, step, to_int8
from mtnlg_jax.decode.results import CHUNK
from mtnlg_jax.decode.rolling import Rolling
from mtnlg_jax.decode.sampling import Limits, State, append, split_state
from mtnlg_jax.model.positions import layer_frequencies, rotate
from mtnlg_jax.model.quantize import quantize
from mtnlg_jax.parallel.auto import fetch, padded

# Lengths are int32.
MOST_TOKENS = 2**31 - 1
# The text is held whole, in an array that doubles from this length on.
LEAST_TEXT = 1 << 14


class Room(NamedTuple):
    """What a row keeps when its cache is full."""

    size: int  # W
    sinks: int  # first tokens of the text
    keep: int  # last tokens
    shift: bool  # move cached keys and values; False: read the kept tokens again

    @property
    def dropped(self) -> int:
        """Tokens that go at a time."""
        return self.size - self.sinks - self.keep

    def read(self, prompt: Sequence[int]) -> list[int]:
        """Return the tokens of ``prompt`` that fit: all, or the first and the last ones."""
        if len(prompt) <= self.size:
            return list(prompt)
        return [*prompt[: self.sinks], *prompt[len(prompt) - self.size + self.sinks :]]

    def rolls(self, config: ModelConfig) -> bool:
        """Return whether windowed layers may keep only their window.

        The sinks move closer to the last tokens. Where a window then reaches them, their keys must
        still be there.
        """
        windows = [config.layer(number).window for number in range(config.num_layers)]
        return all(self.keep >= window - 1 for window in windows if window and window < self.size)


class Slider:
    """Makes room in the caches of a batch; ``advance`` takes the place of ``sampling.advance``.

    Arguments:
      room: what a full row keeps.
      prompts: lengths of the prompts; of one that is longer than the cache, `Room.read` is in it.
    """

    def __init__(self, decoder: Decoder, room: Room, prompts: Sequence[int]):
        self._decoder = decoder
        self._room = room
        self._prompts_P = np.array(prompts, np.int32)

    def start(self, owners: Sequence[int], max_new_tokens: Sequence[int]) -> None:
        """Begin with rows that continue the prompts ``owners``."""
        self._owners_B = np.array(owners)
        prompts_B = self._prompts_P[self._owners_B]
        self._dropped_B = np.maximum(prompts_B - self._room.size, 0)
        self._longest_B = np.minimum(
            prompts_B.astype(np.int64) + max_new_tokens, MOST_TOKENS
        ).astype(np.int32)

    def advance(
        self, params, state: State, limits: Limits, settings: Settings, chunks, *, config
    ) -> State:
        """Write at most ``chunks`` times CHUNK more tokens; fewer when all rows are done."""
        limits = limits._replace(longest_B=self._longest_B)
        left = int(chunks) * CHUNK
        while left > 0:
            lengths_B = fetch(state.lengths_B)
            open_B = ~fetch(state.done_B)
            if not open_B.any():
                break
            state = self._make_room(state, lengths_B, open_B)
            text = state.tokens_BS.shape[1]
            if lengths_B[open_B].max() >= text:
                state = _grow(state)
                text *= 2
            # Until a row fills its cache or the array of the text.
            held_B = lengths_B - self._dropped_B
            steps = min(
                left, self._room.size + 1 - held_B[open_B].max(), text - lengths_B[open_B].max()
            )
            state = _write(
                params,
                state,
                limits,
                settings,
                self._dropped_B,
                np.int32(steps),
                config=config,
                size=self._room.size,
            )
            left -= steps
        return state

    def _make_room(self, state: State, lengths_B: np.ndarray, open_B: np.ndarray) -> State:
        """Drop tokens of the rows whose newest token finds no position."""
        room = self._room
        full_B = open_B & (lengths_B - self._dropped_B > room.size)
        full_R = np.flatnonzero(full_B)
        if not len(full_R):
            return state
        # A new array: a program may still read the old one.
        self._dropped_B = self._dropped_B + np.int32(room.dropped) * full_B
        # A power of two of rows, so that few programs are compiled. Those behind are no row.
        number = padded(1 << (len(full_R) - 1).bit_length(), self._decoder.mesh)
        rows_R = np.full(number, len(lengths_B), np.int32)
        rows_R[: len(full_R)] = full_R
        config = self._decoder.config
        if room.shift:
            return state._replace(cache=_shift(state.cache, rows_R, config=config, room=room))
        tokens_BS = fetch(state.tokens_BS)
        kept = [
            # The newest token is not read yet.
            [*tokens_BS[row, : room.sinks], *tokens_BS[row, end - room.keep : end]]
            for row, end in zip(full_R, lengths_B[full_R] - 1, strict=True)
        ]
        kept += kept[:1] * (number - len(full_R))
        rolling = room.rolls(config)
        decoder = of_rows(self._decoder, self._owners_B[full_R], number)
        read = prefill(decoder, kept, room.size, rolling=rolling).cache
        int8 = self._decoder.int8_cache
        return state._replace(cache=_replace_rows(state.cache, read, rows_R, int8=int8))


@functools.partial(jax.jit, static_argnames=("config", "size"), donate_argnames="state")
def _write(
    params,
    state: State,
    limits: Limits,
    settings: Settings,
    dropped_B,
    steps,
    *,
    config: ModelConfig,
    size: int,
) -> State:
    """Write at most ``steps`` tokens, which fit the cache of every row that is not done."""

    def more(carry):
        number, state = carry
        return (number < steps) & ~state.done_B.all()

    def one_token(carry):
        number, state = carry
        last_B = state.lengths_B - 1
        tokens_B = jnp.take_along_axis(state.tokens_BS, last_B[:, None], 1)[:, 0]
        # Rows that are done stay where they are, which may be behind the cache.
        at_B = jnp.minimum(last_B - dropped_B, size - 1)
        logits_BV, cache = step(config, params, state.cache, tokens_B, at_B)
        return number + 1, append(logits_BV, state._replace(cache=cache), limits, settings)

    return split_state(lax.while_loop(more, one_token, (jnp.int32(0), state))[1])


@functools.partial(jax.jit, static_argnames=("config", "room"), donate_argnames="cache")
def _shift(cache, rows_R, *, config: ModelConfig, room: Room):
    """Move the last tokens of the rows ``rows_R`` to the positions behind their sinks.

    All W positions of these rows are taken. Numbers that are no row are skipped.
    """
    layers = []
    for number, held in enumerate(cache):
        frequencies = layer_frequencies(config, config.layer(number))
        source: slice | np.ndarray
        if isinstance(held, Rolling):
            window = config.layer(number).window
            assert window is not None, "only a window makes a layer hold fewer positions"
            # Position p is in slot p mod the window, before and after.
            source = (np.arange(window) + room.dropped) % window
            target = slice(0, window)
        else:
            source = slice(room.size - room.keep, room.size)
            target = slice(room.sinks, room.sinks + room.keep)
        arrays = held.arrays if isinstance(held, Rolling) else held
        k, v, *scales = (x[rows_R][:, :, source] for x in arrays)
        if frequencies is not None:
            k, *scales = _turned(k, scales, -room.dropped, frequencies[0])
        moved = (k, v, *scales)
        arrays = tuple(
            x.at[rows_R, :, target].set(y, mode="drop") for x, y in zip(arrays, moved, strict=True)
        )
        layers.append(Rolling(arrays) if isinstance(held, Rolling) else arrays)
    return split_cache(tuple(layers))


def _turned(k_RKWH, scales, by: int, frequency: np.ndarray):
    """Return keys that are ``by`` positions further on, and the scales of k and v in int8."""

    def turn(x_RKWH):
        # The factor of cosines and sines is in the keys already.
        return rotate(x_RKWH, jnp.full(x_RKWH.shape[:2], by), (frequency, 1.0))

    if not scales:
        return (turn(k_RKWH),)
    k_scale, v_scale = scales
    k_RKWH, k_scale = quantize(turn(k_RKWH * k_scale[..., None]), -1)
    return k_RKWH, k_scale, v_scale


@functools.partial(jax.jit, static_argnames="int8", donate_argnames="cache")
def _replace_rows(cache, read, rows_R, *, int8: bool):
    """Return ``cache`` with ``read`` as its rows ``rows_R``; other numbers are skipped."""
    read = to_int8(read) if int8 else read
    return split_cache(jax.tree.map(lambda x, new: x.at[rows_R].set(new, mode="drop"), cache, read))


@jax.jit
def _grow(state: State) -> State:
    """Return ``state`` with room for a text of twice the length."""
    longer = ((0, 0), (0, state.tokens_BS.shape[1]))
    return split_state(
        state._replace(
            tokens_BS=jnp.pad(state.tokens_BS, longer),
            logprobs_BS=jnp.pad(state.logprobs_BS, longer),
        )
    )
