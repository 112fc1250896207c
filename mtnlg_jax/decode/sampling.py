"""Rows that are written one token at a time, greedily or by sampling: the compiled part of
generative decoding."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtnlg_jax.decode.batched_settings import ends_of, stopped
from mtnlg_jax.decode.cache import Prefix, step, to_int8
from mtnlg_jax.decode.processors import choose, process
from mtnlg_jax.decode.results import CHUNK


class State(NamedTuple):
    """What changes from step to step; donated, so that the cache stays in its place."""

    cache: tuple[tuple[jax.Array, ...], ...]
    tokens_BS: jax.Array  # prompt and continuation
    logprobs_BS: jax.Array
    lengths_B: jax.Array  # known tokens; the last one is not in the cache yet
    done_B: jax.Array


class Limits(NamedTuple):
    """What stays for each row besides its ``Rows``."""

    prompts_B: jax.Array  # length of the prompt
    longest_B: jax.Array  # of prompt and continuation
    keys_B: jax.Array


def append(
    logits_BV,
    state: State,
    limits: Limits,
    rows,
    allowed_V,
    families,
    eos,
    choose: Callable = choose,
) -> State:
    """Chooses one more token for every row that is not done; ``choose`` does it from processed
    logits."""
    processed = process(
        logits_BV,
        rows,
        families,
        state.tokens_BS,
        state.lengths_B,
        limits.prompts_B,
        limits.longest_B,
        allowed_V,
        eos,
    )
    tokens_B = choose(processed, rows, families, limits.keys_B, state.lengths_B - limits.prompts_B)
    ends_BE = ends_of(rows, families, eos)
    # A row to which everything is forbidden, as by n-grams of size 1 in a small vocabulary, has
    # said it all.
    tokens_B = jnp.where(processed.max(-1) == -jnp.inf, ends_BE[:, 0], tokens_B).astype(jnp.int32)
    picked_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], 1)[:, 0]
    logprobs_B = picked_B - jax.nn.logsumexp(logits_BV, -1)
    at = (
        jnp.arange(tokens_B.shape[0]),
        jnp.where(state.done_B, state.tokens_BS.shape[1], state.lengths_B),
    )
    lengths_B = state.lengths_B + ~state.done_B
    tokens_BS = state.tokens_BS.at[at].set(tokens_B, mode="drop")
    done_B = (tokens_B[:, None] == ends_BE).any(-1) | stopped(
        rows, families, tokens_BS, lengths_B, limits.prompts_B
    )
    return State(
        state.cache,
        tokens_BS,
        state.logprobs_BS.at[at].set(logprobs_B, mode="drop"),
        lengths_B,
        state.done_B | done_B | (lengths_B >= limits.longest_B),
    )


@functools.partial(jax.jit, static_argnames=("families", "eos", "int8_cache"))
def begin(
    prefix: Prefix, owners_B, news_B, seeds_B, rows, allowed_V, *, families, eos, int8_cache=False
):
    """Rows for the sequences to write, each from its prompt's part of ``prefix``, and their first
    tokens."""
    if int8_cache:
        prefix = prefix._replace(cache=to_int8(prefix.cache))
    tokens_BS, prompts_B, logits_BV, cache = jax.tree.map(lambda x: x[owners_B], prefix)
    longest_B = jnp.minimum(prompts_B + news_B, tokens_BS.shape[1])
    limits = Limits(prompts_B, longest_B, jax.vmap(jax.random.key)(seeds_B))
    state = State(cache, tokens_BS, jnp.zeros(tokens_BS.shape), prompts_B, prompts_B >= longest_B)
    return append(logits_BV, state, limits, rows, allowed_V, families, eos), limits


@functools.partial(jax.jit, static_argnames=("config", "families", "eos"), donate_argnames="state")
def advance(
    params, state: State, limits: Limits, rows, allowed_V, chunks, *, config, families, eos
):
    """At most ``chunks`` times CHUNK more tokens; fewer when all rows are done."""

    def one_token(state, _):
        last_B = state.lengths_B - 1
        tokens_B = jnp.take_along_axis(state.tokens_BS, last_B[:, None], 1)[:, 0]
        logits_BV, cache = step(config, params, state.cache, tokens_B, last_B)
        return append(
            logits_BV, state._replace(cache=cache), limits, rows, allowed_V, families, eos
        ), None

    def more(carry):
        return (carry[0] < chunks) & ~carry[1].done_B.all()

    def one_chunk(carry):
        return carry[0] + 1, lax.scan(one_token, carry[1], length=CHUNK)[0]

    return lax.while_loop(more, one_chunk, (jnp.int32(0), state))[1]
