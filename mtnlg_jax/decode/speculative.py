"""Speculative decoding: guess several tokens cheaply, verify them in one forward pass.

Leviathan 2023. Guesses come from the row itself (prompt lookup: what followed an earlier occurrence
of its last tokens) or from a draft model. At temperature 0 a guess is accepted if it is the best
token; otherwise with probability min(1, p / q), both processed and warped, and a rejected guess is
replaced by a draw from max(0, p - q). So greedy rows are the same as without guesses (where logits
differ by more than rounding, which another shape of a product may change), and drawn rows have the
same distribution, though other tokens for the same seed.

Every position is processed with the tokens before it, guesses included, so penalties, n-grams,
forced tokens, minimum lengths, stops and constraints act as they do without guesses. Shapes are
static: rejected tokens are simply not advanced over. It pays off where reading the weights takes
most of the time, which is at small batches.
"""

# Shapes: B rows, S positions (of a read: the last token and its guesses), V vocabulary, A guesses

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.config import DecodeConfig, ModelConfig
from mtnlg_jax.decode.batched_settings import Array, Settings
from mtnlg_jax.decode.cache import (
    Decoder,
    Prefix,
    bucket,
    prefill,
    read,
    split_cache,
    step,
    to_int8,
)
from mtnlg_jax.decode.processors import choose, draw, process, warp
from mtnlg_jax.decode.results import CHUNK
from mtnlg_jax.decode.sampling import Limits, State, append, split_state
from mtnlg_jax.parallel.auto import fetch

# Each position is decided once, by the tokens before it; these numbers keep its draws independent.
DRAFT = 1
ACCEPT = 2
INSTEAD = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guessing:
    """How many tokens each row guesses, and from what."""

    most_B: Array  # guesses a round at most; 0: none
    ngrams_B: Array  # longest n-gram to look up
    most: int = dataclasses.field(metadata={"static": True})  # the largest of ``most_B``
    ngrams: int = dataclasses.field(metadata={"static": True})  # the largest of ``ngrams_B``
    draft: ModelConfig | None = dataclasses.field(metadata={"static": True})  # None: look-up


class Speculation:
    """Guesses for a batch of rows, each with its own settings.

    ``advance`` takes the place of ``sampling.advance``; ``counts`` holds the tokens guessed and
    accepted, (B,) each.
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
        # A row never has room for more guesses than this.
        limit = decoder.context - 1
        most_B = np.array([min(getattr(config, name), limit) for config in configs], np.int32)
        ngrams_B = np.array([config.max_matching_ngram_size for config in configs], np.int32)
        self._guessing = Guessing(
            most_B,
            ngrams_B,
            most=int(most_B.max()),
            ngrams=int(ngrams_B[most_B > 0].max()) if draft is None else 0,
            draft=None if draft is None else draft.config,
        )
        self._draft_params: tuple = ()
        self._draft_cache: tuple = ()
        if draft is not None:
            self._draft_params = draft.params
            lengths = fetch(prefix.lengths_B)
            tokens = fetch(prefix.tokens_BS)
            prompts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
            # The draft reads the prompts itself: its keys and values are not the model's.
            cache = prefill(draft, prompts, bucket(prefix.tokens_BS.shape[1], draft.context)).cache
            # As many draft rows as rows, in the same order.
            self._draft_cache = _rows_of(cache, np.array(owners), int8=draft.int8_cache)
        self.counts = np.zeros((2, len(configs)), np.int32)

    def advance(
        self, params, state: State, limits: Limits, settings: Settings, chunks, *, config
    ) -> State:
        """Write at most ``chunks`` times CHUNK more tokens, plus what the last round accepts."""
        state, self._draft_cache, counts = _advance(
            params,
            self._draft_params,
            state,
            self._draft_cache,
            limits,
            settings,
            self._guessing,
            chunks,
            config=config,
        )
        self.counts = self.counts + np.stack([fetch(each) for each in counts])
        return state


@functools.partial(jax.jit, static_argnames="int8")
def _rows_of(cache, owners_B, *, int8: bool):
    """Return the rows ``owners_B`` of a draft's cache, in int8 if it holds that."""
    cache = to_int8(cache) if int8 else cache
    return split_cache(jax.tree.map(lambda x: x[owners_B], cache))


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("state", "draft_cache"))
def _advance(
    params,
    draft_params,
    state: State,
    draft_cache,
    limits: Limits,
    settings: Settings,
    guessing: Guessing,
    chunks,
    *,
    config: ModelConfig,
):
    start_B = state.lengths_B

    def one_round(carry):
        state, draft_cache, (guessed_B, accepted_B) = carry
        counts_B: Array
        # Static: look-up and draft model are two programs.
        if guessing.draft is None:
            guesses_BA, counts_B = look_up(state.tokens_BS, state.lengths_B, guessing)
            odds_BAV = None
        else:
            counts_B = guessing.most_B
            guesses_BA, odds_BAV, draft_cache = _draft(
                draft_params, draft_cache, state, limits, settings, guessing
            )
        # One pass reads the newest token and all guesses: the logits after each of them say what
        # should have come next.
        last_B1 = jnp.take_along_axis(state.tokens_BS, state.lengths_B[:, None] - 1, 1)
        read_BS = jnp.concatenate([last_B1, guesses_BA], 1)
        logits_BSV, cache = read(config, params, state.cache, read_BS, state.lengths_B - 1)
        before_B = state.lengths_B
        active_B = ~state.done_B
        state, right_B = _verify(
            logits_BSV,
            guesses_BA,
            counts_B,
            odds_BAV,
            state._replace(cache=cache),
            limits,
            settings,
            guessing,
        )
        # Guesses past the row's longest length could not be accepted, so do not count them.
        room_B = jnp.minimum(counts_B, limits.longest_B - before_B)
        guessed_B += jnp.where(active_B, room_B, 0)
        return state, draft_cache, (guessed_B, accepted_B + right_B)

    def more(carry):
        state = carry[0]
        # The slowest row decides, so that the host looks as often as without guesses.
        progress_B = state.lengths_B - start_B
        progress_B = jnp.where(state.done_B, jnp.iinfo(jnp.int32).max, progress_B)
        return ~state.done_B.all() & (progress_B.min() < chunks * CHUNK)

    nothing_B = jnp.zeros_like(guessing.most_B)
    start = state, draft_cache, (nothing_B, nothing_B)
    state, draft_cache, counts = lax.while_loop(more, one_round, start)
    return split_state(state), split_cache(draft_cache), counts


