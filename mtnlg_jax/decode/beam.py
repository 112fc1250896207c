"""Beam search: Hugging Face's semantics (transformers 5, ``_beam_search``), GNMT's length penalty,
and groups.

A prompt is read once for all its beams, and the tokens they write stay at their place in the cache
while the beams are reordered.

Diverse beams (Vijayakumar 2016): the groups choose one after another in each step, and a group's
scores lose diversity_penalty for every beam of an earlier group that wrote the token in this step.
The best beams of all groups are the result.
"""

# Shapes: G groups (1 without groups), P prompts, W beams of a group, C candidates for the next
# beams, V vocabulary

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
from mtnlg_jax.decode.results import Generated
from mtnlg_jax.parallel.auto import fetch

# As in transformers: below every real score, and finite, so that marked scores keep their order.
NEG = -1e9


class SearchParams(NamedTuple):
    """The constants of each prompt's search, (P,)."""

    prompts: Array  # length of the prompt
    max_new_tokens: Array
    length_penalty: Array
    gnmt: Array
    early: Array  # early_stopping is True
    never: Array  # early_stopping is "never"
    diversity: Array


class State(NamedTuple):
    """The state of the search, which changes in every step; donated."""

    cache: BeamCache  # of the new tokens
    running: Sequences
    sources: jax.Array  # (G, P, W): the beam of the previous step that a running beam continues
    ended: Sequences  # best first
    active: jax.Array  # (G, P): whether a better sequence may still come
    written: jax.Array  # new tokens so far


