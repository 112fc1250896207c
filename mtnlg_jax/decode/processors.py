"""The steps between the model's logits and the next token: pure functions, every value one a row.

Order and definitions follow Hugging Face's logits processors (transformers 5); the presence and
frequency penalties follow OpenAI's API, and DRY is in dry.py. See batched_settings.py for what is
static.
"""

# Shapes: B rows, S positions, V vocabulary, E entries of a table, U blocks of ids, I ids of a block

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from mtnlg_jax.decode import dry
from mtnlg_jax.decode.batched_settings import LAST, Rows, Settings, ends_of, matches, tails

NEG_INF = -jnp.inf
DRAW_BLOCK = 256  # about the square root of a vocabulary


def process(logits_BV, settings: Settings, tokens_BS, lengths_B, prompts_B, longest_B) -> jax.Array:
    """Apply everything that comes before sampling, which greedy rows and beams need as well.

    Args:
      logits_BV: float32; for beams log-probabilities, as in Hugging Face.
      tokens_BS: known up to ``lengths_B``; the first ``prompts_B`` are the prompt.
      longest_B: the length at which the row must end.
    """
    rows = settings.rows
    vocabulary = logits_BV.shape[1]
    positions_1S = jnp.arange(tokens_BS.shape[1])[None, :]
    # Arrays have the size of the cache; behind a row's length is padding, or guesses that do not
    # count.
    known_BS = positions_1S < lengths_B[:, None]
    new_B = lengths_B - prompts_B

    def bias(logits_BV):
        return logits_BV + biases(rows, tokens_BS, lengths_B, new_B, vocabulary)

    def repeat(logits_BV):
        # The prompt counts as well, unlike for presence and frequency.
        seen_BV = counts(tokens_BS, known_BS, vocabulary) > 0
        return repetition(logits_BV, seen_BV, rows.repetition_penalty)

    def penalize(logits_BV):
        counts_BV = counts(tokens_BS, known_BS & (positions_1S >= prompts_B[:, None]), vocabulary)
        return presence_frequency(
            logits_BV, counts_BV, rows.presence_penalty, rows.frequency_penalty
        )

    def dry_penalty(logits_BV):
        return dry.penalize(logits_BV, rows, tokens_BS, lengths_B)

    def block_ngrams(logits_BV):
        if settings.static_options.skips:
            most = max(settings.static_options.ngrams)
            return no_repeat_ngrams(
                logits_BV, tokens_BS, lengths_B, rows.no_repeat_ngram_size, most
            )
        for n in settings.static_options.ngrams:
            logits_BV = no_repeat_ngram(
                logits_BV, tokens_BS, lengths_B, n, rows.no_repeat_ngram_size == n
            )
        return logits_BV

    logits_BV = where_used(settings, ("bias",), bias, logits_BV)
    logits_BV = where_used(settings, ("repetition_penalty",), repeat, logits_BV)
    penalties = ("presence_penalty", "frequency_penalty")
    logits_BV = where_used(settings, penalties, penalize, logits_BV)
    logits_BV = where_used(settings, ("dry_multiplier",), dry_penalty, logits_BV)
    logits_BV = where_used(settings, ("no_repeat_ngram_size",), block_ngrams, logits_BV)
    ends_BV = one_hot(ends_of(settings), vocabulary)
    if settings.uses("min_new_tokens", "min_length"):
        # min_length counts the prompt, min_new_tokens does not.
        early_B = (new_B < rows.min_new_tokens) | (lengths_B < rows.min_length)
        logits_BV = jnp.where(early_B[:, None] & ends_BV, NEG_INF, logits_BV)
    constraint = settings.static_options.constraint
    if constraint is not None:
        logits_BV = jnp.where(constraint(tokens_BS, lengths_B, prompts_B), logits_BV, NEG_INF)
    # Late, so that no bias can bring back what must not be written.
    logits_BV = jnp.where(settings.allowed_V[None, :] | ends_BV, logits_BV, NEG_INF)

    def force(logits_BV):
        # LAST is the position where the row must end, which may be the end of the context.
        last_B1 = (longest_B - prompts_B)[:, None] - 1
        at_BE = jnp.where(rows.forced_at == LAST, last_B1, rows.forced_at)
        now_BE = at_BE == new_B[:, None]
        forced_BV = one_hot(jnp.where(now_BE, rows.forced_token, -1), vocabulary)
        only_forced_BV = jnp.where(forced_BV, 0.0, NEG_INF)
        return jnp.where(now_BE.any(-1)[:, None], only_forced_BV, logits_BV)

    # Last: a forced token wins over everything that forbids it.
    return where_used(settings, ("forced",), force, logits_BV)


