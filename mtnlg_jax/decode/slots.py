"""The compiled programs of a running batch: a cache of slots, and what changes it.

Each slot holds the keys and values of one row. All else that a step needs, tokens, lengths and
settings, is small and comes from the host with every turn, so that rows join and leave without a
program of their own.
"""

# Shapes: B rows of a turn (the first slots), S positions, V vocabulary, W words of 32 ids,
# U steps of a turn at most, A alternatives, C tokens of a chunk, I ids of a word

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.batched_settings import Settings
from mtnlg_jax.decode.cache import Decoder, prefill_rows, read, step, to_int8
from mtnlg_jax.decode.sampling import Limits, State, append

STEPS = 32  # of a turn at most
ALTERNATIVES = 20


class Rows(NamedTuple):
    """The rows of a turn, from the host."""

    tokens_BS: np.ndarray
    lengths_B: np.ndarray
    active_B: np.ndarray  # others change nothing
    prompts_B: np.ndarray
    longest_B: np.ndarray
    seeds_B: np.ndarray


class Extras(NamedTuple):
    """What the widest tier of settings takes beside `Settings`."""

    allowed_BW: np.ndarray  # uint32: which ids each row's constraint allows, a bit each
    alternatives_B: np.ndarray  # how many alternatives each row tells


class Written(NamedTuple):
    """The tokens of a turn. Row b wrote the first ``lengths_B[b] - (its length before)`` of U."""

    tokens_UB: jax.Array
    logprobs_UB: jax.Array
    lengths_B: jax.Array
    done_B: jax.Array
    top_tokens_UBA: jax.Array | None
    top_logprobs_UBA: jax.Array | None


def empty_cache(decoder: Decoder, slots: int, size: int, limit: int) -> tuple[Any, ...]:
    """Return a cache of ``slots`` rows with room for ``size`` tokens of at most ``limit``.

    Layers keep only their windows where ``limit`` is longer.
    """

    def begin(params):
        one_11 = jnp.zeros((1, 1), jnp.int32)
        one_1 = jnp.ones(1, jnp.int32)
        cache = prefill_rows(
            params, one_11, one_1, config=decoder.config, size=limit, rolling=True
        ).cache
        return to_int8(cache) if decoder.int8_cache else cache

    # Shapes alone: nothing is computed.
    like = jax.eval_shape(begin, decoder.params)
    return jax.tree.map(
        lambda x: jnp.zeros((slots, x.shape[1], min(x.shape[2], size), *x.shape[3:]), x.dtype), like
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def advance(
    params, cache, rows: Rows, settings: Settings, extras, count, *, config: ModelConfig
) -> tuple[tuple[Any, ...], Written]:
    """Write ``count`` tokens of the first B slots, or fewer: it ends with the first row that ends.

    ``extras``: `Extras`, or None where no row has a constraint or tells alternatives.
    """
    batch = rows.lengths_B.shape[0]
    vocabulary = settings.allowed_V.shape[0]
    if extras is not None:
        settings = _constrained(settings, extras.allowed_BW, vocabulary)
    keys_B = jax.vmap(jax.random.key)(rows.seeds_B)
    limits = Limits(jnp.asarray(rows.prompts_B), jnp.asarray(rows.longest_B), keys_B)
    # Sliced once a turn, not in every step; where B is all slots this copies nothing.
    state = State(
        jax.tree.map(lambda x: x[:batch], cache),
        jnp.asarray(rows.tokens_BS),
        jnp.zeros(rows.tokens_BS.shape),
        jnp.asarray(rows.lengths_B),
        ~jnp.asarray(rows.active_B),
    )
    idle_B = state.done_B
    tops = None if extras is None else _no_tops(batch)
    written_UB = jnp.zeros((STEPS, batch), jnp.int32)

    def more(carry):
        number, state, *_ = carry
        return (number < count) & ~(state.done_B & ~idle_B).any()

    def one(carry):
        number, state, tokens_UB, logprobs_UB, tops = carry
        last_B = state.lengths_B - 1
        tokens_B = jnp.take_along_axis(state.tokens_BS, last_B[:, None], 1)[:, 0]
        # A row that does not write may hold the keys of a prompt that is read in its slot.
        logits_BV, kept = step(config, params, state.cache, tokens_B, last_B, ~state.done_B)
        state = append(logits_BV, state._replace(cache=kept), limits, settings)
        at_B1 = state.lengths_B[:, None] - 1
        token_B = jnp.take_along_axis(state.tokens_BS, at_B1, 1)[:, 0]
        logprob_B = jnp.take_along_axis(state.logprobs_BS, at_B1, 1)[:, 0]
        if tops is not None:
            tops = _told(logits_BV, extras.alternatives_B, tops, number)
        return (
            number + 1,
            state,
            tokens_UB.at[number].set(token_B),
            logprobs_UB.at[number].set(logprob_B),
            tops,
        )

    start = jnp.int32(0), state, written_UB, jnp.zeros((STEPS, batch)), tops
    _, state, tokens_UB, logprobs_UB, tops = lax.while_loop(more, one, start)
    cache = jax.tree.map(
        lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, 0, 0), cache, state.cache
    )
    told = tops or (None, None)
    return cache, Written(tokens_UB, logprobs_UB, state.lengths_B, state.done_B, *told)