def search(
    decoder: Decoder,
    tokenizer,
    prefix: Prefix,
    configs: Sequence[DecodeConfig],
    settings: Settings,
) -> list[Generated]:
    """Return the num_return_sequences best beams of each prompt, best first.

    There are fewer where fewer sequences are possible. ``configs`` has one valid config for each
    prompt, all with the same num_beams and num_beam_groups; ``settings`` are of the same.
    """
    start = time.monotonic()
    max_new_tokens_P = max_new_tokens_of(decoder, prefix, configs)
    static = static_of(configs[0], max_new_tokens_P, decoder.context)
    search_params = SearchParams(
        fetch(prefix.lengths_B),
        max_new_tokens_P,
        np.array([config.length_penalty for config in configs], np.float32),
        np.array([config.length_penalty_type == "gnmt" for config in configs]),
        np.array([config.early_stopping is True for config in configs]),
        np.array([config.early_stopping == "never" for config in configs]),
        np.array([config.diversity_penalty for config in configs], np.float32),
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
        return fetch(_active_now(state, search_params)).any(0)

    state = begin(prefix, search_params, static=static)
    state = run_until_done(
        state, start, static.size, configs, active_prompts, more, mesh=decoder.mesh
    )
    return collect(tokenizer, configs, prefix, state.ended, state.ended.scores)


def penalty(lengths, search_params: SearchParams) -> jax.Array:
    """Return the divisor of a sum of log-probabilities for each prompt; broadcasts over (P,)."""
    lengths = jnp.asarray(lengths, jnp.float32)
    # Wu 2016, equation 14, or Hugging Face's length itself.
    base = jnp.where(search_params.gnmt, (5 + lengths) / 6, lengths)
    return base**search_params.length_penalty


def _active(state: State, search_params: SearchParams) -> jax.Array:
    """Return which searches go on, (G, P). The others no longer change."""
    # early_stopping=True ends a search once W sequences have ended.
    full_GP = (state.ended.why != EMPTY).all(-1)
    return state.active & ~(full_GP & search_params.early[None, :])


_active_now = jax.jit(_active)


@functools.partial(jax.jit, static_argnames="static")
def begin(prefix: Prefix, search_params: SearchParams, *, static: Static) -> State:
    """Start the search of every prompt."""
    running = blank(prefix, static, 0.0)
    ended = blank(prefix, static, NEG)
    # All beams of a prompt start alike, so only the first one may be continued.
    running = running._replace(scores=running.scores.at[:, :, 1:].set(NEG))
    # A prompt that fills the context is itself the result.
    no_room_P = search_params.max_new_tokens <= 0
    why = ended.why.at[0, :, 0].set(jnp.where(no_room_P, LENGTH, EMPTY).astype(jnp.int8))
    scores = ended.scores.at[0, :, 0].set(jnp.where(no_room_P, 0.0, NEG))
    # (G, P, W).
    shape = running.scores.shape
    state = State(
        empty_beams(prefix.cache, shape, static.size),
        running,
        jnp.zeros(shape, jnp.int32),
        ended._replace(why=why, scores=scores),
        jnp.broadcast_to(~no_room_P, shape[:2]),
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
    """Give every beam at most ``steps`` more tokens; fewer when no search goes on.

    Prompts that timed out end with the next token.
    """

    def grow(logits_GPWV, state):
        return _grow(logits_GPWV, state, search_params, settings, timed_out_P, static)

    def is_active(state):
        return _active(state, search_params)

    return advance_while(
        params, prefix, state, steps, grow, is_active, config=config, size=static.size
    )


def _grow(
    logits_GPWV,
    state: State,
    search_params: SearchParams,
    settings: Settings,
    timed_out_P,
    static: Static,
) -> State:
    """Give every beam one more token, and add the sequences that ended to the best."""
    # Log-probabilities before processing are reported; those after it decide.
    own_GPWV = jax.nn.log_softmax(logits_GPWV, -1)
    processed_GPWV = process_beams(
        own_GPWV,
        state.running,
        search_params.prompts,
        search_params.max_new_tokens,
        state.written,
        settings,
    )

    def one_group(earlier_PV, group):
        running, ended, active_P, own_PWV, logprobs_PWV = group
        weight = search_params.diversity[:, None] if static.groups > 1 else 0.0
        # The penalty acts on the choice and on the scores, as in Hugging Face.
        less_PV = weight * earlier_PV
        *grown, tokens_PW = _choose(
            running,
            ended,
            active_P,
            own_PWV,
            logprobs_PWV - less_PV[:, None],
            state.written,
            search_params,
            settings,
            timed_out_P,
        )
        return earlier_PV + jax.nn.one_hot(tokens_PW, earlier_PV.shape[1]).sum(1), tuple(grown)

    nothing_PV = jnp.zeros((own_GPWV.shape[1], own_GPWV.shape[-1]))
    # A scan over G, because a group must know what the earlier ones wrote.
    groups = state.running, state.ended, state.active, own_GPWV, processed_GPWV
    _, (running, ended, active, sources) = lax.scan(one_group, nothing_PV, groups)
    return State(state.cache, running, sources, ended, active, state.written + 1)


def _choose(
    running: Sequences,
    ended: Sequences,
    active_P,
    own_PWV,
    logprobs_PWV,
    written,
    search_params: SearchParams,
    settings: Settings,
    timed_out_P,
) -> tuple:
    """Take one group's step; arrays are (P, W).

    Returns: (running, ended, active, sources, tokens).
    """
    prompts, beams, vocabulary = own_PWV.shape
    # Enough candidates that W of them go on even if every end and stop is among them.
    rows = settings.rows
    count = min((1 + rows.ends.shape[1] + rows.stops.shape[1]) * beams, beams * vocabulary)
    totals_PWV = logprobs_PWV + running.scores[..., None]
    # All W x V continuations of a prompt compete with each other.
    scores_PC, at_PC = lax.top_k(totals_PWV.reshape(prompts, -1), count)
    beams_PC = at_PC // vocabulary
    tokens_PC = (at_PC % vocabulary).astype(jnp.int32)
    tokens, logprobs = extend(running, beams_PC, tokens_PC, own_PWV, search_params.prompts, written)
    ended_PC = ending(tokens, tokens_PC, search_params.prompts, written, settings)
    length = written + 1
    full_length_P1 = (length >= search_params.max_new_tokens)[:, None]
    timed_out_P1 = timed_out_P[:, None]
    hits_PC = ended_PC | full_length_P1 | timed_out_P1

    # An ended candidate is pushed below every real one, so it does not go on.
    next_scores, next_at = lax.top_k(scores_PC + ended_PC * NEG, beams)
    grown = Sequences(
        take(tokens, next_at), take(logprobs, next_at), next_scores, running.lengths, running.why
    )
    sources = take(beams_PC, next_at)
    chosen = take(tokens_PC, next_at)

    # An ended candidate counts only among the best W. Scores near NEG belong to placeholders, which
    # fill in where there are not W different beams, and never count.
    just_PC = hits_PC & (jnp.arange(count)[None, :] < beams) & (scores_PC > NEG / 2)
    full_P1 = (ended.why != EMPTY).all(-1, keepdims=True) & search_params.early[:, None]
    normal_PC = scores_PC / penalty(length, search_params)[:, None]
    # Candidates that do not count stay in the arrays, since shapes are static, but below all
    # others.
    normal_PC += (full_P1 | ~active_P[:, None] | ~just_PC) * NEG
    reason_PC = jnp.where(ended_PC, STOP, jnp.where(full_length_P1, LENGTH, TIMEOUT))
    why_PC = jnp.where(just_PC, reason_PC, EMPTY).astype(jnp.int8)
    new = Sequences(tokens, logprobs, normal_PC, jnp.full_like(beams_PC, length), why_PC)
    merged = jax.tree.map(lambda old, new: jnp.concatenate([old, new], 1), ended, new)
    # The old ones come first, so of equal scores they stay.
    _, best = lax.top_k(merged.scores, beams)
    ended = jax.tree.map(lambda x: take(x, best), merged)

    # The best score a running beam can reach: at its present length, or for "never" at the longest.
    at_longest_P = search_params.never & (search_params.length_penalty > 0)
    longest_P = jnp.where(at_longest_P, search_params.max_new_tokens, length)
    possible_P1 = next_scores[:, :1] / penalty(longest_P, search_params)[:, None]
    # While there are fewer than W ended sequences, anything is better than the empty entry.
    worst_PW = jnp.where(ended.why != EMPTY, ended.scores.min(1, keepdims=True), NEG)
    active_P &= (possible_P1 > worst_PW).any(-1)
    # False where only placeholders are left: every continuation has ended or is forbidden.
    active_P &= (next_scores > NEG / 2).any(-1)
    active_P &= ~(full_length_P1 | timed_out_P1)[:, 0]
    return grown, ended, active_P, sources, chosen
