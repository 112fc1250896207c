"""What a model says of every token of given rows: its log-probability and its distribution."""

# Shapes: C rows of a block, S positions, T tokens (all rows and positions), D width, V vocabulary

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.scoring import CHUNK, blocks, read_rows
from mtnlg_jax.parallel.auto import fetch, over_its_mesh, padded


class TokenScores(NamedTuple):
    """Of the tokens of a row from its start on, each an array [tokens].

    ``logprobs``: natural logarithms of their probabilities. ``sampled``: the same as they are drawn
    with temperature and top_k; -inf outside of top_k. ``best``: whether greedy decoding writes the
    token. ``means``, ``deviations``: of the log-probability of a token that the model draws there.
    """

    logprobs: np.ndarray
    sampled: np.ndarray
    best: np.ndarray
    means: np.ndarray
    deviations: np.ndarray


@over_its_mesh
def score_tokens(
    decoder: Decoder,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> list[TokenScores]:
    """Score the tokens of each row from its start (1 or more) on; rows of at most the context.

    Greedy decoding behind the first ``start`` tokens of a row writes the rest exactly if all of it
    is ``best``: up to the first difference it has read the same tokens. ``top_k``: 0 for all.
    """
    found: list[TokenScores | None] = [None] * len(rows)
    for chosen, number, width in blocks(list(map(len, rows)), decoder):
        tokens_CS = np.zeros((padded(number, decoder.mesh), width), np.int32)
        for row, i in zip(tokens_CS, chosen, strict=False):
            row[: len(rows[i])] = rows[i]
        tables = fetch(
            _score(decoder.params, tokens_CS, temperature, config=decoder.config, top_k=top_k)
        )
        for at, i in enumerate(chosen):
            kept = slice(starts[i] - 1, len(rows[i]) - 1)
            logprobs, sampled, best, means, deviations = (table[at, kept] for table in tables)
            found[i] = TokenScores(logprobs, sampled, best > 0, means, deviations)
        on_rows(len(chosen))
    return [each for each in found if each is not None]


@functools.partial(jax.jit, static_argnames=("config", "top_k"))
def _score(params, tokens_CS, temperature, *, config, top_k):
    """Return a table (5, C, S), whose entry j is about token j + 1 of each row."""
    x_CSD, head = read_rows(config, params, tokens_CS)
    x_TD = x_CSD.reshape(-1, x_CSD.shape[-1])
    labels_T = jnp.roll(tokens_CS, -1, 1).reshape(-1)

    def one(part):
        x_D, label = part
        logits_V = head.logits(x_D)
        logprobs_V = jax.nn.log_softmax(logits_V)
        probs_V = jnp.exp(logprobs_V)
        mean = (probs_V * logprobs_V).sum()
        # Around the mean: the difference of two squares would lose most digits.
        variance = (probs_V * jnp.square(logprobs_V - mean)).sum()
        logit = logits_V[label]
        sampled = logit / temperature - jax.nn.logsumexp(logits_V / temperature)
        if top_k:
            kept = jax.lax.top_k(logits_V, min(top_k, len(logits_V)))[0]
            drawn = logit / temperature - jax.nn.logsumexp(kept / temperature)
            sampled = jnp.where(logit >= kept[-1], drawn, -jnp.inf)
        best = jnp.argmax(logits_V) == label
        return jnp.stack([logprobs_V[label], sampled, best, mean, jnp.sqrt(variance)])

    # Logits of some tokens exist at a time.
    table_T5 = jax.lax.map(one, (x_TD, labels_T), batch_size=min(CHUNK, len(x_TD)))
    return table_T5.T.reshape(5, *tokens_CS.shape)
