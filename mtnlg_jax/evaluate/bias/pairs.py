"""Paired sentences by ranking: which of two sentences that differ in one respect is more probable.

CrowS-Pairs (Nangia et al. 2020), WinoBias (Zhao et al. 2018) and files like them.
"""

# Shapes: V vocabulary

import collections
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.many_prompts import score_behind
from mtnlg_jax.decode.results import common_prefix
from mtnlg_jax.decode.scoring import score_masked, score_rows
from mtnlg_jax.evaluate.bias import statistics
from mtnlg_jax.evaluate.bias.pairs_file import Pair

# The group of all pairs.
ALL = "all"


class Scored(NamedTuple):
    """A sentence: its log-probability in nats, by one objective of the model."""

    sum: float
    tokens: int
    # The part of tokens that both sentences of a pair have.
    shared: float


def encoded(tokenizer, sentence: str) -> list[int]:
    """Return the tokens of a sentence behind <bos>, so that its first one is predicted as well."""
    tokens = list(tokenizer.encode(sentence))
    return tokens if tokens[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *tokens]


def check_sentences(tokenizer, sentences: Iterable[str], context: int) -> None:
    """Raise ValueError on a sentence that, with its end, is longer than the model's context."""
    for sentence in sentences:
        length = len(encoded(tokenizer, sentence)) + 1
        if length > context:
            raise ValueError(
                f"the sentence {sentence[:40]!r} has {length} tokens with its end, and the model's "
                f"context holds {context}; remove it, or use a model with more positions"
            )


def score_causal(
    decoder: Decoder, tokenizer, pairs: Sequence[tuple[str, str]]
) -> list[tuple[Scored, Scored]]:
    """Return the log-probability of both sentences of each pair, by the causal model.

    The tokens at the beginning that two sentences share are read once for both, so they count the
    same to the last bit.
    """
    rows = [tuple(encoded(tokenizer, text) for text in pair) for pair in pairs]
    heads = [_head(*pair) for pair in rows]
    behind = score_behind(
        decoder,
        [pair[0][:head] for pair, head in zip(rows, heads, strict=True)],
        rows,
        [[head] * 2 for head in heads],
    )
    # What is common to both: once for each different beginning.
    begun = {tuple(pair[0][:head]) for pair, head in zip(rows, heads, strict=True) if head > 1}
    beginnings = sorted(begun)
    sums = score_rows(decoder, beginnings, [1] * len(beginnings)) if beginnings else []
    known = {key: float(each.sum()) for key, each in zip(beginnings, sums, strict=True)}
    found = []
    for pair, head, parts in zip(rows, heads, behind, strict=True):
        start = known.get(tuple(pair[0][:head]), 0.0)
        masks = _shared(pair[0][head:], pair[1][head:])
        found.append(
            tuple(
                Scored(
                    start + float(part.sum()),
                    len(row) - 1,
                    start + float(part[mask].sum()),
                )
                for row, part, mask in zip(pair, parts, masks, strict=True)
            )
        )
    return found  # type: ignore[return-value]


def score_pseudo(
    decoder: Decoder, tokenizer, pairs: Sequence[tuple[str, str]]
) -> list[tuple[Scored, Scored]]:
    """Return the pseudo-log-likelihood of both sentences of each pair, by the masked model.

    Each token is hidden by <mask> in turn and predicted from all others (Salazar et al. 2020).
    ``shared`` sums over the tokens of both sentences alone, as CrowS-Pairs scores (Nangia et al.
    2020, section 3): a group's own frequency does not count.
    """
    rows = [[*encoded(tokenizer, text), tokenizer.eos_id] for pair in pairs for text in pair]
    hidden = [[(i, i + 1) for i in range(1, len(row) - 1)] for row in rows]
    scored = score_masked(decoder, tokenizer.mask_id, rows, hidden)
    found = []
    for number in range(len(pairs)):
        both = slice(2 * number, 2 * number + 2)
        masks = _shared(*(row[1:-1] for row in rows[both]))
        found.append(
            tuple(
                Scored(float(each.sum()), len(each), float(each[mask].sum()))
                for each, mask in zip(scored[both], masks, strict=True)
            )
        )
    return found  # type: ignore[return-value]


