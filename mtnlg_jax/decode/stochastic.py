"""Stochastic beams: W different sequences drawn without replacement from the model.

Kool 2019, algorithm 1. The log-probability of every sequence is perturbed by a Gumbel, and the W
largest perturbed values are kept. They are found top down: a beam's own value is the largest of its
continuations' values, which are drawn under that condition.
"""

# Shapes: G groups of beams, as in beam search, but always 1; P prompts, W beams, V vocabulary. So
# arrays of a state are (1, P, W).

import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.batched_settings import Array, Settings
from mtnlg_jax.decode.beam_cache import BeamCache, empty_beams
from mtnlg_jax.decode.beams import (
    EMPTY,
    LENGTH,
    STOP,
    TIMEOUT,
    Sequences,
    Static,
    advance_while,
    blank,
    collect,
    ending,
    extend,
    max_new_tokens_of,
    process_beams,
    run_until_done,
    split_search,
    static_of,
    take,
)
from mtnlg_jax.decode.cache import Decoder, Prefix
from mtnlg_jax.decode.processors import warp
from mtnlg_jax.decode.results import Generated
from mtnlg_jax.parallel.auto import fetch


class SearchParams(NamedTuple):
    """The constants of each prompt's search, (P,)."""

    prompts: Array  # length of the prompt
    max_new_tokens: Array
    seeds: Array


class State(NamedTuple):
    """The state of the search, which changes in every step; donated."""

    cache: BeamCache
    # scores: log-probabilities in the distribution drawn from; -inf: there is no such sequence
    running: Sequences  # the whole sequences as well
    perturbed: jax.Array  # the values by which sequences are kept and sorted
    sources: jax.Array
    written: jax.Array


def draw(
    decoder: Decoder,
    tokenizer,
    prefix: Prefix,
    configs: Sequence[DecodeConfig],
    settings: Settings,
) -> list[Generated]:
    """Return num_return_sequences of num_beams different sequences for each prompt.

    They come in the order in which they would be drawn one after another, without replacement, from
    the processed and warped distribution (at the given temperature). ``score`` is a sequence's
    log-probability in it. ``configs`` has one valid config for each prompt, all with the same
    num_beams; each prompt draws with its own seed.
    """
    start = time.monotonic()
    max_new_tokens_P = max_new_tokens_of(decoder, prefix, configs)
    static = static_of(configs[0], max_new_tokens_P, decoder.context)
    search_params = SearchParams(
        fetch(prefix.lengths_B),
        max_new_tokens_P,
        np.array([config.seed for config in configs], np.uint32),
    )

    def more(state, timed_out_P, steps):
        return advance(
            decoder.params,
            prefix,
            state,
            search_params,
            settings,
            timed_out_P,
            steps,
            config=decoder.config,
            static=static,
        )

    def active_prompts(state):
        return fetch(_active_now(state)).any(-1)

    state = begin(prefix, search_params, static=static)
    state = run_until_done(
        state, start, static.size, configs, active_prompts, more, mesh=decoder.mesh
    )
    # Beams without a sequence have no probability: there were fewer sequences than beams.
    beams = state.running
    beams = beams._replace(why=jnp.where(beams.scores > -jnp.inf, beams.why, EMPTY))
    return collect(tokenizer, configs, prefix, beams, state.perturbed)


def _active(state: State) -> jax.Array:
    """Return which beams are not whole sequences yet, (P, W)."""
    return ((state.running.why == EMPTY) & (state.running.scores > -jnp.inf))[0]


_active_now = jax.jit(_active)


@functools.partial(jax.jit, static_argnames="static")
def begin(prefix: Prefix, search_params: SearchParams, *, static: Static) -> State:
    """Start the search of every prompt."""
    beams = blank(prefix, static, -jnp.inf)
    shape = beams.scores.shape
    # The W beams start equal, so the first one represents all sequences. The largest of their
    # values may be any number, since it does not change their order.
    scores = beams.scores.at[:, :, 0].set(0.0)
    # A prompt that fills the context is itself the only sequence.
    no_room_P = search_params.max_new_tokens <= 0
    why = beams.why.at[0, :, 0].set(jnp.where(no_room_P, LENGTH, EMPTY).astype(jnp.int8))
    state = State(
        empty_beams(prefix.cache, shape, static.size),
        beams._replace(scores=scores, why=why),
        scores,
        jnp.zeros(shape, jnp.int32),
        jnp.int32(0),
    )
    return split_search(state)


@functools.partial(jax.jit, static_argnames=("config", "static"), donate_argnames="state")
def advance(
    params,
    prefix: Prefix,
    state: State,
    search_params: SearchParams,
    settings: Settings,
    timed_out_P,
    steps,
    *,
    config,
    static: Static,
) -> State:
    """Give every beam at most ``steps`` more tokens; fewer when all are whole sequences.

    Prompts that timed out end with the next token.
    """

    def grow(logits_GPWV, state):
        return _grow(logits_GPWV, state, search_params, settings, timed_out_P)

    return advance_while(
        params, prefix, state, steps, grow, _active, config=config, size=static.size
    )


