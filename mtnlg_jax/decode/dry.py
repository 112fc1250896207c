"""DRY ("don't repeat yourself"): a penalty that grows with the length of a repetition.

The definition is that of its author (p-e-w, text-generation-webui, pull request 5677), which
llama.cpp has under the same names. Let n be the length of the longest match: tokens that end the
row and also stand somewhere before a token x. Then x would continue a repetition of n tokens. If n
is dry_allowed_length or more, the logit of x loses

    dry_multiplier * dry_base ** (n - dry_allowed_length).

A match does not go back past a breaker, nor past the last dry_penalty_last_n tokens, and has at
most LONGEST tokens. A breaker itself is never penalized. Here a breaker is one token whose text
contains one of the strings; llama.cpp also finds strings that go over several tokens.
"""

# Shapes: B rows, S positions, V vocabulary, W words of 32 ids

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.decode.batched_settings import Rows

# As in the original. With it the power stays in range, and so does the work of a step.
LONGEST = 50
# Larger penalties are cut to this, so that they do not become infinite.
MOST = 1e30


@functools.lru_cache(32)
def breaker_bits(tokenizer, vocabulary: int, strings: tuple[str, ...]) -> np.ndarray:
    """Return a bit for each of ``vocabulary`` ids, uint32 (W,): whether its text contains one of
    ``strings``."""
    texts = [text.encode() for text in strings]
    bits = np.zeros(-(-vocabulary // 32) * 32, bool)
    for token in range(min(tokenizer.vocab_size, vocabulary)):
        piece = tokenizer.token_bytes(token)
        bits[token] = any(text in piece for text in texts)
    return np.packbits(bits, bitorder="little").view("<u4")


def penalize(logits_BV, rows: Rows, tokens_BS, lengths_B) -> jax.Array:
    """Subtract the penalty of each row from the tokens that would continue a repetition.

    ``tokens_BS`` is known up to ``lengths_B``; the prompt counts.
    """
    positions_1S = jnp.arange(tokens_BS.shape[1])[None, :]
    breaks_BS = _has_bit(rows.breakers, tokens_BS)
    # The first token that counts.
    first_B = jnp.maximum(lengths_B - rows.dry_penalty_last_n, 0)
    first_B1 = jnp.where(rows.dry_penalty_last_n < 0, 0, first_B)[:, None]

    def more(carry):
        back, same_BS, _ = carry
        return (back <= LONGEST) & same_BS.any()

    def one(carry):
        back, same_BS, matched_BS = carry
        # The token ``back`` before the row's end, and those ``back`` before each position.
        last_B1 = jnp.maximum(lengths_B - back, 0)[:, None]
        alike_BS = jnp.roll(tokens_BS, back, 1) == jnp.take_along_axis(tokens_BS, last_B1, 1)
        within_BS = positions_1S - back >= first_B1
        unbroken_B1 = ~jnp.take_along_axis(breaks_BS, last_B1, 1)
        same_BS &= alike_BS & within_BS & unbroken_B1
        return back + 1, same_BS, matched_BS + same_BS

    known_BS = (positions_1S < lengths_B[:, None]) & ~breaks_BS & (rows.dry_multiplier > 0)[:, None]
    start = jnp.int32(1), known_BS, jnp.zeros(tokens_BS.shape, jnp.int32)
    _, _, matched_BS = lax.while_loop(more, one, start)
    beyond_BS = matched_BS - rows.dry_allowed_length[:, None]
    growth_BS = rows.dry_base[:, None] ** jnp.maximum(beyond_BS, 0)
    penalty_BS = jnp.minimum(rows.dry_multiplier[:, None] * growth_BS, MOST)
    penalty_BS = jnp.where(beyond_BS >= 0, penalty_BS, 0.0)
    at = jnp.arange(tokens_BS.shape[0])[:, None], tokens_BS
    # Of several places of a token, that with the longest match counts.
    return logits_BV - jnp.zeros_like(logits_BV).at[at].max(penalty_BS)


def _has_bit(bits_BW, ids_BS) -> jax.Array:
    """Return whether the bit of each id is set, (B, S)."""
    words_BS = jnp.take_along_axis(jnp.asarray(bits_BW), ids_BS // 32, 1)
    return (words_BS >> (ids_BS % 32).astype(jnp.uint32)) & 1 > 0
