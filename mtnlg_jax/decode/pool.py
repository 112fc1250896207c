"""The candidates of a ranking, what scorers return, and the options of scorers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mtnlg_jax.data.tokenizer.base import Tokenizer
from mtnlg_jax.decode.cache import Decoder, capacity, prefill
from mtnlg_jax.decode.results import check_context
from mtnlg_jax.decode.scoring import score

NORMALIZATIONS = ("sum", "per_token", "per_char", "per_byte")


@dataclasses.dataclass(frozen=True)
class ScorerOptions:
    """Settings of single scorers. Setting one that none of the chosen scorers uses is an error."""

    gnmt_alpha: float = 0.6  # any finite number; 0: the sum
    neutral: str = ""  # context of log p(y); empty text means <bos> alone
    # x of the noisy channel, without the prompt's other words; None: the prompt
    source: str | None = None
    reverse: str = "{candidate}\n"  # prompt before the source, for log p(x|y)
    channel_weight: float = 1.0  # of log p(x|y)
    language_weight: float = 1.0  # of log p(y)
    within_word_l2r: bool = False  # also masks the rest of the token's word
    # a name of UTILITIES, or a function of (candidate, reference)
    utility: str | Callable[[str, str], float] = "chrf"
    # a pattern (group 1, or all, of its last match), or a function of the text
    answer: str | Callable[[str], str | None] | None = None
    votes: str = "count"  # count | probability: count x exp(log p(y|x) / |y|)


class Candidate(NamedTuple):
    """A text to score, with the tokens before it."""

    text: str
    row: tuple[int, ...]  # the prompt's tokens, then its own
    start: int  # index in ``row`` of the first token scored, 1 or more
    scored: bytes  # text of the tokens scored, in UTF-8

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.row[self.start :]

    def length(self, normalise: str) -> int:
        """Return |y|.

        A candidate has at least one token. Its text may be empty, like that of a stop token, and
        then has length 1.
        """
        return length_of(normalise, self.scored, self.tokens)


class Pool(NamedTuple):
    """The different candidates, and how to score them."""

    decoder: Decoder
    tokenizer: Tokenizer
    prompt: str
    candidates: list[Candidate]
    counts: np.ndarray  # how often each occurred
    normalise: str
    options: ScorerOptions
    # Sums behind other contexts that are known, by (context, tokens of the candidates).
    known: dict[tuple, np.ndarray]

    @property
    def texts(self) -> list[str]:
        return [each.text for each in self.candidates]

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        return [each.tokens for each in self.candidates]

    def lengths(self, normalise: str | None = None) -> np.ndarray:
        return np.array([each.length(normalise or self.normalise) for each in self.candidates])


class Scores(NamedTuple):
    """The result of a scorer for all candidates of a pool."""

    parts: dict[str, np.ndarray]  # by name, one number a candidate; the scorer's name is its score
    answers: list[str | None] | None = None  # of self_consistency
    utilities: np.ndarray | None = None  # of mbr: each candidate (row) against each


def length_of(normalise: str, text: bytes, tokens: Sequence[int]) -> int:
    """Return the length to divide by; a character counts where it begins in ``text`` (UTF-8)."""
    # Continuation bytes of UTF-8 are 10xxxxxx.
    characters = sum(byte & 0xC0 != 0x80 for byte in text)
    return {
        "sum": 1,
        "per_token": len(tokens),
        "per_char": max(characters, 1),
        "per_byte": max(len(text), 1),
    }[normalise]


def check_behind(pool: Pool, context: Sequence[int], what: str) -> None:
    """Raise ValueError if a candidate does not fit behind ``context``, which ``what`` names."""
    for text, tokens in zip(pool.texts, pool.tokens, strict=True):
        check_context(
            pool.decoder, len(context) + len(tokens), f"{what} with candidate {text[:40]!r}"
        )


def sums_behind(pool: Pool, context: Sequence[int]) -> np.ndarray:
    """Return log p of the same tokens y after another context."""
    key = tuple(context), tuple(pool.tokens)
    if key not in pool.known:
        prefix = prefill(pool.decoder, [context], capacity(len(context), pool.decoder.context))
        pool.known[key] = sums_of(score(pool.decoder, prefix, pool.tokens))
    return pool.known[key]


def sums_of(scored: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of each sequence's log-probabilities."""
    return np.array([np.sum(each, dtype=np.float64) for each in scored])
