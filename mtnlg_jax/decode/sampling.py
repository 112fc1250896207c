"""Write rows one token at a time, greedily or by sampling: the compiled part of decoding."""

# Shapes: B rows, S positions, V vocabulary, E end tokens of a row

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode import mirostat
from mtnlg_jax.decode.batched_settings import Settings, ends_of, stopped
from mtnlg_jax.decode.cache import Prefix, attend_newest, split_cache, step, to_int8
from mtnlg_jax.decode.forward import flying, write_in_flight
from mtnlg_jax.decode.processors import choose, process
from mtnlg_jax.decode.results import CHUNK
from mtnlg_jax.decode.rolling import roll
from mtnlg_jax.parallel.auto import split


class State(NamedTuple):
    """The state of the rows, which changes in every step; donated to update the cache in place."""

    cache: tuple[Any, ...]  # for each layer its arrays, or Rolling
    tokens_BS: jax.Array  # prompt and continuation
    logprobs_BS: jax.Array
    lengths_B: jax.Array  # known tokens; the last one is not in the cache yet
    done_B: jax.Array
    mu_B: jax.Array  # the limits of mirostat


class Limits(NamedTuple):
    """The constants of each row besides its settings."""

    prompts_B: jax.Array  # length of the prompt
    longest_B: jax.Array  # length of prompt and continuation at most
    keys_B: jax.Array


def split_state(state: State, place: Callable = split) -> State:
    """Return ``state`` split over the mesh in context.

    ``place``: `split`, or `placed` for ShapeDtypeStructs.
    """
    return State(
        split_cache(state.cache, place),
        place(state.tokens_BS, "BS"),
        place(state.logprobs_BS, "BS"),
        place(state.lengths_B, "B"),
        place(state.done_B, "B"),
        place(state.mu_B, "B"),
    )


def append(
    logits_BV, state: State, limits: Limits, settings: Settings, choose: Callable = choose
) -> State:
    """Append one token to every row that is not done.

    ``choose`` picks it from the processed logits; see ``processors.choose``.
    """
    # Penalties and constraints act before the choice; the log-probability below is of the raw
    # logits, and so the model's own.
    processed_BV = process(
        logits_BV,
        settings,
        state.tokens_BS,
        state.lengths_B,
        limits.prompts_B,
        limits.longest_B,
    )
    cut_BV = mirostat.cut(processed_BV, settings, state.mu_B)
    tokens_B = choose(cut_BV, settings, limits.keys_B, state.lengths_B - limits.prompts_B)
    mu_B = mirostat.steer(state.mu_B, tokens_B, processed_BV, settings)
    return put(logits_BV, processed_BV, tokens_B, state._replace(mu_B=mu_B), limits, settings)


def put(
    logits_BV, processed_BV, tokens_B, state: State, limits: Limits, settings: Settings
) -> State:
    """Append the chosen ``tokens_B`` to every row that is not done."""
    ends_BE = ends_of(settings)
    # Where every token is forbidden, as by n-grams of size 1 in a small vocabulary, end the row.
    nothing_B = processed_BV.max(-1) == -jnp.inf
    tokens_B = jnp.where(nothing_B, ends_BE[:, 0], tokens_B).astype(jnp.int32)
    picked_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], 1)[:, 0]
    logprobs_B = picked_B - jax.nn.logsumexp(logits_BV, -1)
    # Rows that are done write past the end, which mode="drop" discards.
    position_B = jnp.where(state.done_B, state.tokens_BS.shape[1], state.lengths_B)
    at = jnp.arange(tokens_B.shape[0]), position_B
    lengths_B = state.lengths_B + ~state.done_B
    tokens_BS = state.tokens_BS.at[at].set(tokens_B, mode="drop")
    # Padding of the ends is below 0 and equals no token.
    ended_B = (tokens_B[:, None] == ends_BE).any(-1)
    ended_B |= stopped(settings, tokens_BS, lengths_B, limits.prompts_B)
    return State(
        state.cache,
        tokens_BS,
        state.logprobs_BS.at[at].set(logprobs_B, mode="drop"),
        lengths_B,
        state.done_B | ended_B | (lengths_B >= limits.longest_B),
        state.mu_B,
    )


