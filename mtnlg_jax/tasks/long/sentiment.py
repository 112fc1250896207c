"""The label of a long review by its parts, and labels of aspects.

Each part is ranked alone. A part votes with the probability of every label among all labels. Its
weight is its number of tokens times the margin of its best label over the second: long and decided
parts count most. The probability of a label for the whole is the weighted mean over the parts. If
every margin is 0, tokens alone are the weights.
"""

import dataclasses
import math
from collections.abc import Sequence

from mtnlg_jax.data.read.documents import Document
from mtnlg_jax.tasks.answers import Answer, Choice
from mtnlg_jax.tasks.long.calls import Calls, part_rows, whole_text
from mtnlg_jax.tasks.long.glossary import pattern_of
from mtnlg_jax.tasks.passages import split
from mtnlg_jax.tasks.rendering import Row
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.text import normalize
from mtnlg_jax.tasks.work import Aspect, Part, Vote, total

# Characters of a part that mentions an aspect: a sentence or two.
ASPECT_SIZE = 200
_ASPECT_PROMPTS = {
    "en": ("Is each review positive or negative about {aspect}?\n\n", "Sentiment about {aspect}:"),
    "zh": ("判断每条评论对{aspect}是正面还是负面。\n\n", "对{aspect}的情感："),
}
_PROMPTS = {"en": "Review: {input}\n", "zh": "评论：{input}\n"}


@dataclasses.dataclass(frozen=True)
class Plan:
    row: Row
    language: str
    parts: tuple[Part, ...]  # of the whole review
    aspects: tuple[tuple[str, tuple[Part, ...]], ...]  # (name, the parts that mention it)

    @property
    def calls(self) -> int:
        return len(self.parts) + sum(len(parts) for _, parts in self.aspects)


def plan(calls: Calls, task: Task, row: Row, aspects: Sequence[str]) -> Plan:
    """Return the parts of a review and those that mention each aspect.

    Raises ValueError if the prompt leaves no room.
    """
    text = whole_text(row.input)
    row = dataclasses.replace(row, input=text)
    language = calls.language_of(task, text)
    parts = calls.parts_of(text, calls.fitting(task, row, language, 0))
    found = []
    for aspect in aspects:
        words = [word.strip() for word in aspect.split("|") if word.strip()]
        asked = _aspect_task(task, words[0], language)
        fits = calls.fitting(asked, row, language, 0)
        mentions = _mentions(text, words)
        # A passage that does not fit the prompt is broken as the review is.
        pieces = [
            Part(start + part.start, start + part.end, part.tokens)
            for start, end in mentions
            for part in calls.parts_of(text[start:end], fits)
        ]
        found.append((words[0], tuple(pieces)))
    return Plan(row, language, parts, tuple(found))


def judge(calls: Calls, task: Task, plan: Plan) -> Answer:
    """Return the label of a review by the vote of its parts, and those of its aspects."""
    text = plan.row.input
    rows = part_rows(plan.row, text, plan.parts)
    answers = calls.perform(task, rows, language=plan.language)
    works = [answer.work for answer in answers]
    aspects = []
    for name, parts in plan.aspects:
        rows = part_rows(plan.row, text, parts)
        asked = _aspect_task(task, name, plan.language)
        found = calls.perform(asked, rows, language=plan.language) if rows else []
        works += [answer.work for answer in found]
        votes = votes_of(parts, found)
        choices = vote(votes, found)
        label = choices[0].label if choices else ""
        probability = choices[0].probability if choices else 0.0
        aspects.append(Aspect(name, label, probability, votes))
    votes = votes_of(plan.parts, answers)
    work = total(
        "whole" if len(plan.parts) == 1 else "parts",
        plan.calls,
        works,
        plan=plan.parts,
        votes=votes,
        aspects=tuple(aspects),
    )
    if len(answers) == 1:
        return dataclasses.replace(answers[0], work=work)
    choices = vote(votes, answers)
    best = max(
        answers, key=lambda each: (each.text == choices[0].label, each.choices[0].probability)
    )
    return dataclasses.replace(
        best,
        text=choices[0].label,
        raw=choices[0].text,
        choices=choices,
        ranked_by=f"vote of {len(answers)} parts by {best.ranked_by}",
        work=work,
    )


def votes_of(parts: Sequence[Part], answers: Sequence[Answer]) -> tuple[Vote, ...]:
    """Return the vote of each part."""
    votes = []
    for part, answer in zip(parts, answers, strict=True):
        first, second = sorted((each.probability for each in answer.choices), reverse=True)[:2]
        best = max(answer.choices, key=lambda each: each.probability)
        margin = first - second
        votes.append(Vote(part, best.label, first, margin, part.tokens * margin))
    return tuple(votes)


def vote(votes: Sequence[Vote], answers: Sequence[Answer]) -> tuple[Choice, ...]:
    """Return the labels by falling weighted mean of their probabilities.

    ``score`` is the logarithm of that mean, and ``log_prob`` the weighted mean of the parts'.
    """
    if not votes:
        return ()
    weights = [each.weight for each in votes]
    if not sum(weights):
        weights = [max(1, each.part.tokens) for each in votes]
    share = [weight / sum(weights) for weight in weights]
    choices = []
    for label in sorted({choice.label for choice in answers[0].choices}):
        of_parts = [
            next(choice for choice in answer.choices if choice.label == label) for answer in answers
        ]
        pairs = list(zip(share, of_parts, strict=True))
        probability = math.fsum(weight * choice.probability for weight, choice in pairs)
        log_prob = math.fsum(weight * choice.log_prob for weight, choice in pairs)
        score = math.log(max(probability, 1e-300))
        choices.append(Choice(label, of_parts[0].text, score, log_prob, probability))
    return tuple(sorted(choices, key=lambda choice: -choice.probability))


def _mentions(text: str, words: Sequence[str]) -> list[tuple[int, int]]:
    """Return (start, end) of the passages that hold a word of an aspect, in their order."""
    patterns = [pattern_of(normalize(word)) for word in words]
    return [
        (passage.start, passage.end)
        for passage in split(Document(text, "input"), ASPECT_SIZE)
        if any(pattern.search(normalize(passage.text)) for pattern in patterns)
    ]


def _aspect_task(task: Task, aspect: str, language: str) -> Task:
    """Return the task that asks about one aspect, with the labels of ``task``."""
    instruction, asked = _ASPECT_PROMPTS.get(language, _ASPECT_PROMPTS["en"])
    before = _PROMPTS.get(language, _PROMPTS["en"])
    template = dataclasses.replace(
        task.templates[language],
        instruction=instruction.replace("{aspect}", aspect),
        prompt=before + asked.replace("{aspect}", aspect.replace("{", "").replace("}", "")),
    )
    return dataclasses.replace(task, templates={**task.templates, language: template})
