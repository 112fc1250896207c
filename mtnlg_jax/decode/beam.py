"""Beam search: Hugging Face's semantics (transformers 5, ``_beam_search``), GNMT's length penalty,
and groups.

A prompt is read once for all its beams, and what they wrote stays in its place in the cache while
they are reordered. Arrays lead with (G, P, K): groups, prompts, beams of a group. Without groups G
is 1.

Diverse beams (Vijayakumar 2016): in each step group after group chooses, and a group's scores lose
diversity_penalty for every beam of an earlier group that wrote the token in this step. Their best
of all groups are the result.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.batched_settings import rows_and_families
from mtnlg_jax.decode.beam_cache import BeamCache, empty_beams, next_logits
from mtnlg_jax.decode.beams import (
    EMPTY,
    LENGTH,
    STOP,
    TIMEOUT,
    Sequences,
    Static,
    blank,
    collect,
    ending,
    extend,
    process_beams,
    take,
)
from mtnlg_jax.decode.cache import Decoder, Prefix, bucket
from mtnlg_jax.decode.results import CHUNK, Generated, writable

# As in transformers: below every score that counts, and finite, so that what is marked with it
# keeps its order.
NEG = -1e9


class Search(NamedTuple):
    """What stays for each prompt, (P,)."""

    prompts: jax.Array  # length of the prompt
    news: jax.Array  # new tokens at most
    length_penalty: jax.Array
    gnmt: jax.Array
    early: jax.Array  # early_stopping is True
    never: jax.Array  # early_stopping is "never"
    diversity: jax.Array


class State(NamedTuple):
    """What changes from step to step; donated."""

    cache: BeamCache  # of the new tokens
    running: Sequences
    sources: jax.Array  # (G, P, K): the beam of the step before that a running beam goes on from
    ended: Sequences  # best first
    open: jax.Array  # (G, P): whether a better sequence may still come
    written: jax.Array  # new tokens so far


def search(
    decoder: Decoder,
    tokenizer,
    prefix: Prefix,
    configs: Sequence[DecodeConfig],
    constraint: Callable | None = None,
) -> list[Generated]:
    """The num_return_sequences best beams of each prompt, best first; fewer, where fewer sequences
    are possible.

    ``configs``: one for each prompt, valid, with the same num_beams and num_beam_groups.
    """
    start = time.monotonic()
    rows, families = rows_and_families(configs, constraint)
    lengths = np.asarray(prefix.lengths_B)
    column = {
        name: np.array([getattr(config, name) for config in configs])
        for name in ("max_new_tokens", "length_penalty", "diversity_penalty")
    }
    news = np.minimum(
        np.minimum(column["max_new_tokens"], decoder.context), decoder.context - lengths
    ).astype(np.int32)
    groups = configs[0].num_beam_groups
    static = Static(
        configs[0].num_beams // groups,
        groups,
        bucket(max(int(news.max()), 1), decoder.context),
        families,
        tokenizer.eos_id,
    )
    about = Search(
        lengths,
        news,
        column["length_penalty"].astype(np.float32),
        np.array([config.length_penalty_type == "gnmt" for config in configs]),
        np.array([config.early_stopping is True for config in configs]),
        np.array([config.early_stopping == "never" for config in configs]),
        column["diversity_penalty"].astype(np.float32),
    )
    allowed_V = writable(tokenizer, decoder.config.vocabulary, end=False)
    state = _begin(prefix, about, static=static)
    allowance = np.array(
        [np.inf if config.max_time is None else config.max_time for config in configs]
    )
    steps = CHUNK if np.isfinite(allowance).any() else static.size

    while (going_P := np.asarray(_going_now(state, about)).any(0)).any():
        late = going_P & (time.monotonic() - start > allowance)
        state = _advance(
            decoder.params,
            prefix,
            state,
            about,
            rows,
            allowed_V,
            late,
            np.int32(1 if late.any() else steps),
            config=decoder.config,
            static=static,
        )
    return collect(tokenizer, configs, lengths, state.ended, state.ended.scores)


def penalty(lengths, about: Search):
    """What a sum of log-probabilities is divided by, for each prompt; broadcasts over lengths
    (P,)."""
    lengths = jnp.asarray(lengths, jnp.float32)
    return jnp.where(about.gnmt, (5 + lengths) / 6, lengths) ** about.length_penalty


def _going(state: State, about: Search):
    """(G, P): which searches go on. Others change nothing more, while the rest of the batch goes
    on."""
    full_GP = (state.ended.why != EMPTY).all(-1)
    return state.open & ~(full_GP & about.early)


_going_now = jax.jit(_going)


@functools.partial(jax.jit, static_argnames="static")
def _begin(prefix: Prefix, about: Search, *, static: Static) -> State:
    running = blank(prefix, static, 0.0)
    ended = blank(prefix, static, NEG)
    # All beams of a prompt are alike at first: all but one are put out of the running.
    running = running._replace(scores=running.scores.at[:, :, 1:].set(NEG))
    # A prompt that fills the context is a result, and nothing follows.
    no_room_P = about.news <= 0
    why = ended.why.at[0, :, 0].set(jnp.where(no_room_P, LENGTH, EMPTY).astype(jnp.int8))
    scores = ended.scores.at[0, :, 0].set(jnp.where(no_room_P, 0.0, NEG))
    shape = running.scores.shape
    return State(
        empty_beams(prefix.cache, shape, static.size),
        running,
        jnp.zeros(shape, jnp.int32),
        ended._replace(why=why, scores=scores),
        jnp.broadcast_to(~no_room_P, shape[:2]),
        jnp.int32(0),
    )


@functools.partial(jax.jit, static_argnames=("config", "static"), donate_argnames="state")
def _advance(
    params,
    prefix: Prefix,
    state: State,
    about: Search,
    rows,
    allowed_V,
    late_P,
    steps,
    *,
    config,
    static,
):
    """At most ``steps`` more tokens a beam; fewer when no search goes on. Prompts that are late end
    with the next."""

    def one_token(carry):
        count, state = carry
        logits, cache = next_logits(
            config, params, prefix, state.cache, state.sources, state.running.tokens, state.written
        )
        return count + 1, _grow(
            logits, state._replace(cache=cache), about, rows, allowed_V, late_P, static
        )

    def more(carry):
        return (carry[0] < steps) & (carry[1].written < static.size) & _going(carry[1], about).any()

    return lax.while_loop(more, one_token, (jnp.int32(0), state))[1]


def _grow(
    logits_GPKV, state: State, about: Search, rows, allowed_V, late_P, static: Static
) -> State:
    """Every beam gets one more token, and what ended takes its place among the best."""
    own = jax.nn.log_softmax(logits_GPKV, -1)
    processed = process_beams(
        own, state.running, about.prompts, about.news, rows, allowed_V, state.written, static
    )

    def one_group(earlier_PV, group):
        running, ended, is_open_P, own_PKV, logprobs_PKV = group
        less_PV = about.diversity[:, None] * earlier_PV if static.groups > 1 else 0.0 * earlier_PV
        *grown, tokens_PK = _choose(
            running,
            ended,
            is_open_P,
            own_PKV,
            logprobs_PKV - less_PV[:, None],
            state.written,
            about,
            rows,
            late_P,
            static,
        )
        return earlier_PV + jax.nn.one_hot(tokens_PK, earlier_PV.shape[1]).sum(1), tuple(grown)

    nothing_PV = jnp.zeros((own.shape[1], own.shape[-1]))
    groups = state.running, state.ended, state.open, own, processed
    _, (running, ended, is_open, sources) = lax.scan(one_group, nothing_PV, groups)
    return State(state.cache, running, sources, ended, is_open, state.written + 1)


def _choose(
    running,
    ended,
    open_P,
    own_PKV,
    logprobs_PKV,
    written,
    about: Search,
    rows,
    late_P,
    static: Static,
):
    """One group's step, arrays (P, K): (running, ended, open, sources, tokens)."""
    prompts, beams, vocabulary = own_PKV.shape
    # So many that K beams which go on remain when all their other candidates end.
    count = min((1 + rows.ends.shape[1] + rows.stops.shape[1]) * beams, beams * vocabulary)
    scores_PM, at_PM = lax.top_k(
        (logprobs_PKV + running.scores[..., None]).reshape(prompts, -1), count
    )
    beams_PM = at_PM // vocabulary
    tokens_PM = (at_PM % vocabulary).astype(jnp.int32)
    tokens, logprobs = extend(running, beams_PM, tokens_PM, own_PKV, about.prompts, written)
    ended_PM = ending(tokens, tokens_PM, about.prompts, written, rows, static)
    length = written + 1
    out_P1 = (length >= about.news)[:, None]
    late_P1 = late_P[:, None]
    hits_PM = ended_PM | out_P1 | late_P1

    next_scores, next_at = lax.top_k(scores_PM + ended_PM * NEG, beams)
    grown = Sequences(
        take(tokens, next_at), take(logprobs, next_at), next_scores, running.lengths, running.why
    )
    sources = take(beams_PM, next_at)
    chosen = take(tokens_PM, next_at)

    # What ends counts only if it is among the best K; behind it are those that keep the search
    # going. Dead beams, which stand in where there are not K different ones, never count.
    just_PM = hits_PM & (jnp.arange(count) < beams) & (scores_PM > NEG / 2)
    full_P1 = (ended.why != EMPTY).all(-1, keepdims=True) & about.early[:, None]
    normal_PM = scores_PM / penalty(length, about)[:, None]
    normal_PM += (full_P1 | ~open_P[:, None] | ~just_PM) * NEG
    why_PM = jnp.where(
        just_PM, jnp.where(ended_PM, STOP, jnp.where(out_P1, LENGTH, TIMEOUT)), EMPTY
    ).astype(jnp.int8)
    new = Sequences(tokens, logprobs, normal_PM, jnp.full_like(beams_PM, length), why_PM)
    merged = jax.tree.map(lambda old, new: jnp.concatenate([old, new], 1), ended, new)
    _, best = lax.top_k(merged.scores, beams)
    ended = jax.tree.map(lambda x: take(x, best), merged)

    # The best that a running beam may come to: at its present length, or with "never" at the
    # longest.
    longest = jnp.where(about.never & (about.length_penalty > 0), about.news, length)
    possible_P1 = next_scores[:, :1] / penalty(longest, about)[:, None]
    worst_PK = jnp.where(ended.why != EMPTY, ended.scores.min(1, keepdims=True), NEG)
    open_P &= (
        (possible_P1 > worst_PK).any(-1)
        & (next_scores > NEG / 2).any(-1)
        & ~(out_P1 | late_P1)[:, 0]
    )
    return grown, ended, open_P, sources, chosen