def _constrained(settings: Settings, allowed_BW, vocabulary: int) -> Settings:
    """Return ``settings`` with the constraint that the bits ``allowed_BW`` spell."""
    bits_BWI = (allowed_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & 1
    allowed_BV = bits_BWI.reshape(allowed_BW.shape[0], -1)[:, :vocabulary] > 0
    options = settings.static_options._replace(constraint=lambda *_: allowed_BV)
    return dataclasses.replace(settings, static_options=options)


def _no_tops(batch: int) -> tuple[jax.Array, jax.Array]:
    shape = (STEPS, batch, ALTERNATIVES)
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape)


def _told(logits_BV, alternatives_B, tops, number) -> tuple[jax.Array, jax.Array]:
    """Return ``tops`` with the best ids of step ``number`` and their log-probabilities."""
    # As `append` computes it, so that the number of the chosen token is the same bit for bit.
    total_B1 = jax.nn.logsumexp(logits_BV, -1)[:, None]

    def find(logits_BV):
        best_BA, ids_BA = lax.top_k(logits_BV, min(ALTERNATIVES, logits_BV.shape[1]))
        more = ((0, 0), (0, ALTERNATIVES - ids_BA.shape[1]))
        return jnp.pad(ids_BA, more), jnp.pad(best_BA, more)

    def none(logits_BV):
        return tuple(x[0] for x in _no_tops(logits_BV.shape[0]))

    ids_BA, best_BA = lax.cond((alternatives_B > 0).any(), find, none, logits_BV)
    tokens_UBA, logprobs_UBA = tops
    return tokens_UBA.at[number].set(ids_BA), logprobs_UBA.at[number].set(best_BA - total_B1)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def fill(params, cache, tokens_C, slot, start, count, *, config: ModelConfig) -> tuple[Any, ...]:
    """Read ``count`` of ``tokens_C`` into ``slot``, from position ``start`` on.

    The head is not computed: the first step reads the prompt's last token and so gives the first
    new one, with the row's own settings.
    """
    row = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, slot, 1, 0), cache)
    _, row = read(config, params, row, tokens_C[None], start[None], count[None])
    return jax.tree.map(
        lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, slot, 0), cache, row
    )


@functools.partial(jax.jit, donate_argnames="cache")
def swap(cache, one, other) -> tuple[Any, ...]:
    """Exchange two slots."""

    def exchange(x):
        first = lax.dynamic_slice_in_dim(x, one, 1, 0)
        second = lax.dynamic_slice_in_dim(x, other, 1, 0)
        x = lax.dynamic_update_slice_in_dim(x, second, one, 0)
        return lax.dynamic_update_slice_in_dim(x, first, other, 0)

    return jax.tree.map(exchange, cache)


@functools.partial(jax.jit, donate_argnames="cache")
def copy(cache, source, target) -> tuple[Any, ...]:
    """Copy the slot ``source`` over ``target``."""

    def over(x):
        row = lax.dynamic_slice_in_dim(x, source, 1, 0)
        return lax.dynamic_update_slice_in_dim(x, row, target, 0)

    return jax.tree.map(over, cache)


@functools.partial(jax.jit, static_argnames="lengths")
def resize(cache, *, lengths: tuple[int, ...]) -> tuple[Any, ...]:
    """Return the cache with each layer's arrays cut or padded to ``lengths`` positions."""

    def to(x, length):
        if length <= x.shape[2]:
            return x[:, :, :length]
        more = [(0, 0)] * x.ndim
        more[2] = (0, length - x.shape[2])
        return jnp.pad(x, more)

    pairs = zip(cache, lengths, strict=True)
    return tuple(jax.tree.map(lambda x, n=length: to(x, n), layer) for layer, length in pairs)


# Any: the size of a jitted function's cache is not in its type.
PROGRAMS: tuple[Any, ...] = (advance, fill, swap, copy, resize)


def programs() -> int:
    """Return the number of compiled programs that batches of this process hold."""
    return sum(program._cache_size() for program in PROGRAMS)
