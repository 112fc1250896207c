"""Measure long texts: repetition, diversity, coherence, divergence from real texts, loss.

`measure_texts` returns all figures of a list of texts. A measure that the texts are too short for
is absent, with the reason.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtnlg_jax.data.segment import words
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.repetition import (
    distinct,
    longest_repeat,
    recent_repetition,
    sequence_repetition,
)
from mtnlg_jax.evaluate.coherence import choose_trials, measure_coherence, split_sentences
from mtnlg_jax.evaluate.divergence import divergence
from mtnlg_jax.evaluate.figures import Figure, TooShort, figure_of, mean_figure
from mtnlg_jax.evaluate.lexical import frequencies, repetition_along, self_bleu, zipf_coefficient
from mtnlg_jax.evaluate.windows import Bucket, loss_by_position, window_features

GRAM = 4  # of seq-rep-n along a text


class Kind(NamedTuple):
    """A measure: its name in reports, and which values are those of real text."""

    title: str
    better: str  # "lower", "higher", or "as real": neither end is good


MEASURES = {
    "rep_16": Kind("words that occur among the 16 before (rep)", "as real"),
    "seq_rep_4": Kind("repeated 4-grams (seq-rep-4)", "lower"),
    "longest_repeat": Kind("longest repeated span, words", "lower"),
    "distinct_1": Kind("distinct-1", "as real"),
    "distinct_2": Kind("distinct-2", "as real"),
    "distinct_3": Kind("distinct-3", "as real"),
    "self_bleu": Kind("self-BLEU of the texts", "lower"),
    "zipf": Kind("Zipf coefficient", "as real"),
    "context_gain": Kind("gain by true context, nats a token", "higher"),
    "next_sentence": Kind("next sentence found", "higher"),
    "mauve": Kind("MAUVE by the model's features", "higher"),
    "loss": Kind("loss, nats a token", "as real"),
    "late_gain": Kind("loss of the first quarter minus the last", "higher"),
}


@dataclasses.dataclass(frozen=True)
class LongTextSettings:
    """How much of the texts is read by the model, and the seed of every draw."""

    seed: int = 0
    sentences: int = 64  # scored for coherence
    candidates: int = 5  # of the next sentence, the true one among them
    context_sentences: int = 8
    window_tokens: int = 64  # of a feature vector; at most the context without <bos>
    feature_windows: int = 512  # of the texts, and of the references
    loss_windows: int = 64  # of the model's context
    buckets: int = 16  # of positions
    along: int = 100  # 4-grams of a point of the repetition along a text


@dataclasses.dataclass(frozen=True)
class LongTextReport:
    """All figures of some texts, and what the plots show.

    ``figures`` has a `Figure` for each name of MEASURES.
    """

    figures: dict[str, Figure]
    texts: int
    words: int
    tokens: int
    positions: tuple[Bucket, ...]  # loss by position; empty if it is absent
    along: tuple[tuple[float, ...], ...]  # of each text, repeated 4-grams by window, 0 to 1
    frequencies: tuple[int, ...]  # of words, in falling order
    curve: tuple[tuple[float, float], ...]  # of divergence; empty without MAUVE
    repeated: str  # the longest repeated span, as words joined by spaces


def measure_texts(
    decoder: Decoder,
    tokenizer,
    texts: Sequence[str],
    references: Sequence[str] | None = None,
    settings: LongTextSettings | None = None,
    on_part: Callable[[str], None] = lambda part: None,
) -> LongTextReport:
    """Measure ``texts`` as `docs/measuring_text.md` defines it.

    Figures that depend on length (seq-rep-4, longest repeat, distinct-n, Zipf, self-BLEU) compare
    only between sets of texts of the same number and length; see
    `split_references`.

    Args:
      decoder: the model that scores; over a mesh, all processes call this together.
      texts: at least one; each should be a whole document.
      references: real texts for MAUVE. None: MAUVE is absent.
      on_part: called with the name of each part before it begins.

    Raises ValueError if there are no texts, or one of them, or the references, are without words.
    """
    settings = settings or LongTextSettings()
    _check(settings)
    spoken = _words_of(texts, "text")
    if references is not None:
        _words_of(references, "reference")
    on_part("words")
    figures = dict(_lexical_figures(spoken, settings.seed))
    spans = [longest_repeat(each) for each in spoken]
    longest = max(range(len(spans)), key=lambda number: spans[number][0])
    length, start, _ = spans[longest]
    figures["longest_repeat"] = mean_figure([float(span[0]) for span in spans])
    tokens = tokenizer.encode_batch(list(texts))
    on_part("coherence")
    figures |= _coherence_figures(decoder, tokenizer, texts, settings)
    on_part("loss")
    losses, positions = _loss_figures(decoder, tokenizer.bos_id, tokens, settings)
    figures |= losses
    on_part("MAUVE")
    figures["mauve"], curve = _mauve(decoder, tokenizer, tokens, references, settings)
    return LongTextReport(
        figures={name: figures[name] for name in MEASURES},
        texts=len(texts),
        words=sum(map(len, spoken)),
        tokens=sum(map(len, tokens)),
        positions=positions,
        along=tuple(tuple(repetition_along(each, settings.along, GRAM)) for each in spoken),
        frequencies=tuple(frequencies(spoken)),
        curve=curve,
        repeated=" ".join(spoken[longest][start : start + length]),
    )


def _check(settings: LongTextSettings) -> None:
    """Raise ValueError if a setting is below what its measure needs."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        # A draw of one candidate is always right.
        least = {"seed": 0, "candidates": 2}.get(field.name, 1)
        if value < least:
            raise ValueError(f"{field.name}={value} measures nothing; give {least} or more")


