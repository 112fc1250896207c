"""Answers of a task: what each holds, the file in which they are kept, and their scores. Needs no
model and no JAX."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtnlg_jax.tasks.metrics import RESAMPLES, Score, baseline, chance, mean, measure
from mtnlg_jax.tasks.passages import Passage
from mtnlg_jax.tasks.rendering import Row, answer_of, template_of
from mtnlg_jax.tasks.templates import Task

NORMALISATIONS = ("sum", "per_char", "per_byte")


@dataclass(frozen=True)
class Choice:
    """Log-probabilities are natural logarithms."""

    label: str
    # What was scored: the text behind the prompt, or behind the blank; with the end of the prompt
    # where the choice joins its last token (see `decode.rank.rank`).
    text: str
    score: float  # what it was ranked by: see `Answer.ranked_by`
    log_prob: float  # log p(text | prompt), the sum over its tokens
    # exp(log_prob) over the sum of all choices: that it is this one, given that it is one of them
    probability: float


@dataclass(frozen=True)
class Answer:
    text: str  # after post-processing; of a ranking the best label or choice
    raw: str  # as the model wrote it, or the text that was ranked
    language: str  # of the answer
    # "stop", "length" or "timeout" of what was written, "ranked" of what was chosen, "last word" of
    # what was compared with the reference.
    finish_reason: str
    choices: tuple[Choice, ...]  # best first; empty where the answer was written
    citations: tuple[Passage, ...]  # the passages in the prompt: the first is [1]
    examples: int  # in the prompt
    shortened: bool  # part of the input was left out
    context_shortened: bool  # part of the row's own context was left out
    prompt: str  # with a blank, the one of the best choice
    ranked_by: str = (
        ""  # scorer and normalisation, as "logprob per_byte"; empty where the answer was written
    )
    log_prob: float | None = None  # of the reference behind the prompt, for last words


@dataclass(frozen=True)
class Evaluation:
    rows: int
    scores: dict[str, Score]  # of the model; the first is the task's own
    baseline: str  # what was done without a model
    baseline_scores: dict[str, Score]
    normalised: dict[
        str, Score
    ]  # accuracy of choices under each of NORMALISATIONS; empty where there are none


def length_of(normalise: str, text: str) -> int:
    """What a log-probability is divided by: 1 ("sum"), or the characters or UTF-8 bytes of the text
    without the white space before it, at least 1. In the terms of lm-evaluation-harness "sum" gives
    acc and "per_char" acc_norm, whose divisor is len(choice) without the space that joins it to the
    prompt; "per_byte" differs from that only where a choice has characters outside ASCII."""
    if normalise == "sum":
        return 1
    text = text.lstrip()
    return max(1, len(text) if normalise == "per_char" else len(text.encode()))


def check_references(task: Task, rows: Sequence[Row], language: str | None = None) -> None:
    """Raises ValueError where rows cannot be scored together: one lacks a reference, has one that
    is none of its labels or choices, or has no choices where others have some."""
    ranked = []
    for number, row in enumerate(rows, 1):
        try:
            template = template_of(task, row.input, language)[1]
            answer_of(task, template, row)
        except ValueError as error:
            raise ValueError(f"row {number} of {len(rows)}: {error}") from None
        ranked.append(bool(row.choices or template.labels))
    if any(ranked) != all(ranked):
        raise ValueError(
            f"{sum(ranked)} of {len(rows)} rows have choices and the others have "
            "none, the first of them "
            f"row {ranked.index(False) + 1}; score the two apart"
        )


def evaluate(
    task: Task,
    rows: Sequence[Row],
    answers: Sequence[Answer],
    seed: int = 0,
    language: str | None = None,
) -> Evaluation:
    """The metrics of answers, and of those of the trivial baseline, against the rows' references.
    ``language`` of the inputs, as in `template_of`. Raises ValueError as `check_references`
    does."""
    references = [row.references for row in rows]
    texts = [answer.text for answer in answers]
    languages = [answer.language for answer in answers]
    if all(answer.finish_reason == "last word" for answer in answers):
        commonest = max(references, key=references.count)[0]
        guess = measure(("accuracy",), [commonest] * len(rows), references, languages, seed)
        scores = measure(("accuracy",), texts, references, languages, seed)
        scores["perplexity"] = _perplexity([answer.log_prob for answer in answers], seed)
        return Evaluation(len(rows), scores, "the commonest word", guess, {})
    check_references(task, rows, language)
    if rows[0].choices:
        scores = measure(("accuracy",), texts, references, languages, seed)
        return Evaluation(
            len(rows),
            scores,
            "by chance",
            {"accuracy": chance(rows, seed)},
            _normalised(rows, answers, seed),
        )
    ranked = bool(template_of(task, rows[0].input, language)[1].labels)
    names = ("accuracy",) if ranked else task.metrics
    name, trivial = baseline(task, rows, language)
    return Evaluation(
        len(rows),
        measure(names, texts, references, languages, seed),
        name,
        measure(names, trivial, references, languages, seed),
        {},
    )


def _normalised(rows: Sequence[Row], answers: Sequence[Answer], seed: int) -> dict[str, Score]:
    # Other scorers have no log-probability that could be normalised another way.
    if not all(answer.choices and answer.ranked_by.startswith("logprob ") for answer in answers):
        return {}
    found = {}
    for name in NORMALISATIONS:
        right = [
            max(
                answer.choices, key=lambda choice: choice.log_prob / length_of(name, choice.text)
            ).label
            in row.references
            for row, answer in zip(rows, answers, strict=True)
        ]
        found[name] = mean(np.array(right, np.float64), seed)
    return found


def _perplexity(log_probs: Sequence[float], seed: int) -> Score:
    """e^-(mean log-probability of a reference), 1 or above, with its 95 % interval by bootstrap."""
    values = np.array(log_probs, np.float64)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Score(*(math.exp(min(-float(each), 700.0)) for each in (values.mean(), high, low)))


# Files of answers


def record_of(number: int, row: Row, answer: Answer) -> dict:
    """A line of a file of answers: the row (``row`` counts from 1, ``options`` are its choices in
    their order) and the fields of its `Answer`."""
    asked = {"row": number, "input": row.input, "references": list(row.references)}
    asked |= {"context": row.context} if row.context else {}
    asked |= {"options": list(row.choices)} if row.choices else {}
    return asked | dataclasses.asdict(answer)


class AnswersFile:
    """A file of answers that grows by a line an answer, so that what is done is kept whatever
    happens next."""

    def __init__(self, path: str | os.PathLike, rows: Sequence[Row]):
        """Raises FileExistsError where there is something already."""
        self.path = Path(path)
        self._rows = rows
        self._file = open(self.path, "x", encoding="utf-8", newline="\n")

    def add(self, index: int, answer: Answer) -> None:
        line = json.dumps(
            record_of(index + 1, self._rows[index], answer), ensure_ascii=False, allow_nan=False
        )
        # Lone surrogates have no UTF-8.
        self._file.write(line.encode("utf-8", "replace").decode() + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_answers(
    path: str | os.PathLike,
    task: Task,
    rows: Sequence[Row] | None = None,
    language: str | None = None,
) -> tuple[list[Row], list[Answer]]:
    """(rows, answers) to score, of anybody's making.

    .txt: an answer a line, of ``rows`` in their order, a ``\\n`` in it a line break of the answer.
    .jsonl, .ndjson, .json (lines or a list): objects as `record_of` makes them, of which ``text``
    is needed (or answer, prediction, output, response, completion, generated_text), and without
    ``rows`` also ``input`` and ``references`` (or reference). Where every object has a ``row``, it
    says which row of ``rows`` it answers, counted from 1, else they stand in the same order. Raises
    OSError, and ValueError where answers and rows do not match.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8-sig")
    lines = text.split("\n")
    if path.suffix.lower() == ".txt":
        if rows is None:
            raise ValueError(
                f"{path} holds answers alone; name the rows that they answer with --eval"
            )
        while lines and not lines[-1].strip():
            lines.pop()
        items = [{"text": line.rstrip("\r").replace("\\n", "\n")} for line in lines]
    elif path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        items = _records(path, text, lines)
    else:
        raise ValueError(
            f"{path} has an unknown suffix; answers are read from .jsonl, .ndjson, .json and .txt"
        )
    if not items:
        raise ValueError(f"{path} holds no answers; give at least one")
    if rows is None:
        rows = [_row_of(f"{path}, answer {number}", item) for number, item in enumerate(items, 1)]
    elif all("row" in item for item in items):
        items = _in_order(path, items, len(rows))
    if len(items) != len(rows):
        raise ValueError(
            f"{path} holds {len(items):,} answers, and there are {len(rows):,} rows; "
            "give one for each "
            "(a --limit takes rows away)"
        )
    return list(rows), [
        _answer_of(f"{path}, answer {number}", item, task, row, language)
        for number, (item, row) in enumerate(zip(items, rows, strict=True), 1)
    ]