def look_up(tokens_BS, lengths_B, guessing: Guessing) -> tuple[jax.Array, jax.Array]:
    """Guess what followed the first earlier occurrence of each row's last tokens.

    Matches the longest n-gram, of at most ``ngrams_B`` tokens, that has one, as
    PromptLookupCandidateGenerator of transformers 5 does.

    Returns: tokens (B, A), how many of them are guesses (B,).
    """
    size = tokens_BS.shape[1]
    positions_1S = jnp.arange(size)[None, :]
    start_B = jnp.zeros_like(lengths_B)  # 0: no match, since a match has a token before it
    same_BS = jnp.ones(tokens_BS.shape, bool)
    for n in range(1, min(guessing.ngrams, size - 1) + 1):
        # same_BS: whether the n tokens before a position are the row's last n.
        last_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(lengths_B - n, 0)[:, None], 1)
        same_BS &= (jnp.roll(tokens_BS, n, 1) == last_B1) & (positions_1S >= n)
        long_B1 = (n <= guessing.ngrams_B)[:, None]
        usable_BS = same_BS & (positions_1S < lengths_B[:, None]) & long_B1
        # Longer n-grams come later and overwrite shorter ones; argmax takes the first occurrence.
        start_B = jnp.where(usable_BS.any(-1), jnp.argmax(usable_BS, -1), start_B)
    at_BA = start_B[:, None] + jnp.arange(guessing.most)[None, :]
    # What follows the match may end at the row's end, and then there are fewer guesses.
    counts_B = jnp.where(start_B > 0, jnp.minimum(guessing.most_B, lengths_B - start_B), 0)
    return jnp.take_along_axis(tokens_BS, jnp.minimum(at_BA, size - 1), 1), counts_B


def _draft(
    params, cache, state: State, limits: Limits, settings: Settings, guessing: Guessing
) -> tuple:
    """Let the draft model guess.

    Returns: guesses (B, A), their probabilities (B, A, V) where any row draws, else None, and the
    draft's cache with all guesses.
    """
    drawing = settings.uses("temperature")
    draft_config = guessing.draft
    assert draft_config is not None, "look_up guesses where there is no draft model"

    def one(carry, _):
        cache, tokens_BS, lengths_B = carry
        # Guesses may run past the context; they cannot be accepted, but must not read outside the
        # arrays.
        at_B = jnp.minimum(lengths_B, tokens_BS.shape[1]) - 1
        last_B = jnp.take_along_axis(tokens_BS, at_B[:, None], 1)[:, 0]
        logits_BV, cache = step(draft_config, params, cache, last_B, at_B)
        # Processed like the model's own logits: a guess that is forbidden could never be accepted.
        processed_BV = process(
            logits_BV, settings, tokens_BS, lengths_B, limits.prompts_B, limits.longest_B
        )
        guess_B = jnp.argmax(processed_BV, -1)
        odds_BV: jax.Array | tuple[()] = ()
        if drawing:
            # q of the acceptance rule is the distribution that the guess was really drawn from.
            odds_BV = jax.nn.softmax(warp(processed_BV, settings), -1)
            drawn_B = draw(_keys(limits, lengths_B, DRAFT), odds_BV)
            guess_B = jnp.where(settings.rows.temperature > 0, drawn_B, guess_B)
        guess_B = guess_B.astype(jnp.int32)
        tokens_BS = tokens_BS.at[jnp.arange(len(guess_B)), lengths_B].set(guess_B, mode="drop")
        return (cache, tokens_BS, lengths_B + 1), (guess_B, odds_BV)

    # One step more than guesses, so that the cache holds the last guess in case it is accepted.
    start = cache, state.tokens_BS, state.lengths_B
    (cache, _, _), (guesses, odds) = lax.scan(one, start, length=guessing.most + 1)
    odds_BAV = odds[: guessing.most].swapaxes(0, 1) if drawing else None
    return guesses[: guessing.most].T, odds_BAV, cache