def _head(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens at the beginning of both, with one left to score in each."""
    return min(common_prefix(one, other), len(one) - 1, len(other) - 1)


def _shared(one: Sequence[int], other: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Return which tokens of each sequence are in both, by the longest matching blocks."""
    masks = tuple(np.zeros(len(each), bool) for each in (one, other))
    blocks = difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    for block in blocks:
        masks[0][block.a : block.a + block.size] = True
        masks[1][block.b : block.b + block.size] = True
    return masks


def summarize(pairs: Sequence[Pair], scored: Sequence[tuple[Scored, Scored]]) -> dict[str, Any]:
    """Return shares, tests and effect sizes by bias type and for all pairs, ready for JSON."""
    values = {
        "sum": [more.sum - less.sum for more, less in scored],
        "per_token": [
            more.sum / max(1, more.tokens) - less.sum / max(1, less.tokens) for more, less in scored
        ],
        "shared": [more.shared - less.shared for more, less in scored],
    }
    return {
        by: {kind: _preference(each, members) for kind, members in _kinds(pairs).items()}
        for by, each in values.items()
    }


def _kinds(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Return the indices of all pairs, and those of each bias type and direction."""
    found: dict[str, list[int]] = collections.defaultdict(list)
    found[ALL] = list(range(len(pairs)))
    for kind in sorted({pair.kind for pair in pairs if pair.kind}):
        # A file may call one of its types "all".
        name = f"type: {kind}" if kind == ALL else kind
        found[name] = [i for i, pair in enumerate(pairs) if pair.kind == kind]
    for direction in sorted({pair.direction for pair in pairs if pair.direction}):
        found[f"direction: {direction}"] = [
            i for i, pair in enumerate(pairs) if pair.direction == direction
        ]
    return found


def _preference(values: Sequence[float], members: Sequence[int]) -> dict[str, Any]:
    """Return the share of pairs whose difference is above 0, without ties, and its size."""
    own = [values[i] for i in members]
    decided = [value for value in own if value]
    return {
        "pairs": len(own),
        "ties": len(own) - len(decided),
        "stereotype": statistics.share(sum(value > 0 for value in decided), len(decided)),
        "difference": statistics.paired(own),
    }


def baselines(
    pairs: Sequence[Pair], tokenizer, counts_V: np.ndarray | None, source: str
) -> dict[str, Any]:
    """Return the share of stereotypes that models prefer which read no sentence.

    "chance" is one half. "shorter" prefers the sentence of fewer tokens. "unigram" adds up the
    log-frequencies of the tokens: of ``counts_V`` (of ``source``), or of all sentences of the file.
    """
    rows = [[encoded(tokenizer, text)[1:] for text in (pair.more, pair.less)] for pair in pairs]
    if counts_V is None:
        tokens = [token for pair in rows for row in pair for token in row]
        counts_V = np.bincount(tokens, minlength=tokenizer.vocab_size)
        source = "the sentences of the file"
    # Each token once more than it occurs, as in evaluate/baselines.py.
    logs_V = np.log((counts_V + 1) / (counts_V + 1).sum())
    shorter = [len(less) - len(more) for more, less in rows]
    unigram = [float(logs_V[more].sum() - logs_V[less].sum()) for more, less in rows]
    return {
        "chance": 0.5,
        "shorter": _shares(shorter),
        "unigram": _shares(unigram) | {"counts_of": source},
    }


def _shares(values: Sequence[float]) -> dict[str, Any]:
    decided = [value for value in values if value]
    found = statistics.share(sum(value > 0 for value in decided), len(decided))
    return found | {"ties": len(values) - len(decided)}


def examples(
    pairs: Sequence[Pair], scored: Sequence[tuple[Scored, Scored]], most: int
) -> list[dict[str, Any]]:
    """Return the pairs with the largest differences of the sums, in either direction."""
    rows: list[dict[str, Any]] = [
        {
            "more": pair.more,
            "less": pair.less,
            "kind": pair.kind,
            "difference": more.sum - less.sum,
        }
        for pair, (more, less) in zip(pairs, scored, strict=True)
    ]
    return sorted(rows, key=lambda row: -abs(row["difference"]))[:most]


Scorer = Callable[[Decoder, Any, Sequence[tuple[str, str]]], list[tuple[Scored, Scored]]]
SCORERS: dict[str, Scorer] = {"causal": score_causal, "masked": score_pseudo}
