"""What a task did for one answer: the parts it read, its calls of the model, and their results.

Every dataclass lands in the JSON of an answer. Positions are characters [start, end) of the input,
or of the document that an answer stands on, with LF line ends.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A part of the text that the model or the retriever read at once."""

    start: int
    end: int
    tokens: int  # of its text alone


@dataclass(frozen=True)
class Vote:
    """The label of one part in a vote; see `tasks.long.sentiment` for the rule."""

    part: Part
    label: str  # the best label of the part
    probability: float  # of that label among all labels
    margin: float  # that probability less the second best, 0 to 1
    weight: float  # tokens of the part x margin


@dataclass(frozen=True)
class Aspect:
    name: str
    label: str  # "" if no part mentions the aspect
    probability: float  # of the label by the vote; 0 without a label
    votes: tuple[Vote, ...]


@dataclass(frozen=True)
class CitedSentence:
    """A sentence of an answer and the passage it stands on."""

    text: str
    passage: int  # number of the citation, from 1; 0 if no citation shares a word with it
    label: str = ""  # "supported", "contradicted" or "not said"; "" without cite
    # of the three labels, by their log-probabilities after passage and sentence
    probabilities: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, list item or heading of the input and its translation."""

    start: int
    end: int
    text: str  # the translation, without list marker
    groups: int  # groups of sentences that were translated at once


@dataclass(frozen=True)
class TermUse:
    """A glossary term that occurs in the input."""

    source: str
    target: str
    asked: int  # groups of sentences that contain the source
    honoured: int  # those whose translation contains the target
    missed: tuple[int, ...]  # paragraphs, from 1, where it is not honoured


@dataclass(frozen=True)
class AlignedParagraphs:
    """Paragraphs that were compared, as numbers from 1."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    chrf: float  # 0 to 100; 0 if one side is empty


@dataclass(frozen=True)
class Comparison:
    against: str  # "reference" or "source after translation back"
    chrf: float  # sacrebleu's corpus chrF of all aligned paragraphs, 0 to 100
    paragraphs: tuple[AlignedParagraphs, ...]


@dataclass(frozen=True)
class Work:
    """How an answer was made."""

    method: str  # "whole", "parts", "hierarchical", "refine" or "passages"
    parts: int  # parts that were read, at all levels
    calls: int  # prompts that the model was given
    tokens_in: int  # of those prompts
    tokens_out: int  # generated, with those of candidates that were not chosen
    plan: tuple[Part, ...] = ()  # the parts of the text; empty if it was read whole
    notes: tuple[str, ...] = ()  # what else the reader of the answer should know
    votes: tuple[Vote, ...] = ()
    aspects: tuple[Aspect, ...] = ()
    sentences: tuple[CitedSentence, ...] = ()
    paragraphs: tuple[Paragraph, ...] = ()
    terms: tuple[TermUse, ...] = ()
    comparisons: tuple[Comparison, ...] = ()


def total(method: str, parts: int, works: Iterable[Work | None], **results) -> Work:
    """Return the work of one answer: the sums of calls and tokens of its parts."""
    done = [work for work in works if work]
    return Work(
        method,
        parts,
        sum(work.calls for work in done),
        sum(work.tokens_in for work in done),
        sum(work.tokens_out for work in done),
        **results,
    )
