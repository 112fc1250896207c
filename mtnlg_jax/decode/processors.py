"""What stands between the model's logits and the next token. Pure functions; every value is one a
row.

Order and definitions follow Hugging Face's logits processors (transformers 5), the presence and
frequency penalties OpenAI's API. What is static and what is not: rows.py.
"""

import jax
import jax.numpy as jnp

from mtnlg_jax.decode.batched_settings import (
    LAST,
    Families,
    Rows,
    ends_of,
    matches,
    rows_and_families,
    tails,
)

__all__ = ["Families", "Rows", "choose", "draw", "process", "rows_and_families", "warp"]

NEG_INF = -jnp.inf
DRAW_BLOCK = 256  # about the root of a vocabulary


def process(
    logits_BV,
    rows: Rows,
    families: Families,
    tokens_BS,
    lengths_B,
    prompts_B,
    longest_B,
    allowed_V,
    eos: int,
):
    """Everything before sampling, so for greedy rows and beams too.

    Args:
      logits_BV: float32; of beams their log-probabilities, as Hugging Face has it.
      tokens_BS: known up to ``lengths_B``; the prompt's up to ``prompts_B``; ``longest_B`` is where
          the row must end.
      allowed_V: which ids are ever written; a row's own ends are, whatever it says.
      eos: the end of rows that name none.
    """
    vocabulary = logits_BV.shape[1]
    positions = jnp.arange(tokens_BS.shape[1])
    known_BS = positions < lengths_B[:, None]
    new_B = lengths_B - prompts_B
    if "bias" in families.names:
        logits_BV = logits_BV + biases(rows, tokens_BS, lengths_B, new_B, vocabulary)
    if "repetition_penalty" in families.names:
        seen_BV = counts(tokens_BS, known_BS, vocabulary) > 0
        logits_BV = repetition(logits_BV, seen_BV, rows.repetition_penalty)
    if families.names & {"presence_penalty", "frequency_penalty"}:
        counts_BV = counts(tokens_BS, known_BS & (positions >= prompts_B[:, None]), vocabulary)
        logits_BV = presence_frequency(
            logits_BV, counts_BV, rows.presence_penalty, rows.frequency_penalty
        )
    for n in families.ngrams:
        logits_BV = no_repeat_ngram(
            logits_BV, tokens_BS, lengths_B, n, rows.no_repeat_ngram_size == n
        )
    ends_BV = one_hot(ends_of(rows, families, eos), vocabulary)
    if families.names & {"min_new_tokens", "min_length"}:
        early_B = (new_B < rows.min_new_tokens) | (lengths_B < rows.min_length)
        logits_BV = jnp.where(early_B[:, None] & ends_BV, NEG_INF, logits_BV)
    if families.constraint is not None:
        logits_BV = jnp.where(
            families.constraint(tokens_BS, lengths_B, prompts_B), logits_BV, NEG_INF
        )
    logits_BV = jnp.where(allowed_V | ends_BV, logits_BV, NEG_INF)
    if "forced" in families.names:
        # The last place is where the row must end, which the room behind the prompt may decide.
        at_BF = jnp.where(
            rows.forced_at == LAST, (longest_B - prompts_B)[:, None] - 1, rows.forced_at
        )
        now_BF = at_BF == new_B[:, None]
        forced_BV = one_hot(jnp.where(now_BF, rows.forced_token, -1), vocabulary)
        logits_BV = jnp.where(
            now_BF.any(-1)[:, None], jnp.where(forced_BV, 0.0, NEG_INF), logits_BV
        )
    return logits_BV


def warp(logits_BV, rows: Rows, families: Families):
    """What sampling adds, in Hugging Face's order."""
    logits_BV = temper(logits_BV, rows.temperature)
    for name, function in WARPERS:
        if name in families.names:
            logits_BV = function(logits_BV, getattr(rows, name))
    return logits_BV


def choose(logits_BV, rows: Rows, families: Families, keys_B, index_B):
    """The next token of each row from processed logits: the best where the temperature is 0, else
    one drawn with key fold_in(row's key, ``index_B``): neither neighbours nor chunks change a row's
    draw."""
    best_B = jnp.argmax(logits_BV, -1)
    if "temperature" not in families.names:
        return best_B
    keys = jax.vmap(jax.random.fold_in)(keys_B, index_B)
    drawn_B = draw(keys, jax.nn.softmax(warp(logits_BV, rows, families), -1))
    return jnp.where(rows.temperature > 0, drawn_B, best_B)


def draw(keys_B, odds_BV):
    """One id a row, with probabilities in proportion to its odds, 0 or more: the block of ids in
    which a random share of all odds is reached, then the id in which another share of the block's
    is. Two random numbers and a pass over the row, where a Gumbel for each id takes as long, on a
    CPU, as a fifth of a step of GPT-2."""
    batch, vocabulary = odds_BV.shape
    odds_BMN = jnp.pad(odds_BV, ((0, 0), (0, -vocabulary % DRAW_BLOCK))).reshape(
        batch, -1, DRAW_BLOCK
    )
    shares_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    block_B = _reach(odds_BMN.sum(-1), shares_B2[:, 0])
    odds_BN = jnp.take_along_axis(odds_BMN, block_B[:, None, None], 1)[:, 0]
    return block_B * DRAW_BLOCK + _reach(odds_BN, shares_B2[:, 1])


def _reach(odds_BN, share_B):
    """The first entry with which a share, 0 to below 1, of the row's sum is passed; one of odds 0
    never is."""
    sums_BN = jnp.cumsum(odds_BN, -1)
    passed_BN = (sums_BN > share_B[:, None] * sums_BN[:, -1:]) & (odds_BN > 0)
    # Sums round: should none pass, it is for the last bit.
    return jnp.where(passed_BN.any(-1), jnp.argmax(passed_BN, -1), jnp.argmax(odds_BN, -1))


