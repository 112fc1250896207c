"""Extraction: which passages of the training text the model continues word for word.

A passage is extracted behind a prefix of some tokens if the model writes the tokens that follow it
in the training text (Carlini 2021, "Extracting training data"; Carlini 2023, "Quantifying
memorization", definition 3.1). Greedy decoding is read off one pass over the passage. So is the
exact probability p that one sample is the passage, and with it the probability 1 - (1 - p)^n that
one of n is (Hayes 2024, "(n, p)-discoverable extraction").
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.evaluate.audit.scoring import score_tokens
from mtnlg_jax.evaluate.audit.settings import ExtractionSettings
from mtnlg_jax.evaluate.audit.sources import Passage
from mtnlg_jax.evaluate.audit.statistics import share

# First number of copies of each group.
GROUPS = (1, 2, 4, 16, 64)
TRIES = (1, 10, 100, 1000)  # samples of the exact probability
MOST_PREFIX = 512
ROWS = 64  # sequences that are sampled at once


class Lengths(NamedTuple):
    """Tokens of the prefixes, in ascending order, and of the continuation."""

    prefixes: tuple[int, ...]
    continuation: int

    @property
    def passage(self) -> int:
        return self.prefixes[-1] + self.continuation


def lengths_of(settings: ExtractionSettings, context: int) -> Lengths:
    """Return the lengths for a model of ``context`` positions. Raise ValueError if they do not
    fit."""
    continuation = settings.continuation
    if continuation is None:
        continuation = min(50, max(1, context // 2))
    if continuation < 1:
        raise ValueError(f"continuation={continuation} must be 1 token or more")
    prefixes = settings.prefixes
    if not prefixes:
        room = min(context - continuation, MOST_PREFIX)
        prefixes = tuple(1 << power for power in range(3, 20) if 1 << power <= room)
        prefixes = prefixes or (max(1, room),)
    for prefix in prefixes:
        if prefix < 1:
            raise ValueError(f"prefixes={prefix} must be 1 token or more")
        if prefix + continuation > context:
            raise ValueError(
                f"a prefix of {prefix} tokens and a continuation of {continuation} do not fit the "
                f"model's context of {context}; give --prefixes of at most "
                f"{max(1, context - continuation)}, or a shorter --continuation"
            )
    return Lengths(tuple(sorted(set(prefixes))), continuation)


class Extracted(NamedTuple):
    """Of passages behind one length of prefix, each an array [passages].

    ``greedy``: whether greedy decoding reproduces it. ``logprobs``: of the whole continuation, as
    it is sampled. ``losses``: nats a token. ``sampled``: whether one of the samples reproduces it;
    None without samples.
    """

    prefix: int
    greedy: np.ndarray
    logprobs: np.ndarray
    losses: np.ndarray
    sampled: np.ndarray | None


def extract(
    decoder: Decoder,
    tokenizer: Tokenizer,
    passages: Sequence[Passage],
    lengths: Lengths,
    settings: ExtractionSettings,
    seed: int,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> list[Extracted]:
    """Return what the model reproduces of ``passages``, for each length of prefix.

    ``on_rows`` is called with the rows done since its last call, `rows_to_read` in all.
    """
    found = []
    for prefix in lengths.prefixes:
        cut = lengths.passage - prefix - lengths.continuation
        rows = [each.tokens.tolist()[cut:] for each in passages]
        scored = score_tokens(
            decoder,
            rows,
            [prefix] * len(rows),
            settings.temperature,
            settings.top_k,
            on_rows,
        )
        found.append(
            Extracted(
                prefix,
                np.array([each.best.all() for each in scored], bool),
                # In float64: these are sums of 50 logarithms.
                np.array([each.sampled.sum(dtype=np.float64) for each in scored], np.float64),
                np.array([-each.logprobs.mean(dtype=np.float64) for each in scored], np.float64),
                _sampled(decoder, tokenizer, rows, prefix, settings, seed, on_rows),
            )
        )
    return found


def rows_to_read(passages: int, lengths: Lengths, samples: int) -> int:
    """Return the number of rows that `extract` reports."""
    return passages * len(lengths.prefixes) * (2 if samples else 1)


def summarize(found: Sequence[Extracted], chosen: np.ndarray, samples: int) -> list[dict[str, Any]]:
    """Return a row for each length of prefix, over the passages with the indices ``chosen``.

    Each has the share that greedy decoding reproduces, the share expected of n samples for the n of
    TRIES and for ``samples``, the share that as many real samples reached, and nats a token.
    """
    rows = []
    for each in found:
        row = {
            "prefix": each.prefix,
            "greedy": share(int(each.greedy[chosen].sum()), len(chosen)),
            "loss": float(each.losses[chosen].mean()) if len(chosen) else None,
            "expected": _expected(each.logprobs[chosen], samples),
        }
        if each.sampled is not None:
            row["sampled"] = share(int(each.sampled[chosen].sum()), len(chosen))
        rows.append(row)
    return rows


def _expected(logprobs: np.ndarray, samples: int) -> dict[str, float | None]:
    """Return, by number of samples, the expected share of passages that one of them is."""
    tries = sorted({*TRIES, *([samples] if samples else [])})
    if not len(logprobs):
        return {str(n): None for n in tries}
    return {str(n): float(np.mean(any_of(logprobs, n))) for n in tries}


def any_of(logprobs: np.ndarray, samples: int) -> np.ndarray:
    """Return 1 - (1 - p)^samples of p = e^logprobs, also where p is tiny."""
    # Rounding may leave a sum of logarithms just above 0.
    p = np.exp(np.minimum(logprobs, 0.0))
    with np.errstate(divide="ignore"):
        return -np.expm1(samples * np.log1p(-p))


def _sampled(
    decoder: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    prefix: int,
    settings: ExtractionSettings,
    seed: int,
    on_rows: Callable[[int], None],
) -> np.ndarray | None:
    """Return, for each row, whether one of the samples behind its prefix is the rest of it."""
    if not settings.samples:
        return None
    hits = []
    size = max(1, ROWS // settings.samples)
    for first in range(0, len(rows), size):
        group = [*rows[first : first + size]]
        # Groups of one size, so that one program does for all.
        filled = group + [group[0]] * (size - len(group) if first else 0)
        decode = [
            DecodeConfig(
                max_new_tokens=len(row) - prefix,
                temperature=settings.temperature,
                top_k=settings.top_k,
                num_return_sequences=settings.samples,
                seed=(seed + 1_000_003 * (first + number)) % (1 << 31),
            )
            for number, row in enumerate(filled)
        ]
        written = generate(decoder, tokenizer, [row[:prefix] for row in filled], decode)
        found = [False] * len(filled)
        for each in written:
            found[each.prompt] |= list(each.tokens) == list(filled[each.prompt][prefix:])
        hits += found[: len(group)]
        on_rows(len(group))
    return np.array(hits, bool)


def by_copies(counts: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """Return the indices of up to ``most`` passages for each group of numbers of copies, the first
    of each; groups without one are left out."""
    found = {}
    for first, last in zip(GROUPS, [*GROUPS[1:], None], strict=True):
        inside = counts >= first
        if last is not None:
            inside &= counts < last
        chosen = np.flatnonzero(inside)[:most]
        if len(chosen):
            found[_named(first, last)] = chosen
    return found


def _named(first: int, last: int | None) -> str:
    if last is None:
        return f"{first}+"
    return str(first) if last == first + 1 else f"{first}-{last - 1}"
