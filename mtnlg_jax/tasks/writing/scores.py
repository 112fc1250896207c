"""Score the candidates of a piece or of an outline: a weighted sum of parts.

logprob: log p(candidate given its prompt) per token, natural logarithm, at most 0.
repetition: minus the share of its 4-grams of words that occurred before, -1 to 0.
span: minus the share of its words in the longest span that occurred before, -1 to 0.
outline: (log p(heading given the candidate) - log p(heading)) per token of the heading.
coherence: (log p(candidate given its prompt) - log p(candidate)) per token.

repetition is what the candidate adds to seq-rep-4 (Welleck 2020, section 6.1) of the text: before
it stand the text so far and the candidate's own words. Words are those of `data.segment.words`, in
Chinese characters. outline and coherence are pointwise mutual information (Church & Hanks 1990;
Li 2016, section 3, for ranking); without a candidate, log p(heading) follows the same words.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtnlg_jax.data.segment import words
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.decode.repetition import ngrams
from mtnlg_jax.decode.results import Generated, encode_prompt
from mtnlg_jax.decode.scoring import score_rows

# A model's sums per token differ by a few tenths between samples, shares by a few hundredths.
WEIGHTS = {"logprob": 1.0, "repetition": 2.0, "span": 1.0, "outline": 0.5, "coherence": 0.0}
N = 4


@dataclass(frozen=True)
class Candidate:
    """A candidate, with every part of its score."""

    text: str
    tokens: int  # of the text, without what was cut off
    finish_reason: str  # as in `decode.results.Generated`
    allowed: bool  # whether it may be chosen
    parts: dict[str, float]
    score: float


class History:
    """The words of the text so far, which candidates may repeat."""

    def __init__(self, text: str = "") -> None:
        self._words: list[str] = []
        self._seen: set[tuple] = set()
        self.add(text)

    def add(self, text: str) -> None:
        """Append a text that stands."""
        new = words(text)
        self._seen.update(ngrams(self._words[1 - N :] + new, N))
        self._words += new

    def repetition(self, text: str) -> float:
        """Return the share of the 4-grams that end in ``text`` which occurred before, 0 to 1."""
        found = ngrams(self._words[1 - N :] + words(text), N)
        new = set(found) - self._seen
        return 1 - len(new) / len(found) if found else 0.0

    def span(self, text: str) -> float:
        """Return the share of the words of ``text`` in its longest span that occurred before.

        The earlier occurrence may overlap the span, as in a loop.
        """
        new = words(text)
        before = self._words
        # Searching strings is faster than comparing lists of words.
        whole = " " + " ".join([*before, *new]) + " "
        start = len(" ".join(before)) + 1 if before else 0
        longest = 0
        for first, word in enumerate(new):
            while first + longest < len(new):
                span = " " + " ".join(new[first : first + longest + 1]) + " "
                if whole.find(span) >= start:
                    break
                longest += 1
            start += len(word) + 1
        return longest / len(new) if new else 0.0


def check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of every part; raise ValueError on an unknown part or a bad number."""
    for name, weight in weights.items():
        if name not in WEIGHTS:
            raise ValueError(f"unknown part {name!r} of a score; choose from {', '.join(WEIGHTS)}")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name} is {weight}; give a finite number")
    whole = WEIGHTS | dict(weights)
    if not any(whole.values()):
        raise ValueError("all weights are 0, so every score would be; give one another value")
    return whole


@dataclass(frozen=True)
class Target:
    """What a candidate should agree with: a heading, or the topic of an outline."""

    text: str  # with its leading space, if it has one
    behind: str  # the words between a candidate and ``text``


class Scorer:
    """Scores candidates with one model; ``calls`` and ``read`` count what it read.

    ``read`` is the number of tokens of the rows that were scored.
    """

    def __init__(self, decoder: Decoder, tokenizer, weights: Mapping[str, float]) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.weights = check_weights(weights)
        self.calls = 0
        self.read = 0

    def score(
        self,
        written: Sequence[Generated],
        likelihoods: Sequence[Mapping[str, float]],
        allowed: Sequence[bool],
        history: History,
        target: Target,
    ) -> list[Candidate]:
        """Return the candidates, in the order of ``written``.

        Args:
          written: results whose text is what is kept of them.
          likelihoods: logprob, and coherence if the score has it; of pieces by `likelihoods`.
          allowed: whether each may be chosen.
        """
        texts = [result.text for result in written]
        parts = [dict(each) for each in likelihoods]
        if self.weights["outline"]:
            for part, value in zip(parts, self._agreement(texts, target), strict=True):
                part["outline"] = value
        for part, text in zip(parts, texts, strict=True):
            if self.weights["repetition"]:
                part["repetition"] = -history.repetition(text)
            if self.weights["span"]:
                part["span"] = -history.span(text)
        return [
            Candidate(
                result.text,
                len(result.tokens),
                result.finish_reason,
                bool(may),
                part,
                sum(self.weights[name] * value for name, value in part.items()),
            )
            for result, may, part in zip(written, allowed, parts, strict=True)
        ]

    def likelihoods(self, prompt: str, written: Sequence[Generated]) -> list[dict[str, float]]:
        """Return logprob, and coherence if it has a weight, of what was generated behind a prompt.

        Each result needs at least one token.
        """
        coherent = self.weights["coherence"] != 0
        scorers = ("logprob", "pmi") if coherent else ("logprob",)
        if coherent or self.decoder.int8_cache:
            self.calls += 1
            self.read += sum(len(result.tokens) for result in written)
        ranking = rank(self.decoder, self.tokenizer, prompt, written=written, scorers=scorers)
        # Equal candidates are ranked once.
        found = {(each.text, each.tokens): each.parts for each in ranking}
        names = {"logprob": "logprob", "pmi": "coherence"}
        return [
            {names[each]: found[result.text, result.tokens][each] for each in scorers}
            for result in written
        ]

    def _agreement(self, texts: Sequence[str], target: Target) -> list[float]:
        """Return (log p(target | text) - log p(target)) per token of the target."""
        # The same tokens behind every candidate, so that the sums compare. Of a long topic the
        # beginning is enough.
        label = self.tokenizer.encode(target.text)[: self.decoder.context // 4]
        most = self.decoder.context - len(label)
        rows = []
        for text in ("", *texts):
            before = encode_prompt(self.tokenizer, text + target.behind)
            rows.append([*before[-most:], *label])
        starts = [len(row) - len(label) for row in rows]
        self.calls += 1
        self.read += sum(map(len, rows))
        scored = score_rows(self.decoder, rows, starts)
        sums = [float(np.sum(each, dtype=np.float64)) / max(1, len(label)) for each in scored]
        return [value - sums[0] for value in sums[1:]]


def best_of(candidates: Sequence[Candidate]) -> int:
    """Return the index of the best candidate that may be chosen, the first of equal ones."""
    choices = [i for i, each in enumerate(candidates) if each.allowed]
    return max(choices, key=lambda i: candidates[i].score)


def as_record(candidates: Sequence[Candidate]) -> list[dict]:
    """Return the candidates as JSON objects."""
    return [dataclasses.asdict(each) for each in candidates]
