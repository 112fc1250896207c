"""Stochastic beams: K different sequences drawn without replacement from the model (Kool 2019,
algorithm 1).

Every sequence's log-probability is perturbed by a Gumbel, and the K largest perturbed values are
kept. They are found
top down: a beam's own value is the largest among its continuations, whose values are drawn under
that condition.
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
from mtnlg_jax.decode.processors import warp
from mtnlg_jax.decode.results import CHUNK, Generated, writable


class State(NamedTuple):
    """What changes from step to step; donated. Arrays (1, P, K): there is one group."""

    cache: BeamCache
    # scores: log-probabilities under the distribution that is drawn from; -inf: no such sequence
    beams: Sequences
    perturbed: jax.Array  # what they are kept and sorted by
    sources: jax.Array
    written: jax.Array


def draw(
    decoder: Decoder,
    tokenizer,
    prefix: Prefix,
    configs: Sequence[DecodeConfig],
    constraint: Callable | None = None,
) -> list[Generated]:
    """num_return_sequences of num_beams different sequences for each prompt, in the order in which
    they would be drawn one after another, without replacement, from the processed and warped
    distribution (at the temperature given). ``score`` is a sequence's log-probability under it.

    ``configs``: one for each prompt, valid, with the same num_beams. Each prompt draws with its
        seed.
    """
    start = time.monotonic()
    rows, families = rows_and_families(configs, constraint)
    lengths = np.asarray(prefix.lengths_B)
    news = np.array([min(config.max_new_tokens, decoder.context) for config in configs], np.int32)
    news = np.minimum(news, decoder.context - lengths).astype(np.int32)
    static = Static(
        configs[0].num_beams,
        1,
        bucket(max(int(news.max()), 1), decoder.context),
        families,
        tokenizer.eos_id,
    )
    about = lengths, news, np.array([config.seed for config in configs], np.uint32)
    allowed_V = writable(tokenizer, decoder.config.vocabulary, end=False)
    state = _begin(prefix, about, static=static)
    allowance = np.array(
        [np.inf if config.max_time is None else config.max_time for config in configs]
    )
    steps = CHUNK if np.isfinite(allowance).any() else static.size

    while (going_P := np.asarray(_going_now(state)).any(-1)).any():
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
    # Where there are fewer sequences than beams, the others have no probability.
    why = jnp.where(state.beams.scores > -jnp.inf, state.beams.why, EMPTY)
    return collect(tokenizer, configs, lengths, state.beams._replace(why=why), state.perturbed)


def _going(state: State):
    """(P, K): which beams are not whole sequences yet."""
    return ((state.beams.why == EMPTY) & (state.beams.scores > -jnp.inf))[0]


_going_now = jax.jit(_going)


@functools.partial(jax.jit, static_argnames="static")
def _begin(prefix: Prefix, about, *, static: Static) -> State:
    beams = blank(prefix, static, -jnp.inf)
    shape = beams.scores.shape
    # Of K alike beams one stands for all sequences. Their largest value may be any: it changes no
    # order.
    scores = beams.scores.at[:, :, 0].set(0.0)
    why = beams.why.at[0, :, 0].set(jnp.where(about[1] <= 0, LENGTH, EMPTY).astype(jnp.int8))
    return State(
        empty_beams(prefix.cache, shape, static.size),
        beams._replace(scores=scores, why=why),
        scores,
        jnp.zeros(shape, jnp.int32),
        jnp.int32(0),
    )


@functools.partial(jax.jit, static_argnames=("config", "static"), donate_argnames="state")
def _advance(
    params, prefix: Prefix, state: State, about, rows, allowed_V, late_P, steps, *, config, static
):
    """At most ``steps`` more tokens a beam; fewer when all are whole. Prompts that are late end
    with the next."""

    def one_token(carry):
        count, state = carry
        logits, cache = next_logits(
            config, params, prefix, state.cache, state.sources, state.beams.tokens, state.written
        )
        return count + 1, _grow(
            logits, state._replace(cache=cache), about, rows, allowed_V, late_P, static
        )

    def more(carry):
        return (carry[0] < steps) & (carry[1].written < static.size) & _going(carry[1]).any()

    return lax.while_loop(more, one_token, (jnp.int32(0), state))[1]


def _grow(logits_GPKV, state: State, about, rows, allowed_V, late_P, static: Static) -> State:
    """The K continuations with the largest perturbed log-probabilities, whole sequences among
    them."""
    prompts_P, news_P, seeds_P = about
    processed = process_beams(
        logits_GPKV, state.beams, prompts_P, news_P, rows, allowed_V, state.written, static
    )
    _, prompts, beams, vocabulary = processed.shape
    repeated = jax.tree.map(lambda x: jnp.repeat(x, beams, 0), rows)
    warped = warp(processed.reshape(-1, vocabulary), repeated, static.families).reshape(
        prompts, beams, vocabulary
    )
    own_PKV = jax.nn.log_softmax(logits_GPKV, -1)[0]
    kept = jax.tree.map(lambda x: x[0], state.beams)
    whole_PK = kept.why != EMPTY

    totals_PKV = kept.scores[..., None] + jax.nn.log_softmax(warped, -1)
    keys_P = jax.vmap(jax.random.fold_in, (0, None))(
        jax.vmap(jax.random.key)(seeds_P), state.written
    )
    noise_PKV = jax.vmap(lambda key: jax.random.gumbel(key, (beams, vocabulary)))(keys_P)
    values_PKV = _given_largest(totals_PKV + noise_PKV, state.perturbed[0])
    # A whole sequence is its own one continuation.
    stays_PKV = whole_PK[..., None] & (jnp.arange(vocabulary) == 0)
    values_PKV = jnp.where(whole_PK[..., None], -jnp.inf, values_PKV)
    values_PKV = jnp.where(stays_PKV, state.perturbed[0, ..., None], values_PKV)
    totals_PKV = jnp.where(stays_PKV, kept.scores[..., None], totals_PKV)

    perturbed, at_PK = lax.top_k(values_PKV.reshape(prompts, -1), beams)
    sources = at_PK // vocabulary
    tokens_PK = (at_PK % vocabulary).astype(jnp.int32)
    stays_PK = take(whole_PK, sources)
    tokens, logprobs = extend(kept, sources, tokens_PK, own_PKV, prompts_P, state.written)
    ended_PK = ending(tokens, tokens_PK, prompts_P, state.written, rows, static)
    out_P1 = (state.written + 1 >= news_P)[:, None]
    late_P1 = late_P[:, None]
    why = jnp.where(ended_PK, STOP, jnp.where(out_P1, LENGTH, jnp.where(late_P1, TIMEOUT, EMPTY)))
    grown = Sequences(
        tokens,
        logprobs,
        take(totals_PKV.reshape(prompts, -1), at_PK),
        jnp.where(stays_PK, take(kept.lengths, sources), state.written + 1),
        jnp.where(stays_PK, take(kept.why, sources), why.astype(jnp.int8)),
    )
    # What has no probability is no sequence, whatever its value.
    perturbed = jnp.where(grown.scores > -jnp.inf, perturbed, -jnp.inf)
    return State(
        state.cache,
        jax.tree.map(lambda x: x[None], grown),
        perturbed[None],
        sources[None],
        state.written + 1,
    )


def _given_largest(values_PKV, largest_PK):
    """Perturbed values, drawn freely, under the condition that the largest of each beam is
    ``largest_PK`` (Kool 2019, appendix B.3, in its stable form)."""
    largest = largest_PK[..., None]
    top = values_PKV.max(-1, keepdims=True)
    v = largest - values_PKV + jnp.log1p(-jnp.exp(values_PKV - top))
    given = largest - jnp.maximum(v, 0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    return jnp.where(values_PKV > -jnp.inf, given, -jnp.inf)