def _grow(
    logits_GPWV, state: State, search_params: SearchParams, settings: Settings, timed_out_P
) -> State:
    """Keep the W continuations with the largest perturbed log-probabilities, among them the
    sequences that are whole already."""
    prompts_P, max_new_tokens_P, seeds_P = search_params
    processed_GPWV = process_beams(
        logits_GPWV, state.running, prompts_P, max_new_tokens_P, state.written, settings
    )
    _, prompts, beams, vocabulary = processed_GPWV.shape
    repeated = settings.map_rows(lambda x: jnp.repeat(x, beams, 0))
    warped_PWV = warp(processed_GPWV.reshape(-1, vocabulary), repeated).reshape(
        prompts, beams, vocabulary
    )
    # Reported with the tokens; the draw uses the processed and warped distribution.
    own_PWV = jax.nn.log_softmax(logits_GPWV, -1)[0]
    kept = jax.tree.map(lambda x: x[0], state.running)
    whole_PW = kept.why != EMPTY

    # Log-probability of each continuation as a whole sequence, in the distribution drawn from.
    totals_PWV = kept.scores[..., None] + jax.nn.log_softmax(warped_PWV, -1)
    # A key for each prompt and token, so that a prompt's draws do not depend on its batch.
    keys_P = jax.vmap(jax.random.fold_in, (0, None))(
        jax.vmap(jax.random.key)(seeds_P), state.written
    )
    noise_PWV = jax.vmap(lambda key: jax.random.gumbel(key, (beams, vocabulary)))(keys_P)
    # A Gumbel for each continuation, then shifted so that the largest one has exactly its beam's
    # value: this makes the draws equal to perturbing all whole sequences at once.
    values_PWV = _given_largest(totals_PWV + noise_PWV, state.perturbed[0])
    # A finished sequence has one continuation: itself.
    stays_PWV = whole_PW[:, :, None] & (jnp.arange(vocabulary) == 0)[None, None, :]
    # It keeps its value, in the entry of token 0. Its other entries cannot win.
    values_PWV = jnp.where(whole_PW[..., None], -jnp.inf, values_PWV)
    values_PWV = jnp.where(stays_PWV, state.perturbed[0, ..., None], values_PWV)
    totals_PWV = jnp.where(stays_PWV, kept.scores[..., None], totals_PWV)

    # The largest W of all beams together: draws without replacement.
    perturbed, at_PW = lax.top_k(values_PWV.reshape(prompts, -1), beams)
    sources = at_PW // vocabulary
    tokens_PW = (at_PW % vocabulary).astype(jnp.int32)
    stays_PW = take(whole_PW, sources)
    # A finished sequence is extended as well, but behind its length, where nothing is read.
    tokens, logprobs = extend(kept, sources, tokens_PW, own_PWV, prompts_P, state.written)
    ended_PW = ending(tokens, tokens_PW, prompts_P, state.written, settings)
    full_length_P1 = (state.written + 1 >= max_new_tokens_P)[:, None]
    timed_out_P1 = timed_out_P[:, None]
    # An end decides before a limit that is reached with the same token.
    limit_P1 = jnp.where(full_length_P1, LENGTH, jnp.where(timed_out_P1, TIMEOUT, EMPTY))
    why = jnp.where(ended_PW, STOP, limit_P1)
    grown = Sequences(
        tokens,
        logprobs,
        take(totals_PWV.reshape(prompts, -1), at_PW),
        jnp.where(stays_PW, take(kept.lengths, sources), state.written + 1),
        jnp.where(stays_PW, take(kept.why, sources), why.astype(jnp.int8)),
    )
    # Beams with probability 0 are not sequences, whatever their perturbed value.
    perturbed = jnp.where(grown.scores > -jnp.inf, perturbed, -jnp.inf)
    return State(
        state.cache,
        jax.tree.map(lambda x: x[None], grown),
        perturbed[None],
        sources[None],
        state.written + 1,
    )


def _given_largest(values_PWV, largest_PW) -> jax.Array:
    """Condition freely drawn perturbed values on ``largest_PW`` as the largest of each beam.

    Kool 2019, appendix B.3, in its stable form.
    """
    largest_PW1 = largest_PW[..., None]
    top_PW1 = values_PWV.max(-1, keepdims=True)
    # exp(-|v|) does not overflow, whatever the sign of v.
    v_PWV = largest_PW1 - values_PWV + jnp.log1p(-jnp.exp(values_PWV - top_PW1))
    given_PWV = largest_PW1 - jnp.maximum(v_PWV, 0) - jnp.log1p(jnp.exp(-jnp.abs(v_PWV)))
    return jnp.where(values_PWV > -jnp.inf, given_PWV, -jnp.inf)