def _records(path: Path, text: str, lines: list[str]) -> list[dict]:
    read: Callable = lambda part: json.loads(part, strict=False)  # noqa: E731
    try:
        if text.lstrip().startswith("["):
            items = read(text)
        else:
            items = [read(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); a line that was cut short may be deleted"
        ) from None
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise ValueError(
                f"{path}, answer {number}: a {type(item).__name__}, not an object with a text"
            )
    return items


def _in_order(path: Path, items: Sequence[Mapping], count: int) -> list[Mapping]:
    found = {item["row"]: item for item in items}
    if len(found) < len(items):
        raise ValueError(
            f"{path} answers {len(items) - len(found)} rows twice; keep one answer for each"
        )
    missing = [number for number in range(1, count + 1) if number not in found]
    if missing:
        raise ValueError(
            f"{path} has no answer to row {missing[0]}, {len(missing):,} of {count:,} "
            "rows in all; let "
            "the model finish, or give the rows that it answered"
        )
    if len(found) > count:
        raise ValueError(
            f"{path} answers {len(found):,} rows, and there are {count:,}; give the "
            "rows that it answered"
        )
    return [found[number] for number in range(1, count + 1)]


def _row_of(where: str, item: Mapping) -> Row:
    references = item.get("references", item.get("reference"))
    if references is None or references == [] or references == "":
        raise ValueError(
            f"{where} has no references, only {', '.join(map(str, item))[:80]}; add "
            "them, or name the "
            "rows with --eval"
        )
    references = references if isinstance(references, list) else [references]
    return Row(
        str(item.get("input") or ""),
        tuple(map(str, references)),
        str(item.get("context") or ""),
        tuple(map(str, item.get("options") or ())),
    )


def _answer_of(where: str, item: Mapping, task: Task, row: Row, language: str | None) -> Answer:
    keys = ("text", "answer", "prediction", "output", "response", "completion", "generated_text")
    key = next((key for key in keys if key in item), None)
    if key is None or not isinstance(item[key], str):
        raise ValueError(
            f"{where} has no text, only {', '.join(map(str, item))[:80]}; give it as "
            "one of "
            f"{', '.join(keys)}"
        )
    seen, template = template_of(task, row.input, language)
    # Those of a ranking by record_of; others may have put anything there.
    choices = item.get("choices") or ()
    try:
        choices = tuple(Choice(**choice) for choice in choices)
    except (TypeError, AttributeError):
        choices = ()
    log_prob = item.get("log_prob")
    finish = (
        item.get("finish_reason", "")
        if log_prob is not None or item.get("finish_reason") != "last word"
        else ""
    )
    return Answer(
        item[key],
        item.get("raw", item[key]),
        item.get("language") or template.answer_language or seen,
        finish,
        choices,
        (),
        item.get("examples", 0),
        bool(item.get("shortened")),
        bool(item.get("context_shortened")),
        item.get("prompt", ""),
        item.get("ranked_by", ""),
        log_prob,
    )