def warp(logits_BV, settings: Settings) -> jax.Array:
    """Apply the temperature and the filters of sampling, in Hugging Face's order."""
    logits_BV = temper(logits_BV, settings.rows.temperature)
    for name, function in WARPERS:
        value_B = getattr(settings.rows, name)
        logits_BV = where_used(
            settings, (name,), lambda x, f=function, v=value_B: f(x, v), logits_BV
        )
    return logits_BV


def where_used(settings: Settings, names: tuple[str, ...], function: Callable, x) -> jax.Array:
    """Return ``function(x)`` if a row uses one of the options ``names``, else ``x``.

    The choice is made while compiling, or in every step where the program has all options
    (``skips`` of `StaticOptions`): a sort of a vocabulary that no row wants costs as much as a
    layer.
    """
    if not settings.uses(*names):
        return x
    if not settings.static_options.skips:
        return function(x)
    used = [settings.differs(name) for name in names]
    return lax.cond(jnp.stack(used).any(), function, lambda x: x, x)


def choose(logits_BV, settings: Settings, keys_B, index_B) -> jax.Array:
    """Choose the next token of each row from processed logits.

    Takes the best token where the temperature is 0, and draws one with
    fold_in(row's key, ``index_B``) elsewhere, so that a row's draws do not depend on its neighbors
    or on where chunks end.
    """
    best_B = jnp.argmax(logits_BV, -1)
    if not settings.uses("temperature"):
        return best_B

    def drawn(logits_BV):
        keys = jax.vmap(jax.random.fold_in)(keys_B, index_B)
        drawn_B = draw(keys, jax.nn.softmax(warp(logits_BV, settings), -1))
        return jnp.where(settings.rows.temperature > 0, drawn_B, best_B)

    if not settings.static_options.skips:
        return drawn(logits_BV)
    return lax.cond(settings.differs("temperature"), drawn, lambda x: best_B, logits_BV)


def draw(keys_B, odds_BV) -> jax.Array:
    """Draw one id a row with probability proportional to its odds (0 or more).

    First draws the block of ids, then the id within it. That takes two random numbers and one pass
    over the row; a Gumbel for each id takes a fifth of a GPT-2 step on a CPU.
    """
    batch, vocabulary = odds_BV.shape
    # Padding has odds 0 and is never drawn.
    padded_BV = jnp.pad(odds_BV, ((0, 0), (0, -vocabulary % DRAW_BLOCK)))
    odds_BUI = padded_BV.reshape(batch, -1, DRAW_BLOCK)
    shares_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    # P(block) x P(id | block) is the probability of the id.
    block_B = inverse_cdf(odds_BUI.sum(-1), shares_B2[:, 0])
    odds_BI = jnp.take_along_axis(odds_BUI, block_B[:, None, None], 1)[:, 0]
    return block_B * DRAW_BLOCK + inverse_cdf(odds_BI, shares_B2[:, 1])


def inverse_cdf(odds_BI, share_B) -> jax.Array:
    """Return the first entry at which the cumulative odds exceed a share in [0, 1) of their sum.

    Never returns an entry with odds 0.
    """
    sums_BI = jnp.cumsum(odds_BI, -1)
    passed_BI = (sums_BI > share_B[:, None] * sums_BI[:, -1:]) & (odds_BI > 0)
    # Rounding may leave no entry above the threshold: take the largest.
    return jnp.where(passed_BI.any(-1), jnp.argmax(passed_BI, -1), jnp.argmax(odds_BI, -1))


