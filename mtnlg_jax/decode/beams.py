"""What beam search and stochastic beams share: the sequences, their candidates and their results.

Arrays lead with (G, P, K): groups, prompts, beams of a group. Without groups G is 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.decode.batched_settings import Families, ends_of, stopped
from mtnlg_jax.decode.cache import Prefix
from mtnlg_jax.decode.processors import process
from mtnlg_jax.decode.results import Generated, check_finite, ends_of_config, text_stream

EMPTY, LENGTH, STOP, TIMEOUT = range(4)
REASONS = {LENGTH: "length", STOP: "stop", TIMEOUT: "timeout"}


class Static(NamedTuple):
    """What makes another program."""

    beams: int  # of a group
    groups: int
    size: int  # new tokens at most
    families: Families
    eos: int


class Sequences(NamedTuple):
    """Beams of a group, (G, P, K) each."""

    tokens: jax.Array  # (G, P, K, W): prompt and new tokens
    logprobs: jax.Array  # (G, P, K, N): of the new tokens, of the model's own distribution
    scores: jax.Array  # running: a sum of log-probabilities; ended: divided by the length penalty
    lengths: jax.Array  # new tokens
    why: jax.Array  # EMPTY, or why it ended


def collect(tokenizer, configs, prompts, ended: Sequences, order_GPK) -> list[Generated]:
    """The results of all prompts from the ended beams of all groups, by falling ``order_GPK``."""
    tokens, logprobs, scores, lengths, why = map(np.asarray, ended)
    results = []
    for prompt, config in enumerate(configs):
        own = np.asarray(order_GPK)[:, prompt].reshape(-1)
        ends = ends_of_config(tokenizer, config)
        best = [divmod(int(at), scores.shape[2]) for at in np.argsort(-own, kind="stable")]
        if (why[:, prompt] == EMPTY).all():
            raise ValueError(
                f"no beam behind prompt {prompt + 1} has a score, so the model's logits are not finite; "
                "look for parameters that are not finite or far too large, or take another checkpoint"
            )
        for group, beam in [at for at in best if why[at[0], prompt, at[1]] != EMPTY][
            : config.num_return_sequences
        ]:
            at = (group, prompt, beam)
            length = int(lengths[group, prompt, beam])
            check_finite(logprobs[at][:length], prompt, 0)
            written = tokens[at][prompts[prompt] : prompts[prompt] + length].tolist()
            if written and why[at] == STOP and written[-1] in ends:
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
                    REASONS[int(why[at])],
                    tuple(logprobs[at][: len(written)].tolist()),
                    float(scores[at]),
                )
            )
    return results


def process_beams(
    logprobs_GPKV, running: Sequences, prompts_P, news_P, rows, allowed_V, written, static: Static
):
    """``process`` for beams: the log-probabilities of (G, P, K) beams as so many rows, and where
    everything is forbidden the end, for nothing."""
    families = static.families
    eos = static.eos
    shape = logprobs_GPKV.shape

    def spread(x_P):
        spread = jnp.broadcast_to(x_P[None, :, None], (*shape[:3], *x_P.shape[1:]))
        return spread.reshape(shape[0] * shape[1] * shape[2], *x_P.shape[1:])

    rows = jax.tree.map(spread, rows)
    prompts_R = spread(prompts_P)
    flat_RV = process(
        logprobs_GPKV.reshape(-1, shape[-1]),
        rows,
        families,
        running.tokens.reshape(len(prompts_R), -1),
        prompts_R + written,
        prompts_R,
        prompts_R + spread(news_P),
        allowed_V,
        eos,
    )
    at = jnp.arange(flat_RV.shape[0]), ends_of(rows, families, eos)[:, 0]
    flat_RV = flat_RV.at[at].set(jnp.where(flat_RV.max(-1) == -jnp.inf, 0.0, flat_RV[at]))
    return flat_RV.reshape(shape)


def extend(running, beams_PM, tokens_PM, own_PKV, prompts_P, written):
    """(tokens, logprobs) of candidates: each of ``running``'s beams (P, K) that it names, and one
    more token."""
    at = jnp.arange(len(prompts_P))[:, None], jnp.arange(beams_PM.shape[1])[None]
    tokens = take(running.tokens, beams_PM).at[(*at, (prompts_P + written)[:, None])].set(tokens_PM)
    own_PM = take(own_PKV.reshape(len(prompts_P), -1), beams_PM * own_PKV.shape[-1] + tokens_PM)
    return tokens, take(running.logprobs, beams_PM).at[:, :, written].set(own_PM)


def take(x_PM, at_PK):
    """Entries ``at_PK`` of axis 1, whatever follows it."""
    return jnp.take_along_axis(x_PM, at_PK.reshape(*at_PK.shape, *(1,) * (x_PM.ndim - 2)), 1)


def ending(tokens_PMW, last_PM, prompts_P, written, rows, static: Static):
    """Which candidates (P, M) end with an end token or a stop sequence; ``rows`` has one row a
    prompt."""
    families = static.families
    ended_PM = (last_PM[..., None] == ends_of(rows, families, static.eos)[:, None]).any(-1)
    if "stops" not in families.names:
        return ended_PM
    prompts, candidates, width = tokens_PMW.shape
    repeated, lengths_R = jax.tree.map(lambda x: jnp.repeat(x, candidates, 0), (rows, prompts_P))
    hit_R = stopped(
        repeated, families, tokens_PMW.reshape(-1, width), lengths_R + written + 1, lengths_R
    )
    return ended_PM | hit_R.reshape(prompts, candidates)


def blank(prefix: Prefix, static: Static, score) -> Sequences:
    """Beams that hold their prompt alone."""
    shape = static.groups, prefix.tokens_BS.shape[0], static.beams
    tokens_PW = jnp.pad(prefix.tokens_BS, ((0, 0), (0, static.size)))
    return Sequences(
        jnp.broadcast_to(tokens_PW[None, :, None], (*shape, tokens_PW.shape[1])),
        jnp.zeros((*shape, static.size)),
        jnp.full(shape, score, jnp.float32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.int8),
    )
