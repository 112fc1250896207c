"""Parts shared by beam search and stochastic beams: sequences, candidates, the loop, results."""

# Shapes: G groups of beams (1 without groups), P prompts, W beams of a group, C candidates for the
# next beams, S positions, T new tokens, B rows: one for each beam or candidate of each prompt,
# V vocabulary

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from mtnlg_jax.config import DecodeConfig, ModelConfig
from mtnlg_jax.decode.batched_settings import Settings, ends_of, stopped
from mtnlg_jax.decode.beam_cache import next_logits
from mtnlg_jax.decode.cache import Decoder, Prefix, bucket
from mtnlg_jax.decode.processors import process
from mtnlg_jax.decode.results import (
    CHUNK,
    Generated,
    check_finite,
    ends_of_config,
    text_stream,
    time_limits,
)
from mtnlg_jax.parallel.auto import agreed, fetch, split

EMPTY, LENGTH, STOP, TIMEOUT = range(4)
REASONS = {LENGTH: "length", STOP: "stop", TIMEOUT: "timeout"}


class Static(NamedTuple):
    """Static arguments of a search: a change compiles another program."""

    beams: int  # of a group
    groups: int
    size: int  # new tokens at most


class Sequences(NamedTuple):
    """Beams, (G, P, W) each, or candidates."""

    tokens: jax.Array  # (G, P, W, S): prompt and new tokens
    logprobs: jax.Array  # (G, P, W, T): of the new tokens, in the model's own distribution
    scores: jax.Array  # running: a sum of log-probabilities; ended: divided by the length penalty
    lengths: jax.Array  # new tokens
    why: jax.Array  # why it ended, or EMPTY


def max_new_tokens_of(
    decoder: Decoder, prefix: Prefix, configs: Sequence[DecodeConfig]
) -> np.ndarray:
    """Return how many new tokens each prompt may get, within the context: (P,)."""
    # Cut first: a very large number would not fit int32.
    asked = [min(config.max_new_tokens, decoder.context) for config in configs]
    return np.minimum(asked, decoder.context - fetch(prefix.lengths_B)).astype(np.int32)