def _words_of(texts: Sequence[str], what: str) -> list[list[str]]:
    """Return the words of each text. Raise ValueError if there are none."""
    if isinstance(texts, str):
        raise ValueError(f"texts={texts[:40]!r} is one text; give a list of texts")
    found = list(map(words, texts))
    if not found:
        raise ValueError(f"there is no {what} to measure; give at least one")
    for number, each in enumerate(found, 1):
        if not each:
            raise ValueError(
                f"{what} {number} of {len(found)}, {texts[number - 1][:40]!r}, has no words; leave "
                "it out"
            )
    return found


def _lexical_figures(spoken: Sequence[Sequence[str]], seed: int) -> Iterator[tuple[str, Figure]]:
    """Yield the figures that need no model."""
    count = sum(map(len, spoken))
    yield "rep_16", mean_figure([recent_repetition(each) for each in spoken])
    long = [each for each in spoken if len(each) >= GRAM]

    def repeated() -> Figure:
        if not long:
            raise TooShort(f"needs a text of {GRAM} words")
        return mean_figure([sequence_repetition(each, GRAM) for each in long])

    yield "seq_rep_4", figure_of(repeated)
    for n in (1, 2, 3):

        def different(n=n) -> Figure:
            if all(len(each) < n for each in spoken):
                raise TooShort(f"needs a text of {n} words")
            return Figure(distinct(spoken, n), count)

        yield f"distinct_{n}", figure_of(different)
    yield "self_bleu", figure_of(lambda: Figure(self_bleu(spoken, seed=seed), len(spoken)))
    yield "zipf", figure_of(lambda: Figure(zipf_coefficient(frequencies(spoken)), count))


def _coherence_figures(
    decoder: Decoder, tokenizer, texts: Sequence[str], settings: LongTextSettings
) -> dict[str, Figure]:
    sentences = [
        tokenizer.encode_batch(found) if (found := split_sentences(text)) else [] for text in texts
    ]
    try:
        trials = choose_trials(
            sentences,
            decoder.context - 1,
            trials=settings.sentences,
            candidates=settings.candidates,
            context=settings.context_sentences,
            seed=settings.seed,
        )
    except TooShort as error:
        return dict.fromkeys(("context_gain", "next_sentence"), Figure(None, absent=str(error)))
    return measure_coherence(decoder, tokenizer.bos_id, trials)._asdict()


def _loss_figures(
    decoder: Decoder, bos_id: int, tokens: Sequence[Sequence[int]], settings: LongTextSettings
) -> tuple[dict[str, Figure], tuple[Bucket, ...]]:
    """Return the loss and what it falls by, and the buckets of positions."""
    try:
        found = loss_by_position(decoder, bos_id, tokens, settings.buckets, settings.loss_windows)
    except TooShort as error:
        return dict.fromkeys(("loss", "late_gain"), Figure(None, absent=str(error))), ()
    sizes = [each.last - each.first + 1 for each in found]
    losses = [each.loss for each in found]
    positions = sum(sizes)
    figures = {"loss": Figure(float(np.average(losses, weights=sizes)), positions)}
    quarter = len(found) // 4
    if quarter:
        early = float(np.average(losses[:quarter], weights=sizes[:quarter]))
        late = float(np.average(losses[-quarter:], weights=sizes[-quarter:]))
        figures["late_gain"] = Figure(early - late, positions)
    else:
        figures["late_gain"] = Figure(None, absent=f"needs 4 buckets, and buckets={len(found)}")
    return figures, tuple(found)


def _mauve(
    decoder: Decoder,
    tokenizer,
    tokens: Sequence[Sequence[int]],
    references: Sequence[str] | None,
    settings: LongTextSettings,
) -> tuple[Figure, tuple[tuple[float, float], ...]]:
    """Return MAUVE and the points of the divergence curve."""
    if references is None:
        return Figure(None, absent="needs references: real texts to compare with"), ()
    real = tokenizer.encode_batch(list(references))
    length = min(settings.window_tokens, decoder.context - 1)
    ours, theirs = (
        window_features(decoder, tokenizer.bos_id, each, length, settings.feature_windows)
        for each in (tokens, real)
    )
    try:
        found = divergence(theirs, ours, settings.seed)
    except TooShort as error:
        return Figure(None, absent=str(error)), ()
    return Figure(found.mauve, len(ours)), tuple((float(x), float(y)) for x, y in found.curve)


def as_json(report: LongTextReport) -> dict[str, Any]:
    """Return the content of the JSON object of a report."""
    content = dataclasses.asdict(report)
    content["figures"] = {name: each._asdict() for name, each in report.figures.items()}
    content["positions"] = [each._asdict() for each in report.positions]
    return content
