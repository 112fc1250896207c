"""Attention weights of each head, and the predictions after each layer (logit lens).

A layer's prediction is the final norm and the output embedding applied to its residual stream
(nostalgebraist 2020, "interpreting GPT: the logit lens"); the last one is the model's own.
"""

# Shapes: B rows (here 1), S query positions, T key positions, D width, V vocabulary, N query heads,
# L layers, K guesses

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from mtnlg_jax.evaluate.inside.record import predict, run_recorded
from mtnlg_jax.model.transformer import Transformer


class Inside(NamedTuple):
    attention_LNST: jax.Array  # float32; the weight of token t for query s, by layer and head
    logits_LSV: jax.Array  # float32, L + 1 layers: after the embedding, then after each layer


class Lens(NamedTuple):
    """The predictions of L + 1 residual streams at each of S positions: of the token behind it, or
    of its own by a model of masked text."""

    guesses_LSK: np.ndarray  # int32, the most probable tokens, the best first
    probabilities_LSK: np.ndarray  # float32, of these
    ranks_LS: np.ndarray  # int32 from 0: how many tokens come before the true next one; -1: unknown
    log_probs_LS: np.ndarray  # float32 nats, of the true next one; nan: unknown
    divergence_LS: np.ndarray  # float32 nats: KL of the model's own prediction from this one


class Maps(NamedTuple):
    attention_LNST: np.ndarray  # float32; the weight of token t for query s, by layer and head
    sinks_LNS: np.ndarray | None  # float32; what a sink takes of a row; None without sinks


def look_inside(model: Transformer, tokens, causal: bool = True) -> Inside:
    """Return attention weights and the predictions of every layer for one sequence of token ids.

    Memory is L N S^2 and L S V, so texts must be short; `read_layers` keeps no logits.
    """
    found = run_recorded(model, jnp.asarray(tokens, jnp.int32)[None], causal, maps=True)
    assert found.maps_LBNST is not None, "asked for"
    logits = [predict(model, x_BSD)[0] for x_BSD in found.residual_LBSD]
    return Inside(found.maps_LBNST[:, 0], jnp.stack(logits))


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _lens(graph, params, tokens_BS, causal, guesses):
    model = nnx.merge(graph, params)
    found = run_recorded(model, tokens_BS, causal)
    # The token behind each position; that of the last one is unknown.
    next_BS = jnp.roll(tokens_BS, -1, 1)
    own_SV = jax.nn.log_softmax(predict(model, found.residual_LBSD[-1])[0])

    def one(x_BSD):
        log_probs_SV = jax.nn.log_softmax(predict(model, x_BSD)[0])
        best_SK, which_SK = lax.top_k(log_probs_SV, guesses)
        true_S1 = jnp.take_along_axis(log_probs_SV, next_BS[0][:, None], -1)
        rank_S = (log_probs_SV > true_S1).sum(-1)
        # The padding of a vocabulary has probability 0 on both sides.
        terms_SV = jnp.where(jnp.exp(own_SV) > 0, jnp.exp(own_SV) * (own_SV - log_probs_SV), 0.0)
        return which_SK, jnp.exp(best_SK), rank_S, true_S1[:, 0], terms_SV.sum(-1)

    # A layer at a time, so that logits exist for one only.
    return lax.map(one, found.residual_LBSD)


def read_layers(model: Transformer, tokens, causal: bool = True, guesses: int = 5) -> Lens:
    """Return the predictions of every layer for one sequence of S token ids.

    ``guesses`` (1 to the vocabulary) are kept for each layer and position. Memory is S V and L S D.
    """
    tokens_BS = jnp.asarray(tokens, jnp.int32)[None]
    found = _lens(*nnx.split(model), tokens_BS, causal, guesses)
    which, best, ranks, true, divergence = map(np.array, found)
    # A model of masked text predicts tokens in their places, and reads them there.
    unknown = slice(-1 if causal else 0, None)
    ranks[:, unknown] = -1
    true[:, unknown] = np.nan
    # Rounding can make it slightly negative.
    return Lens(which, best, ranks, true, np.maximum(divergence, 0))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _maps(graph, params, tokens_BS, causal):
    found = run_recorded(nnx.merge(graph, params), tokens_BS, causal, maps=True)
    return found.maps_LBNST, found.sinks_LBNS


def attention_maps(model: Transformer, tokens, causal: bool = True) -> Maps:
    """Return the attention weights of every layer and head for one sequence of S token ids.

    They are those by which the model's attention weighs its values: with masks, windows, slopes,
    caps and sinks, and with grouped heads repeated.
    """
    tokens_BS = jnp.asarray(tokens, jnp.int32)[None]
    maps_LBNST, sinks_LBNS = _maps(*nnx.split(model), tokens_BS, causal)
    sinks = None if sinks_LBNS is None else np.asarray(sinks_LBNS[:, 0])
    return Maps(np.asarray(maps_LBNST[:, 0]), sinks)