def one_hot(ids_BE, vocabulary: int) -> jax.Array:
    """Return which ids a row names, (B, V); ids below 0 are padding."""
    return (ids_BE[:, :, None] == jnp.arange(vocabulary)[None, None, :]).any(1)


def biases(rows: Rows, tokens_BS, lengths_B, new_B, vocabulary: int) -> jax.Array:
    """Return the bias of each logit, (B, V), from single tokens and from sequences that the token
    would complete; -inf for tokens that may not be written. Biases of one token add up."""
    on_BE = matches(rows.bias_before, tails(tokens_BS, lengths_B, rows.bias_before.shape[-1]))
    on_BE &= ~rows.bias_first | (new_B == 0)[:, None]
    at = jnp.arange(tokens_BS.shape[0])[:, None], rows.bias_token
    return jnp.zeros((tokens_BS.shape[0], vocabulary)).at[at].add(jnp.where(on_BE, rows.bias, 0.0))


def counts(tokens_BS, counted_BS, vocabulary: int) -> jax.Array:
    """Count each token at the positions marked in ``counted_BS``: int32 (B, V)."""
    batch = tokens_BS.shape[0]
    rows_B1 = jnp.arange(batch)[:, None]
    zeros_BV = jnp.zeros((batch, vocabulary), jnp.int32)
    return zeros_BV.at[rows_B1, tokens_BS].add(counted_BS)


def repetition(logits_BV, seen_BV, penalty_B):
    """Divide positive and multiply negative logits of tokens seen, also in the prompt (Keskar
    2019)."""
    penalty_B1 = penalty_B[:, None]
    penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def presence_frequency(logits_BV, counts_BV, presence_B, frequency_B):
    """Subtract presence once, and frequency for each time that a token was generated."""
    return logits_BV - presence_B[:, None] * (counts_BV > 0) - frequency_B[:, None] * counts_BV


def no_repeat_ngram(logits_BV, tokens_BS, lengths_B, n: int, on_B):
    """Forbid every token that would complete an n-gram already in the row, prompt included."""
    batch, size = tokens_BS.shape
    if size < n:
        return logits_BV
    starts = jnp.arange(size - n + 1)
    grams = tokens_BS[:, starts[:, None] + jnp.arange(n)[None, :]]  # (B, grams, n)
    # A row shorter than n - 1 reads position 0 again; no n-gram of it is known, so nothing matches.
    tail_at = jnp.maximum(lengths_B[:, None] - (n - 1) + jnp.arange(n - 1)[None, :], 0)
    tail = jnp.take_along_axis(tokens_BS, tail_at, 1)
    # The whole n-gram must lie within the known tokens.
    known = starts[None, :] + n <= lengths_B[:, None]
    # Its first n - 1 tokens equal the row's last ones, so its last token would complete a
    # repetition.
    hit = (grams[:, :, : n - 1] == tail[:, None]).all(-1) & known & on_B[:, None]
    return jnp.where(counts(grams[:, :, -1], hit, logits_BV.shape[1]) > 0, NEG_INF, logits_BV)


def no_repeat_ngrams(logits_BV, tokens_BS, lengths_B, n_B, most: int):
    """Do the same with a size for each row, 0 to ``most``, of which 0 forbids nothing."""
    positions_1S = jnp.arange(tokens_BS.shape[1])[None, :]
    # Whether the tokens before a position are the row's last ones, one more each time.
    same_BS = jnp.ones(tokens_BS.shape, bool)
    for back in range(1, min(most, tokens_BS.shape[1])):
        last_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(lengths_B - back, 0)[:, None], 1)
        alike_BS = (jnp.roll(tokens_BS, back, 1) == last_B1) & (positions_1S >= back)
        same_BS &= alike_BS | (back >= n_B)[:, None]
    hit_BS = same_BS & (positions_1S < lengths_B[:, None]) & (n_B > 0)[:, None]
    return jnp.where(counts(tokens_BS, hit_BS, logits_BV.shape[1]) > 0, NEG_INF, logits_BV)