def one_hot(ids_BM, vocabulary: int):
    """Which ids a row names, (B, V); ids below 0 are none."""
    return (ids_BM[:, :, None] == jnp.arange(vocabulary)).any(1)


def biases(rows: Rows, tokens_BS, lengths_B, new_B, vocabulary: int):
    """What is added to each logit, (B, V): of single tokens, of sequences about to be completed,
    and -inf for what is never written. Biases of one token add up."""
    on_BM = matches(rows.bias_before, tails(tokens_BS, lengths_B, rows.bias_before.shape[-1]))
    on_BM &= ~rows.bias_first | (new_B == 0)[:, None]
    at = jnp.arange(tokens_BS.shape[0])[:, None], rows.bias_token
    return jnp.zeros((tokens_BS.shape[0], vocabulary)).at[at].add(jnp.where(on_BM, rows.bias, 0.0))


def counts(tokens_BS, counted_BS, vocabulary: int):
    """How often each token stands at the counted positions, int32 (B, V)."""
    rows = jnp.arange(tokens_BS.shape[0])[:, None]
    return (
        jnp.zeros((tokens_BS.shape[0], vocabulary), jnp.int32).at[rows, tokens_BS].add(counted_BS)
    )


def repetition(logits_BV, seen_BV, penalty_B):
    """Divides positive and multiplies negative logits of the tokens seen, prompt included (Keskar
    2019)."""
    penalty = penalty_B[:, None]
    return jnp.where(
        seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV
    )


def presence_frequency(logits_BV, counts_BV, presence_B, frequency_B):
    """Subtracts presence once and frequency each time that a token was generated."""
    return logits_BV - presence_B[:, None] * (counts_BV > 0) - frequency_B[:, None] * counts_BV


def no_repeat_ngram(logits_BV, tokens_BS, lengths_B, n: int, on_B):
    """Forbids every token that would complete an n-gram which the row, prompt included, already
    holds."""
    batch, size = tokens_BS.shape
    if size < n:
        return logits_BV
    grams = tokens_BS[:, jnp.arange(size - n + 1)[:, None] + jnp.arange(n)]  # (B, grams, n)
    tail_at = jnp.maximum(lengths_B[:, None] - (n - 1) + jnp.arange(n - 1), 0)
    tail = jnp.take_along_axis(tokens_BS, tail_at, 1)
    known = jnp.arange(size - n + 1) + n <= lengths_B[:, None]
    hit = (grams[:, :, : n - 1] == tail[:, None]).all(-1) & known & on_B[:, None]
    return jnp.where(counts(grams[:, :, -1], hit, logits_BV.shape[1]) > 0, NEG_INF, logits_BV)


def temper(logits_BV, temperature_B):
    return logits_BV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]


def top_k(logits_BV, k_B):
    """Keeps the k best, and what equals the k-th; 0 keeps all."""
    k_B = jnp.clip(k_B, 0, logits_BV.shape[1])
    worst = jnp.take_along_axis(
        jnp.sort(logits_BV, -1, descending=True), jnp.maximum(k_B - 1, 0)[:, None], 1
    )
    return jnp.where((k_B[:, None] > 0) & (logits_BV < worst), NEG_INF, logits_BV)


def top_p(logits_BV, p_B):
    """Keeps the fewest best tokens whose probability reaches p (Holtzman 2019), cut as Hugging Face
    does it: drops where the ascending cumulative sum is at most 1 - p, never the best."""
    order = jnp.argsort(logits_BV, -1)
    below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits_BV, order, -1), -1), -1)
    drop = (below <= 1 - p_B[:, None]).at[:, -1].set(False)
    drop = jnp.put_along_axis(jnp.zeros_like(drop), order, drop, -1, inplace=False)
    return jnp.where(drop & (p_B[:, None] < 1), NEG_INF, logits_BV)


def min_p(logits_BV, p_B):
    """Drops tokens less probable than p times the best."""
    probability = jax.nn.softmax(logits_BV, -1)
    return jnp.where(
        probability < p_B[:, None] * probability.max(-1, keepdims=True), NEG_INF, logits_BV
    )


def typical(logits_BV, p_B):
    """Keeps the tokens whose surprise is nearest to the entropy, up to probability p (Meister
    2022)."""
    log_p = jax.nn.log_softmax(logits_BV, -1)
    entropy = -jnp.where(log_p == NEG_INF, 0.0, log_p * jnp.exp(log_p)).sum(-1, keepdims=True)
    distance = jnp.abs(-log_p - entropy)
    order = jnp.argsort(distance, -1)
    mass = jnp.cumsum(jnp.exp(jnp.take_along_axis(log_p, order, -1)), -1)
    last = jnp.minimum((mass < p_B[:, None]).sum(-1), logits_BV.shape[1] - 1)
    farthest = jnp.take_along_axis(distance, jnp.take_along_axis(order, last[:, None], -1), -1)
    return jnp.where((distance > farthest) & (p_B[:, None] < 1), NEG_INF, logits_BV)


def epsilon(logits_BV, cutoff_B):
    """Drops tokens less probable than the cutoff, never the best (Hewitt 2022)."""
    return _above(logits_BV, jax.nn.softmax(logits_BV, -1), cutoff_B[:, None])


def eta(logits_BV, cutoff_B):
    """Drops tokens less probable than min(cutoff, sqrt(cutoff) * exp(-entropy)), never the best
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
