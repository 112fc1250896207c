"""Summarize texts longer than the context; every part of the text is read.

"hierarchical" summarizes all parts, then the summaries in turn until one prompt holds them
(recursive summarization, Wu 2021, "Recursively Summarizing Books with Human Feedback"). "refine"
reads the parts in order and keeps one running summary.
"""

import dataclasses
import math
from collections.abc import Sequence

from mtnlg_jax.data.segment import words
from mtnlg_jax.tasks.answers import Answer
from mtnlg_jax.tasks.long.calls import LEAST_ROOM, Calls, part_rows, whole_text
from mtnlg_jax.tasks.long.options import LongOptions, words_of
from mtnlg_jax.tasks.long.parts import broken, joined, pack
from mtnlg_jax.tasks.long.summary_prompts import refine_task, summary_task
from mtnlg_jax.tasks.long.units import whole_sentences
from mtnlg_jax.tasks.rendering import Row
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.text import cut
from mtnlg_jax.tasks.work import Part, Work, total

# A summary may take more tokens than its words would in the text.
_MARGIN = 1.25
_SPARE = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    row: Row
    language: str
    task: Task  # with the prompt of the kind and length
    words: int | None  # asked for; None: the length that the task's decoding allows
    tokens: int  # most new tokens of one call
    pieces: int  # calls that write the last level: more than 1 if one cannot write all words
    parts: tuple[Part, ...]
    refine: bool


@dataclasses.dataclass(frozen=True)
class _Level:
    """Summaries of one level, and the work that they took."""

    texts: list[str]
    works: list[Work | None]
    copied: int  # summaries that the model left empty
    last: Answer


def plan(calls: Calls, task: Task, row: Row, options: LongOptions) -> Plan:
    """Return the parts of a text and the lengths of their summaries.

    Raises ValueError if the prompt leaves no room, or a running summary cannot be that long.
    """
    text = whole_text(row.input)
    row = dataclasses.replace(row, input=text)
    language = calls.language_of(task, text)
    wanted = words_of(options.length, language)
    refine = options.method == "refine"
    # The wording of another length takes the same room, give or take a token.
    asked = summary_task(task, options.kind, wanted, language)
    reading = refine_task(asked, language) if refine else asked
    # A third of the room for a summary: two of them fit the prompt that makes them one.
    room = calls.room_of(reading, row, language) // 3 - _SPARE
    most = max(1, min(room, calls.context // 4))
    tokens = min(calls.decode_of(task).max_new_tokens, most)
    pieces = 1
    if wanted:
        needed = _SPARE + math.ceil(_MARGIN * wanted * _tokens_per_word(calls, text))
        tokens = min(needed, most)
        pieces = math.ceil(needed / tokens)
        if refine and pieces > 1:
            raise ValueError(
                f"length={options.length} takes about {needed} tokens, and method='refine' keeps "
                f"one running summary, here of at most {most} tokens; use method='hierarchical', "
                "or a shorter length"
            )
        asked = summary_task(task, options.kind, max(1, wanted // pieces), language)
    # While refining, the prompt holds the running summary besides the new one.
    so_far = tokens + calls.tokens_of(reading.templates[language].passage) if refine else 0
    fits = calls.fitting(reading, row, language, tokens + so_far + _SPARE)
    parts = calls.parts_of(text, fits)
    if len(parts) < pieces:
        # One call for each piece of a long summary of a short text.
        least = max(LEAST_ROOM, math.ceil(sum(part.tokens for part in parts) / pieces))
        parts = calls.parts_of(text, lambda part: calls.tokens_of(part) <= least)
    return Plan(row, language, asked, wanted, tokens, pieces, parts, refine)


def _tokens_per_word(calls: Calls, text: str) -> float:
    sample = text[:4000]
    return max(1, calls.tokens_of(sample)) / max(1, len(words(sample)))


def summarise(calls: Calls, plan: Plan) -> Answer:
    """Return the summary of a text."""
    level = (_refined if plan.refine and len(plan.parts) > 1 else _hierarchical)(calls, plan)
    text = "\n".join(level.texts)
    most = plan.words
    if most:
        text = cut(text, "start", lambda part: len(words(part)) <= most) or text
    method = "whole" if len(plan.parts) == 1 else "refine" if plan.refine else "hierarchical"
    notes: tuple[str, ...] = ()
    if level.copied:
        notes = (
            f"the model left {level.copied:,} summaries empty; the first sentence of the text "
            "stands in place of each",
        )
    work = total(method, len(level.works), level.works, plan=plan.parts, notes=notes)
    return dataclasses.replace(level.last, text=text, shortened=False, work=work)


def _hierarchical(calls: Calls, plan: Plan) -> _Level:
    texts = [row.input for row in part_rows(plan.row, plan.row.input, plan.parts)]
    level = _summaries(calls, plan, texts)
    works = level.works
    copied = level.copied
    while len(level.texts) > plan.pieces:
        texts = _merged(calls, plan, level.texts)
        calls.expect(len(texts))
        level = _summaries(calls, plan, texts)
        works = works + level.works
        copied += level.copied
    return dataclasses.replace(level, works=works, copied=copied)


def _merged(calls: Calls, plan: Plan, summaries: Sequence[str]) -> list[str]:
    """Return the texts of the next level: summaries in order, as many as fit into each."""
    fits = calls.fitting(plan.task, plan.row, plan.language, plan.tokens)
    lines = [text + "\n" for text in summaries]
    texts = joined(lines, pack(lines, fits))
    if len(texts) < plan.pieces:
        # All fit into fewer prompts than the pieces of the summary: each has its share of them.
        ends = [len(lines) * (i + 1) // plan.pieces for i in range(plan.pieces)]
        shares = [lines[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        texts = [text for share in shares for text in joined(share, pack(share, fits))]
    return texts


def _refined(calls: Calls, plan: Plan) -> _Level:
    rows = part_rows(plan.row, plan.row.input, plan.parts)
    level = _summaries(calls, plan, [rows[0].input])
    works = level.works
    copied = level.copied
    task = refine_task(plan.task, plan.language)
    for row in rows[1:]:
        level = _summaries(calls, plan, [row.input], task, level.texts[0])
        works = works + level.works
        copied += level.copied
    return dataclasses.replace(level, works=works, copied=copied)


def _summaries(
    calls: Calls, plan: Plan, texts: Sequence[str], task: Task | None = None, so_far: str = ""
) -> _Level:
    """Summarize texts in batches; ``so_far`` stands before them in the prompt."""
    task = task or plan.task
    rows = [dataclasses.replace(plan.row, input=text, context=so_far) for text in texts]
    decode = dataclasses.replace(calls.decode_of(task), max_new_tokens=plan.tokens)
    decode = dataclasses.replace(decode, min_new_tokens=min(decode.min_new_tokens, plan.tokens))
    answers = calls.perform(task, rows, language=plan.language, decode=decode)
    found = []
    for text, answer in zip(texts, answers, strict=True):
        summary = answer.text or whole_sentences(text.strip())[0]
        found.append(_limited(calls, summary, plan.tokens))
    copied = sum(not answer.text for answer in answers)
    return _Level(found, [answer.work for answer in answers], copied, answers[-1])


def _limited(calls: Calls, text: str, tokens: int) -> str:
    """Return as much of a summary as ``tokens`` hold: so two of them always fit one prompt."""
    fits = lambda part: calls.tokens_of(part) <= tokens  # noqa: E731
    return cut(text, "start", fits) or broken(text, fits)[0].strip()
