"""Speculative decoding: several tokens are guessed cheaply and verified by one forward pass
(Leviathan 2023).

Guesses come from the row itself, by what followed its last tokens where they stood before (prompt
look-up), or from a draft model. A guess stays if the model would have written it: at temperature 0
if it is the best token, else with probability min(1, p / q), both of them processed and warped, and
what is drawn in its place follows max(0, p - q). So greedy rows are the same as without guesses
(where logits differ by more than rounding, which another shape of a product may change), and drawn
rows have the same distribution, though other tokens for the same seed.

Every position is processed with the tokens before it, guesses included, so that penalties, n-grams,
forced tokens, minimum lengths, stops and constraints see what they see without guesses. Shapes are
static: what is not accepted is not advanced over. It pays where reading the weights is what takes
the time: at small batches.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.cache import Decoder, Prefix, bucket, prefill, read, step, to_int8
from mtnlg_jax.decode.processors import choose, draw, process, warp
from mtnlg_jax.decode.results import CHUNK
from mtnlg_jax.decode.sampling import Limits, State, append

# Purposes of a row's draws at one place; a place is decided once, by the tokens before it.
DRAFT = 1
ACCEPT = 2
INSTEAD = 3


class Speculation:
    """The guesses of rows, each written by its settings.

    ``advance`` stands in for generate's; ``counts`` are tokens guessed and accepted, (B,) each.
    """

    def __init__(
        self,
        decoder: Decoder,
        draft: Decoder | None,
        prefix: Prefix,
        owners: Sequence[int],
        configs: Sequence[DecodeConfig],
    ):
        name = "prompt_lookup_num_tokens" if draft is None else "num_assistant_tokens"
        # More guesses than there are places are never of use.
        self._most_B = np.array(
            [min(getattr(config, name), decoder.context - 1) for config in configs], np.int32
        )
        self._ngrams_B = np.array([config.max_matching_ngram_size for config in configs], np.int32)
        self._ngrams = int(self._ngrams_B[self._most_B > 0].max()) if draft is None else 0
        self._draft = draft
        self._draft_cache = ()
        if draft is not None:
            lengths = np.asarray(prefix.lengths_B)
            tokens = np.asarray(prefix.tokens_BS)
            prompts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
            cache = prefill(draft, prompts, bucket(prefix.tokens_BS.shape[1], draft.context)).cache
            cache = to_int8(cache) if draft.int8_cache else cache
            self._draft_cache = jax.tree.map(lambda x: x[np.array(owners)], cache)
        self.counts = np.zeros((2, len(configs)), np.int32)

    def advance(
        self,
        params,
        state: State,
        limits: Limits,
        rows,
        allowed_V,
        chunks,
        *,
        config,
        families,
        eos,
    ) -> State:
        """At most ``chunks`` times CHUNK more tokens, up to what the last round verifies
        besides."""
        draft = self._draft
        state, self._draft_cache, counts = _advance(
            params,
            () if draft is None else draft.params,
            state,
            self._draft_cache,
            limits,
            rows,
            allowed_V,
            self._most_B,
            self._ngrams_B,
            chunks,
            config=config,
            draft_config=None if draft is None else draft.config,
            most=int(self._most_B.max()),
            ngrams=self._ngrams,
            families=families,
            eos=eos,
        )
        self.counts = self.counts + np.asarray(counts)
        return state


@functools.partial(
    jax.jit,
    static_argnames=("config", "draft_config", "most", "ngrams", "families", "eos"),
    donate_argnames=("state", "draft_cache"),
)
def _advance(
    params,
    draft_params,
    state: State,
    draft_cache,
    limits: Limits,
    rows,
    allowed_V,
    most_B,
    ngrams_B,
    chunks,
    *,
    config,
    draft_config,
    most,
    ngrams,
    families,
    eos,
):
    start_B = state.lengths_B

    def one_round(carry):
        state, draft_cache, (guessed_B, accepted_B) = carry
        if draft_config is None:
            guesses_BK, counts_B = look_up(
                state.tokens_BS, state.lengths_B, most_B, ngrams_B, most, ngrams
            )
            odds_BKV = None
        else:
            counts_B = most_B
            guesses_BK, odds_BKV, draft_cache = _draft(
                draft_config,
                draft_params,
                draft_cache,
                state,
                limits,
                rows,
                allowed_V,
                most,
                families,
                eos,
            )
        last_B1 = jnp.take_along_axis(state.tokens_BS, state.lengths_B[:, None] - 1, 1)
        logits_BTV, cache = read(
            config,
            params,
            state.cache,
            jnp.concatenate([last_B1, guesses_BK], 1),
            state.lengths_B - 1,
        )
        before_B = state.lengths_B
        open_B = ~state.done_B
        state, right_B = _verify(
            logits_BTV,
            guesses_BK,
            counts_B,
            odds_BKV,
            most_B,
            state._replace(cache=cache),
            limits,
            rows,
            allowed_V,
            families,
            eos,
        )
        # What lies past the row's longest length could not be accepted.
        room_B = jnp.minimum(counts_B, limits.longest_B - before_B)
        return state, draft_cache, (guessed_B + jnp.where(open_B, room_B, 0), accepted_B + right_B)

    def more(carry):
        state = carry[0]
        # The row that has come least far decides, so that a look at the host comes after as many
        # tokens as elsewhere.
        behind_B = jnp.where(state.done_B, jnp.iinfo(jnp.int32).max, state.lengths_B - start_B)
        return ~state.done_B.all() & (behind_B.min() < chunks * CHUNK)

    nothing_B = jnp.zeros_like(most_B)
    return lax.while_loop(more, one_round, (state, draft_cache, (nothing_B, nothing_B)))


def look_up(tokens_BS, lengths_B, most_B, ngrams_B, most: int, ngrams: int):
    """(tokens (B, most), how many of them are guesses (B,)): what followed the first place where
    the last tokens stood before, of the longest n-gram, at most ``ngrams_B``, that did; as
    PromptLookupCandidateGenerator of transformers 5.
    """
    size = tokens_BS.shape[1]
    places = jnp.arange(size)
    start_B = jnp.zeros_like(lengths_B)  # 0: none found, since a token follows some n-gram
    same_BS = jnp.ones(tokens_BS.shape, bool)
    for n in range(1, min(ngrams, size - 1) + 1):
        # same_BS: the n tokens before a place are the row's last n.
        last_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(lengths_B - n, 0)[:, None], 1)
        same_BS &= (jnp.roll(tokens_BS, n, 1) == last_B1) & (places >= n)
        usable_BS = same_BS & (places < lengths_B[:, None]) & (n <= ngrams_B)[:, None]
        start_B = jnp.where(usable_BS.any(-1), jnp.argmax(usable_BS, -1), start_B)
    at_BK = start_B[:, None] + jnp.arange(most)
    counts_B = jnp.where(start_B > 0, jnp.minimum(most_B, lengths_B - start_B), 0)
    return jnp.take_along_axis(tokens_BS, jnp.minimum(at_BK, size - 1), 1), counts_B


def _draft(
    config, params, cache, state: State, limits: Limits, rows, allowed_V, most: int, families, eos
):
    """(guesses (B, most), their odds (B, most, V) where any row draws, the draft's cache with all
    of them)."""
    drawing = "temperature" in families.names

    def one(carry, _):
        cache, tokens_BS, lengths_B = carry
        at_B = jnp.minimum(lengths_B, tokens_BS.shape[1]) - 1
        last_B = jnp.take_along_axis(tokens_BS, at_B[:, None], 1)[:, 0]
        logits_BV, cache = step(config, params, cache, last_B, at_B)
        processed = process(
            logits_BV,
            rows,
            families,
            tokens_BS,
            lengths_B,
            limits.prompts_B,
            limits.longest_B,
            allowed_V,
            eos,
        )
        guess_B = jnp.argmax(processed, -1)
        odds_BV = ()
        if drawing:
            warped = warp(processed, rows, families)
            odds_BV = jax.nn.softmax(warped, -1)
            guess_B = jnp.where(
                rows.temperature > 0, draw(_keys(limits, lengths_B, DRAFT), odds_BV), guess_B
            )
        guess_B = guess_B.astype(jnp.int32)
        tokens_BS = tokens_BS.at[jnp.arange(len(guess_B)), lengths_B].set(guess_B, mode="drop")
        return (cache, tokens_BS, lengths_B + 1), (guess_B, odds_BV)

    # One more than is guessed, so that the draft has read its last guess if that is accepted, too.
    (cache, _, _), (guesses, odds) = lax.scan(
        one, (cache, state.tokens_BS, state.lengths_B), length=most + 1
    )
    return guesses[:most].T, odds[:most].swapaxes(0, 1) if drawing else None, cache


def _verify(
    logits_BTV,
    guesses_BK,
    counts_B,
    odds_BKV,
    most_B,
    state: State,
    limits: Limits,
    rows,
    allowed_V,
    families,
    eos,
):
    """(the state with what is accepted and the token after it, how many guesses stand)."""
    most = guesses_BK.shape[1]

    def one(carry, given):
        state, going_B, right_B = carry
        place, logits_BV = given
        guess_B = guesses_BK[:, jnp.minimum(place, most - 1)]
        guessed_B = (place < counts_B) & going_B
        odds_BV = None if odds_BKV is None else odds_BKV[:, jnp.minimum(place, most - 1)]
        decide = functools.partial(
            _decide,
            plain_B=most_B == 0,
            guess_B=guess_B,
            guessed_B=guessed_B,
            odds_BV=odds_BV,
            limits=limits,
            lengths_B=state.lengths_B,
        )
        open_B = going_B & ~state.done_B
        grown = append(
            logits_BV,
            state._replace(done_B=~open_B),
            limits,
            rows,
            allowed_V,
            families,
            eos,
            decide,
        )
        written_B = jnp.take_along_axis(grown.tokens_BS, grown.lengths_B[:, None] - 1, 1)[:, 0]
        hit_B = open_B & guessed_B & (written_B == guess_B)
        done_B = jnp.where(open_B, grown.done_B, state.done_B)
        return (grown._replace(done_B=done_B), hit_B & ~done_B, right_B + hit_B), None

    # The cache is not among what changes from place to place.
    light = state._replace(cache=())
    start = light, ~state.done_B, jnp.zeros_like(counts_B)
    (grown, _, right_B), _ = lax.scan(one, start, (jnp.arange(most + 1), logits_BTV.swapaxes(0, 1)))
    return grown._replace(cache=state.cache), right_B


def _decide(
    processed_BV,
    rows,
    families,
    keys_B,
    index_B,
    *,
    plain_B,
    guess_B,
    guessed_B,
    odds_BV,
    limits,
    lengths_B,
):
    """The token of each row: its guess where that is accepted, else the one instead of it. Rows
    that are ``plain`` never guess, and are written as in a batch of such rows."""
    best_B = jnp.argmax(processed_BV, -1)
    if "temperature" not in families.names:
        return best_B
    p_BV = jax.nn.softmax(warp(processed_BV, rows, families), -1)
    certain_BV = jax.nn.one_hot(
        guess_B, p_BV.shape[1]
    )  # a look-up has one guess, with probability 1
    q_BV = jnp.where(guessed_B[:, None], certain_BV if odds_BV is None else odds_BV, 0.0)

    def of_guess(x_BV):
        return jnp.take_along_axis(x_BV, guess_B[:, None], 1)[:, 0]

    uniform_B = jax.vmap(jax.random.uniform)(_keys(limits, lengths_B, ACCEPT))
    accepted_B = guessed_B & (uniform_B * of_guess(q_BV) < of_guess(p_BV))
    rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
    # To rounding, nothing may be left where p and q are the same.
    rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, p_BV)
    instead_B = draw(_keys(limits, lengths_B, INSTEAD), rest_BV)
    drawn_B = jnp.where(
        plain_B,
        choose(processed_BV, rows, families, keys_B, index_B),
        jnp.where(accepted_B, guess_B, instead_B),
    )
    return jnp.where(rows.temperature > 0, drawn_B, best_B)


def _keys(limits: Limits, lengths_B, purpose: int):
    """A key for each row's next place; other than generate's, whose places have the row's key with
    one number."""
    keys = jax.vmap(jax.random.fold_in)(limits.keys_B, lengths_B - limits.prompts_B)
    return jax.vmap(jax.random.fold_in, (0, None))(keys, purpose)
