"""Passages of training data, or of texts, whose influence is asked for."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mtnlg_jax.data.store.tokens import Tokens


class Passage(NamedTuple):
    """A stretch of one document."""

    source: str
    document: int  # in its source, from 0
    begin: int  # its first token in the document
    tokens: np.ndarray  # int32 [n + 1], of which the last n are predicted
    weights: np.ndarray  # float32 [n]; 0 where nothing is trained on, as in prompts of pairs


def after_bos(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text behind bos, as training reads it; without, if there is none."""
    bos = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    return [*bos, *tokenizer.encode(text)]


def passages_of_texts(
    tokenizer: Any, texts: Sequence[str], source: str, length: int
) -> list[Passage]:
    """Return the passages of ``length`` predicted tokens of each text, in order."""
    found = []
    for number, text in enumerate(texts):
        ids = np.array(after_bos(tokenizer, text), np.int32)
        for begin in range(0, len(ids) - 1, length):
            tokens = ids[begin : begin + length + 1]
            weights = np.ones(len(tokens) - 1, np.float32)
            found.append(Passage(source, number, begin, tokens, weights))
    return found


def sample(passages: Sequence[Any], most: int, seed: int) -> list[Any]:
    """Return ``most`` of the passages, drawn from ``seed``, in their order; all if they are
    few."""
    if len(passages) <= most:
        return list(passages)
    chosen = np.random.default_rng(seed).choice(len(passages), most, replace=False)
    return [passages[index] for index in np.sort(chosen)]


def passages_of_sources(
    sources: Sequence[Tokens], length: int, most: int, seed: int
) -> tuple[list[Passage], int]:
    """Return (at most ``most`` passages of the training data, how many there are).

    Documents are cut into passages of ``length`` predicted tokens; every passage of every source
    has the same chance. Nothing that is never predicted is a passage.
    """
    counts = []
    for tokens in sources:
        lengths = np.diff(tokens.document_offsets)
        counts.append(-(-np.maximum(lengths - 1, 0) // length))
    # By source: the number of passages up to the end of each document.
    stops = [np.cumsum(count) for count in counts]
    ends = np.cumsum([count.sum() for count in counts])
    total = int(ends[-1])
    found = []
    for index in sample(range(total), most, seed):
        which = int(np.searchsorted(ends, index, side="right"))
        inside = index - int(ends[which] - counts[which].sum())
        document = int(np.searchsorted(stops[which], inside, side="right"))
        number = inside - int(stops[which][document] - counts[which][document])
        found.append(_passage(sources[which], document, number * length, length))
    return [passage for passage in found if passage.weights.any()], total


def _passage(tokens: Tokens, document: int, begin: int, length: int) -> Passage:
    first, end = map(int, tokens.document_offsets[document : document + 2])
    start = first + begin
    stop = min(start + length + 1, end)
    ids = tokens.read(start, stop).astype(np.int32)
    weights = np.ones(len(ids) - 1, np.float32)
    if tokens.conversations:
        weights = tokens.read_answers(np.array([start]), stop - start)[0, 1:].astype(np.float32)
    elif tokens.prompt_lengths is not None:
        at = np.arange(begin + 1, begin + len(ids))
        weights = (at >= tokens.prompt_lengths[document]).astype(np.float32)
    name = str(tokens.location).removesuffix("/train")
    return Passage(name, document, begin, ids, weights)
