"""Contrastive search (Su 2022): likely tokens that do not repeat what the model has seen.

Of the k most probable tokens v (k is top_k, p the processed distribution), a step takes the one
with the largest

    (1 - penalty_alpha) p(v) - penalty_alpha max_j cos(h_v, h_j),

where h is the input of the head and j goes over all tokens so far, prompt included (section 3.2,
equation 5). This is `penalty_alpha` with `top_k` of Hugging Face's generate. Tokens with
probability 0 are no candidates here; there they are.

The k candidates of a row are read as one batch. They share the row's cache, and only the keys of
the token that is taken are written to it.
"""

# Shapes: B rows, W candidates of a row, X their rows (B x W), S positions, T positions of a cache,
# K key/value heads, H head width, V vocabulary, D width

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.config import DecodeConfig, ModelConfig
from mtnlg_jax.decode.batched_settings import Settings
from mtnlg_jax.decode.beam_cache import attend_shared
from mtnlg_jax.decode.cache import Decoder, Prefix, bucket
from mtnlg_jax.decode.forward import logits_of, run
from mtnlg_jax.decode.positions import NOWHERE, write
from mtnlg_jax.decode.processors import NEG_INF, process
from mtnlg_jax.decode.results import CHUNK
from mtnlg_jax.decode.sampling import Limits, State, copy_prompts, put, split_state
from mtnlg_jax.decode.scoring import read_rows
from mtnlg_jax.model.attention import attention, merge, merge_lse
from mtnlg_jax.parallel.auto import fetch, padded_positions, split


class Memory(NamedTuple):
    """What the search of each row holds beside its `State`, whose tokens are all in the cache."""

    logits_BV: jax.Array  # of the next token
    units_BTD: jax.Array  # float32 hidden states of the tokens so far, scaled to length 1


class ContrastiveSearch:
    """Contrastive search for a batch of rows, each with its own settings.

    ``state`` and ``limits`` are those before the first token, and ``advance`` takes the place of
    ``sampling.advance``. The arguments are those of ``sampling.begin``, and ``configs`` has one
    config for each row.

    Raises ValueError if the decoder has an int8 cache.
    """

    def __init__(
        self,
        decoder: Decoder,
        prefix: Prefix,
        owners_B: np.ndarray,
        max_new_tokens_B: np.ndarray,
        seeds_B: np.ndarray,
        settings: Settings,
        configs: Sequence[DecodeConfig],
    ):
        if decoder.int8_cache:
            raise ValueError(
                "contrastive search does not support an int8 cache, and "
                f"penalty_alpha={max(config.penalty_alpha for config in configs)}; set "
                "penalty_alpha=0, or leave cache=int8 out"
            )
        vocabulary = decoder.config.vocabulary
        self._width = min(max(config.top_k for config in configs), vocabulary)
        longest = int(fetch(prefix.lengths_B).max())
        self.state, self.limits, self._memory = _begin(
            decoder.params,
            prefix,
            owners_B,
            max_new_tokens_B,
            seeds_B,
            settings,
            config=decoder.config,
            width=padded_positions(bucket(longest, prefix.tokens_BS.shape[1])),
        )

    def advance(
        self, params, state: State, limits: Limits, settings: Settings, chunks, *, config
    ) -> State:
        """Write at most ``chunks`` times CHUNK more tokens; fewer when all rows are done."""
        state, self._memory = _advance(
            params, state, self._memory, limits, settings, chunks, config=config, width=self._width
        )
        return state


@functools.partial(jax.jit, static_argnames=("config", "width"))
def _begin(
    params,
    prefix: Prefix,
    owners_B,
    max_new_tokens_B,
    seeds_B,
    settings: Settings,
    *,
    config: ModelConfig,
    width: int,
) -> tuple[State, Limits, Memory]:
    """Start the rows; ``width`` positions hold every prompt."""
    state, limits, logits_BV = copy_prompts(prefix, owners_B, max_new_tokens_B, seeds_B, settings)
    # The cache has no hidden states, so the prompts are read once more.
    x_BSD, _ = read_rows(config, params, state.tokens_BS[:, :width])
    more = state.cache[0][0].shape[2] - x_BSD.shape[1]
    units_BTD = jnp.pad(_unit(x_BSD), ((0, 0), (0, more), (0, 0)))
    return split_state(state), limits, _split(Memory(logits_BV, units_BTD))


@functools.partial(
    jax.jit, static_argnames=("config", "width"), donate_argnames=("state", "memory")
)
def _advance(
    params,
    state: State,
    memory: Memory,
    limits: Limits,
    settings: Settings,
    chunks,
    *,
    config: ModelConfig,
    width: int,
) -> tuple[State, Memory]:
    """Do the work of `ContrastiveSearch.advance` with ``width`` candidates, the largest top_k."""

    def one(carry):
        number, state, memory = carry
        state, memory = _step(config, params, state, memory, limits, settings, width)
        return number + 1, state, memory

    def more(carry):
        number, state, _ = carry
        return (number < chunks * CHUNK) & ~state.done_B.all()

    _, state, memory = lax.while_loop(more, one, (jnp.int32(0), state, memory))
    return split_state(state), _split(memory)