def static_of(config: DecodeConfig, max_new_tokens_P: np.ndarray, context: int) -> Static:
    """Return the static arguments of a search whose prompts all have ``config``'s beams."""
    groups = config.num_beam_groups
    # A bucket, so that few lengths compile their own program; at least 1, since arrays need a size.
    size = bucket(max(int(max_new_tokens_P.max()), 1), context)
    return Static(config.num_beams // groups, groups, size)


def run_until_done(
    state,
    start: float,
    size: int,
    configs: Sequence[DecodeConfig],
    active_prompts: Callable,
    advance: Callable,
    mesh: Mesh | None = None,
):
    """Advance a search until no prompt is active.

    Args:
      start: when the search began, by time.monotonic().
      active_prompts: state -> (P,), the prompts whose search continues.
      advance: (state, timed_out_P, steps) -> state; see ``advance_while``.
      mesh: that of the decoder.
    """
    time_limits_P = time_limits(configs)
    # Without a time limit the host has nothing to decide, so one call does it all.
    steps = CHUNK if np.isfinite(time_limits_P).any() else size
    while (active_P := active_prompts(state)).any():
        late_P = time.monotonic() - start > time_limits_P
        timed_out_P = active_P & agreed(late_P, mesh)
        # A prompt that timed out ends with its next token, so one step is enough.
        state = advance(state, timed_out_P, np.int32(1 if timed_out_P.any() else steps))
    return state


def advance_while(
    params,
    prefix: Prefix,
    state,
    steps,
    grow: Callable,
    is_active: Callable,
    *,
    config: ModelConfig,
    size: int,
):
    """Give every beam at most ``steps`` more tokens; fewer when no beam is active.

    ``state`` has ``cache``, ``sources``, ``running`` and ``written``; ``grow`` makes the next state
    from the logits (G, P, W, V) and a state.
    """

    def one_token(carry):
        count, state = carry
        logits_GPWV, cache = next_logits(
            config, params, prefix, state.cache, state.sources, state.running.tokens, state.written
        )
        # The cache is written first; reordering the beams does not move it.
        return count + 1, grow(logits_GPWV, state._replace(cache=cache))

    def more(carry):
        count, state = carry
        return (count < steps) & (state.written < size) & is_active(state).any()

    return split_search(lax.while_loop(more, one_token, (jnp.int32(0), state))[1])


def collect(
    tokenizer, configs: Sequence[DecodeConfig], prefix: Prefix, ended: Sequences, order_GPW
) -> list[Generated]:
    """Return the results of all prompts from the ended beams of all groups, by falling order."""
    prompt_lengths = fetch(prefix.lengths_B)
    # One copy to the host for all prompts.
    tokens, logprobs, scores, lengths, why = map(fetch, ended)
    order_GPW = fetch(order_GPW)
    results = []
    for prompt, config in enumerate(configs):
        if (why[:, prompt] == EMPTY).all():
            raise ValueError(
                f"no beam behind prompt {prompt + 1} has a score, so the model's logits are not "
                "finite; look for parameters that are not finite or far too large, or take "
                "another checkpoint"
            )
        ends = ends_of_config(tokenizer, config)
        order_GW = order_GPW[:, prompt]
        # Over all groups; stable, so that of equals the earlier group comes first.
        best = np.argsort(-order_GW.reshape(-1), kind="stable").tolist()
        indices = [(i // scores.shape[2], prompt, i % scores.shape[2]) for i in best]
        indices = [index for index in indices if why[index] != EMPTY]
        for index in indices[: config.num_return_sequences]:
            length = int(lengths[index])
            # Only results are checked: other beams may hold placeholders.
            check_finite(logprobs[index][:length], prompt, 0)
            first = prompt_lengths[prompt]
            written = tokens[index][first : first + length].tolist()
            # The end token is not text. A stop sequence stays here, and the text stream cuts it.
            if written and why[index] == STOP and written[-1] in ends:
                written.pop()
            stream = text_stream(tokenizer, config)
            for token in written:
                stream.push(token)
            stream.finish()
            results.append(
                Generated(
                    prompt,
                    tuple(written),
                    stream.text,
                    REASONS[int(why[index])],
                    tuple(logprobs[index][: len(written)].tolist()),
                    float(scores[index]),
                )
            )
    return results


def process_beams(
    logprobs_GPWV, running: Sequences, prompts_P, max_new_tokens_P, written, settings: Settings
) -> jax.Array:
    """Apply ``process`` to the log-probabilities of beams, with one row for each beam.

    ``settings`` has one row a prompt. Where everything is forbidden, the end token gets
    log-probability 0.
    """
    shape = logprobs_GPWV.shape
    rows = shape[0] * shape[1] * shape[2]

    # Every beam of a prompt has its prompt's settings.
    def spread(x_P):
        every = jnp.broadcast_to(x_P[None, :, None], (*shape[:3], *x_P.shape[1:]))
        return every.reshape(rows, *x_P.shape[1:])

    settings = settings.map_rows(spread)
    prompts_B = spread(prompts_P)
    processed_BV = process(
        logprobs_GPWV.reshape(-1, shape[-1]),
        settings,
        running.tokens.reshape(rows, -1),
        prompts_B + written,
        prompts_B,
        prompts_B + spread(max_new_tokens_P),
    )
    end = jnp.arange(rows), ends_of(settings)[:, 0]
    # A beam must have a continuation; otherwise it would leave the search without having ended.
    nothing_B = processed_BV.max(-1) == -jnp.inf
    processed_BV = processed_BV.at[end].set(jnp.where(nothing_B, 0.0, processed_BV[end]))
    return processed_BV.reshape(shape)


def extend(
    running: Sequences, beams_PC, tokens_PC, own_PWV, prompts_P, written
) -> tuple[jax.Array, jax.Array]:
    """Return (tokens, logprobs) of candidates: each continues one of ``running``'s beams, (P, W),
    with one more token."""
    at = jnp.arange(len(prompts_P))[:, None], jnp.arange(beams_PC.shape[1])[None]
    tokens = take(running.tokens, beams_PC).at[(*at, (prompts_P + written)[:, None])].set(tokens_PC)
    flat_index_PC = beams_PC * own_PWV.shape[-1] + tokens_PC
    own_PC = take(own_PWV.reshape(len(prompts_P), -1), flat_index_PC)
    return tokens, take(running.logprobs, beams_PC).at[:, :, written].set(own_PC)


def take(x_PC, index_PW) -> jax.Array:
    """Return the entries ``index_PW`` of axis 1; more axes may follow it."""
    index = index_PW.reshape(*index_PW.shape, *(1,) * (x_PC.ndim - 2))
    return jnp.take_along_axis(x_PC, index, 1)


def ending(tokens_PCS, last_PC, prompts_P, written, settings: Settings) -> jax.Array:
    """Return which candidates, (P, C), end with an end token or a stop sequence.

    ``settings`` has one row a prompt.
    """
    ended_PC = (last_PC[..., None] == ends_of(settings)[:, None]).any(-1)
    if not settings.uses("stops"):
        return ended_PC
    prompts, candidates, size = tokens_PCS.shape

    def repeat(x):
        return jnp.repeat(x, candidates, 0)

    prompts_B = repeat(prompts_P)
    tokens_BS = tokens_PCS.reshape(-1, size)
    # The token that was just chosen counts, hence + 1.
    hit_B = stopped(settings.map_rows(repeat), tokens_BS, prompts_B + written + 1, prompts_B)
    return ended_PC | hit_B.reshape(prompts, candidates)


def split_search(state):
    """Return the state of a search split over the mesh in context: its prompts over data."""
    layers, writers_GPWT = state.cache
    layers = jax.tree.map(lambda x: split(x, "BLSH"), layers)

    def by_prompt(x):
        return split(x, "GPWS"[: x.ndim])

    rest = jax.tree.map(by_prompt, state._replace(cache=()))
    return rest._replace(cache=type(state.cache)(layers, by_prompt(writers_GPWT)))


def blank(prefix: Prefix, static: Static, score: float) -> Sequences:
    """Return beams that hold their prompt alone."""
    shape = static.groups, prefix.tokens_BS.shape[0], static.beams
    # Room for the new tokens behind the longest prompt.
    tokens_PS = jnp.pad(prefix.tokens_BS, ((0, 0), (0, static.size)))
    return Sequences(
        jnp.broadcast_to(tokens_PS[None, :, None], (*shape, tokens_PS.shape[1])),
        jnp.zeros((*shape, static.size)),
        jnp.full(shape, score, jnp.float32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.int8),
    )