def temper(logits_BV, temperature_B):
    # Greedy rows share the program: their temperature of 0 becomes 1, and their draw is dropped.
    return logits_BV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]


def top_k(logits_BV, k_B):
    """Keep the k best and all that equal the k-th; 0 keeps all."""
    k_B = jnp.clip(k_B, 0, logits_BV.shape[1])
    # Sorting and not top_k, because k differs from row to row.
    worst = jnp.take_along_axis(
        jnp.sort(logits_BV, -1, descending=True), jnp.maximum(k_B - 1, 0)[:, None], 1
    )
    return jnp.where((k_B[:, None] > 0) & (logits_BV < worst), NEG_INF, logits_BV)


def top_p(logits_BV, p_B):
    """Keep the smallest set of best tokens whose probability reaches p (Holtzman 2019).

    Cuts as Hugging Face does: drops tokens where the ascending cumulative sum is at most 1 - p, but
    never the best.
    """
    # Ascending, so that the cut is where the sum from the worst token on passes 1 - p.
    order = jnp.argsort(logits_BV, -1)
    below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits_BV, order, -1), -1), -1)
    drop = (below <= 1 - p_B[:, None]).at[:, -1].set(False)
    # Back to the order of ids.
    drop = jnp.put_along_axis(jnp.zeros_like(drop), order, drop, -1, inplace=False)
    return jnp.where(drop & (p_B[:, None] < 1), NEG_INF, logits_BV)


def min_p(logits_BV, p_B):
    """Drop tokens less probable than p times the best."""
    probability = jax.nn.softmax(logits_BV, -1)
    return jnp.where(
        probability < p_B[:, None] * probability.max(-1, keepdims=True), NEG_INF, logits_BV
    )


def typical(logits_BV, p_B):
    """Keep the tokens whose surprisal is closest to the entropy, up to probability p (Meister
    2022)."""
    log_p = jax.nn.log_softmax(logits_BV, -1)
    # -inf x 0 would be NaN; the limit of p log p is 0.
    entropy = -jnp.where(log_p == NEG_INF, 0.0, log_p * jnp.exp(log_p)).sum(-1, keepdims=True)
    distance = jnp.abs(-log_p - entropy)
    order = jnp.argsort(distance, -1)
    mass = jnp.cumsum(jnp.exp(jnp.take_along_axis(log_p, order, -1)), -1)
    # The first entry that reaches p still counts.
    last = jnp.minimum((mass < p_B[:, None]).sum(-1), logits_BV.shape[1] - 1)
    farthest = jnp.take_along_axis(distance, jnp.take_along_axis(order, last[:, None], -1), -1)
    return jnp.where((distance > farthest) & (p_B[:, None] < 1), NEG_INF, logits_BV)


def epsilon(logits_BV, cutoff_B):
    """Drop tokens less probable than the cutoff, but never the best (Hewitt 2022)."""
    return _above(logits_BV, jax.nn.softmax(logits_BV, -1), cutoff_B[:, None])


def eta(logits_BV, cutoff_B):
    """Drop tokens less probable than min(cutoff, sqrt(cutoff) * exp(-entropy)), but never the best
    (Hewitt 2022)."""
    log_p = jax.nn.log_softmax(logits_BV, -1)
    entropy = -jnp.where(log_p == NEG_INF, 0.0, log_p * jnp.exp(log_p)).sum(-1, keepdims=True)
    cutoff = cutoff_B[:, None]
    return _above(
        logits_BV, jnp.exp(log_p), jnp.minimum(cutoff, jnp.sqrt(cutoff) * jnp.exp(-entropy))
    )


def _above(logits_BV, probability_BV, least):
    best = logits_BV == logits_BV.max(-1, keepdims=True)
    return jnp.where((probability_BV < least) & ~best, NEG_INF, logits_BV)


WARPERS = (
    ("top_k", top_k),
    ("top_p", top_p),
    ("min_p", min_p),
    ("typical_p", typical),
    ("epsilon_cutoff", epsilon),
    ("eta_cutoff", eta),
)