def _step(
    config: ModelConfig, params, state: State, memory: Memory, limits, settings: Settings, width
) -> tuple[State, Memory]:
    rows = settings.rows
    processed_BV = process(
        memory.logits_BV,
        settings,
        state.tokens_BS,
        state.lengths_B,
        limits.prompts_B,
        limits.longest_B,
    )
    probabilities_BW, tokens_BW = lax.top_k(jax.nn.softmax(processed_BV, -1), width)
    logits_BWV, units_BWD, pairs = _read_candidates(
        config, params, state.cache, tokens_BW, state.lengths_B
    )
    cosines_BWT = jnp.einsum("BWD,BTD->BWT", units_BWD, memory.units_BTD)
    positions_T = jnp.arange(cosines_BWT.shape[2])
    known_BT = positions_T[None, :] < state.lengths_B[:, None]
    penalty_BW = jnp.where(known_BT[:, None, :], cosines_BWT, NEG_INF).max(-1)
    alpha_B1 = rows.penalty_alpha[:, None]
    scores_BW = (1 - alpha_B1) * probabilities_BW - alpha_B1 * penalty_BW
    # The batch has the candidates of the row with the most. A forbidden token is none.
    candidate_BW = jnp.arange(width)[None, :] < rows.top_k[:, None]
    candidate_BW &= jnp.take_along_axis(processed_BV, tokens_BW, 1) > NEG_INF
    best_B = jnp.argmax(jnp.where(candidate_BW, scores_BW, NEG_INF), -1)

    def chosen(x_BW):
        return x_BW[jnp.arange(len(best_B)), best_B]

    # Where the chosen token stands; nowhere in rows that are done.
    at_B = jnp.where(state.done_B, NOWHERE, state.lengths_B)
    cache = tuple(
        write(layer, _of_rows(k, width, best_B), _of_rows(v, width, best_B), at_B[:, None])
        for layer, (k, v) in zip(state.cache, pairs, strict=True)
    )
    units_BTD = memory.units_BTD.at[jnp.arange(len(best_B)), at_B].set(
        chosen(units_BWD), mode="drop"
    )
    state = put(
        memory.logits_BV,
        processed_BV,
        chosen(tokens_BW),
        state._replace(cache=cache),
        limits,
        settings,
    )
    return state, Memory(chosen(logits_BWV), units_BTD)


def _read_candidates(config: ModelConfig, params, cache, tokens_BW, lengths_B):
    """Read one token of each candidate behind the ``lengths_B`` tokens of its row.

    Returns: float32 logits (B, W, V), unit hidden states (B, W, D), and for each layer the keys and
    values, (X, K, 1, H) each.
    """
    rows, width = tokens_BW.shape

    def attend(layer, q, k, v, return_lse=False, **options):
        lengths_B = layer.rows
        o_shared, lse_shared = attend_shared(q, layer.shared, lengths_B, lengths_B, options)
        # A candidate sees no other candidate, but itself.
        o_own, lse_own = attention(q, k, v, return_lse=True, **options)
        lse_own = lse_own[..., 0]
        out = merge(o_shared, lse_shared, o_own[:, 0], lse_own).astype(q.dtype)[:, None]
        found = (out, merge_lse(lse_shared, lse_own)[..., None]) if return_lse else out
        return found, (k.swapaxes(1, 2), v.swapaxes(1, 2))

    # A row that is full is done, and its candidates have no position of their own.
    positions_B = jnp.minimum(lengths_B, config.max_position_embeddings - 1)
    x_X1D, head, pairs = run(
        config,
        params,
        tokens_BW.reshape(-1, 1).astype(jnp.int32),
        jnp.repeat(positions_B, width)[:, None],
        attend,
        shared=cache,
        rows=lengths_B,
        units=rows,
    )
    logits_XV = logits_of(x_X1D[:, 0], head)
    units_XD = _unit(x_X1D[:, 0])
    return logits_XV.reshape(rows, width, -1), units_XD.reshape(rows, width, -1), pairs


def _of_rows(x_XKTH, width: int, best_B) -> jax.Array:
    """Return the keys or values of the candidates ``best_B``, (B, 1, K, H)."""
    x_BWKH = x_XKTH[:, :, 0].reshape(-1, width, *x_XKTH.shape[1:2], x_XKTH.shape[3])
    return x_BWKH[jnp.arange(len(best_B)), best_B][:, None]


def _unit(x) -> jax.Array:
    """Return vectors (..., D) scaled to length 1, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _split(memory: Memory) -> Memory:
    return Memory(split(memory.logits_BV, "BV"), split(memory.units_BTD, "BTD"))