@functools.partial(jax.jit, static_argnames=("int8_cache", "rolling"))
def begin(
    prefix: Prefix,
    owners_B,
    max_new_tokens_B,
    seeds_B,
    settings: Settings,
    *,
    int8_cache: bool = False,
    rolling: ModelConfig | None = None,
) -> tuple[State, Limits]:
    """Start one row for each sequence to write, and choose its first token.

    Row i continues prompt ``owners_B[i]`` of ``prefix``. ``rolling``: the model, to keep only the
    windows of its windowed layers; None keeps the cache of ``prefix`` as it is.
    """
    if rolling is not None:
        size = prefix.tokens_BS.shape[1]
        layers = enumerate(prefix.cache)
        cache = tuple(roll(rolling, i, each, prefix.lengths_B, size) for i, each in layers)
        prefix = prefix._replace(cache=cache)
    # Prompts are read in floats; their keys and values are rounded once, here.
    if int8_cache:
        prefix = prefix._replace(cache=to_int8(prefix.cache))
    state, limits, logits_BV = copy_prompts(prefix, owners_B, max_new_tokens_B, seeds_B, settings)
    # The first token needs no step of the model: the prefill has its logits.
    return split_state(append(logits_BV, state, limits, settings)), limits


def copy_prompts(
    prefix: Prefix, owners_B, max_new_tokens_B, seeds_B, settings: Settings
) -> tuple[State, Limits, jax.Array]:
    """Return rows that have written nothing, and the logits of their first tokens (B, V).

    Row i continues prompt ``owners_B[i]`` of ``prefix``.
    """
    # Each row has a copy of its prompt's cache, because it writes behind it.
    tokens_BS, prompts_B, logits_BV, cache = jax.tree.map(lambda x: x[owners_B], prefix)
    longest_B = jnp.minimum(prompts_B + max_new_tokens_B, tokens_BS.shape[1])
    # A key for each row, so that its draws do not depend on the batch.
    limits = Limits(prompts_B, longest_B, jax.vmap(jax.random.key)(seeds_B))
    done_B = prompts_B >= longest_B
    state = State(
        cache,
        tokens_BS,
        jnp.zeros(tokens_BS.shape),
        prompts_B,
        done_B,
        mirostat.start(settings),
    )
    return state, limits, logits_BV


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def advance(
    params, state: State, limits: Limits, settings: Settings, chunks, *, config: ModelConfig
) -> State:
    """Write at most ``chunks`` times CHUNK more tokens; fewer when all rows are done."""

    def newest(state):
        # The newest token is not in the cache yet: reading it writes its keys and gives the next
        # logits.
        last_B = state.lengths_B - 1
        return jnp.take_along_axis(state.tokens_BS, last_B[:, None], 1)[:, 0], last_B

    def one_token(state, _):
        logits_BV, cache = step(config, params, state.cache, *newest(state))
        return append(logits_BV, state._replace(cache=cache), limits, settings), None

    # A constraint may know the rows by their numbers in the batch.
    whole = settings.static_options.constraint is not None
    count = 0 if whole else flying(config, params, state.cache, len(state.lengths_B))

    def in_flight(state):
        """Do the same as CHUNK times ``one_token``, with micro-batches in the pipeline."""

        def append_part(logits_BV, state, fixed):
            limits, rows = fixed
            return append(logits_BV, state, limits, dataclasses.replace(settings, rows=rows))

        cache, grown = write_in_flight(
            config,
            params,
            state.cache,
            state._replace(cache=()),
            (limits, settings.rows),
            attend=attend_newest,
            newest=newest,
            append=append_part,
            steps=CHUNK,
            count=count,
        )
        return grown._replace(cache=cache)

    # Looked at once a chunk: rows that are done inside of one compute without effect.
    def more(carry):
        number, state = carry
        return (number < chunks) & ~state.done_B.all()

    def one_chunk(carry):
        number, state = carry
        if count:
            return number + 1, in_flight(state)
        return number + 1, lax.scan(one_token, state, length=CHUNK)[0]

    return split_state(lax.while_loop(more, one_chunk, (jnp.int32(0), state))[1])