def _verify(
    logits_BSV,
    guesses_BA,
    counts_B,
    odds_BAV,
    state: State,
    limits: Limits,
    settings: Settings,
    guessing: Guessing,
) -> tuple[State, jax.Array]:
    """Append the accepted guesses and one token after them; count the accepted ones."""
    most = guesses_BA.shape[1]

    def one(carry, given):
        state, going_B, right_B = carry
        index, logits_BV = given
        # The token after the last guess has no guess of its own: read the last one, unused.
        column = jnp.minimum(index, most - 1)
        guess_B = guesses_BA[:, column]
        # Once a guess is rejected, the tokens behind it were read after a wrong token, and count no
        # more.
        guessed_B = (index < counts_B) & going_B
        decide = functools.partial(
            _decide,
            plain_B=guessing.most_B == 0,
            guess_B=guess_B,
            guessed_B=guessed_B,
            odds_BV=None if odds_BAV is None else odds_BAV[:, column],
            keys_of=functools.partial(_keys, limits, state.lengths_B),
        )
        active_B = going_B & ~state.done_B
        # Rows that are not active are marked as done for this call only, so that they write
        # nothing.
        grown = append(logits_BV, state._replace(done_B=~active_B), limits, settings, decide)
        written_B = jnp.take_along_axis(grown.tokens_BS, grown.lengths_B[:, None] - 1, 1)[:, 0]
        # Compared with what was written. A replacement never equals the guess, since max(0, p - q)
        # is 0 there.
        hit_B = active_B & guessed_B & (written_B == guess_B)
        done_B = jnp.where(active_B, grown.done_B, state.done_B)
        return (grown._replace(done_B=done_B), hit_B & ~done_B, right_B + hit_B), None

    # The cache does not change between positions, so keep it out of the scan.
    light = state._replace(cache=())
    start = light, ~state.done_B, jnp.zeros_like(counts_B)
    inputs = jnp.arange(most + 1), logits_BSV.swapaxes(0, 1)
    (grown, _, right_B), _ = lax.scan(one, start, inputs)
    return grown._replace(cache=state.cache), right_B


def _decide(
    processed_BV,
    settings: Settings,
    keys_B,
    index_B,
    *,
    plain_B,
    guess_B,
    guessed_B,
    odds_BV,
    keys_of,
) -> jax.Array:
    """Return each row's guess if it is accepted, else the token that replaces it.

    Rows that are ``plain`` never guess, and draw as in a batch without guesses.
    """
    # Greedy: the guess is accepted exactly if it equals this.
    best_B = jnp.argmax(processed_BV, -1)
    if not settings.uses("temperature"):
        return best_B
    p_BV = jax.nn.softmax(warp(processed_BV, settings), -1)
    # A look-up makes its one guess with probability 1.
    certain_BV = jax.nn.one_hot(guess_B, p_BV.shape[1])
    q_BV = jnp.where(guessed_B[:, None], certain_BV if odds_BV is None else odds_BV, 0.0)

    def of_guess(x_BV):
        return jnp.take_along_axis(x_BV, guess_B[:, None], 1)[:, 0]

    uniform_B = jax.vmap(jax.random.uniform)(keys_of(ACCEPT))
    # u q < p is u < p / q without a division, and never true where p is 0.
    accepted_B = guessed_B & (uniform_B * of_guess(q_BV) < of_guess(p_BV))
    # max(0, p - q), not normalized: `draw` takes odds. Without a guess q is 0 and this is p.
    rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
    # Rounding may leave nothing where p and q are equal.
    rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, p_BV)
    instead_B = draw(keys_of(INSTEAD), rest_BV)
    # The same key as without speculation, so that these rows repeat exactly.
    plainly_B = choose(processed_BV, settings, keys_B, index_B)
    drawn_B = jnp.where(plain_B, plainly_B, jnp.where(accepted_B, guess_B, instead_B))
    return jnp.where(settings.rows.temperature > 0, drawn_B, best_B)


def _keys(limits: Limits, lengths_B, purpose: int) -> jax.Array:
    """Return a key for each row's next position and ``purpose``.

    Two folds keep it apart from the keys of ``processors.choose``, which have one.
    """
    keys = jax.vmap(jax.random.fold_in)(limits.keys_B, lengths_B - limits.prompts_B)
    return jax.vmap(jax.random.fold_in, (0, None))(keys, purpose)
