"""Answers of a task: their fields, their file and their scores. Needs neither a model nor JAX."""

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
from mtnlg_jax.tasks.profile import Entry
from mtnlg_jax.tasks.rendering import Row, answer_of, template_of
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.work import Work

NORMALIZATIONS = ("sum", "per_char", "per_byte")


@dataclass(frozen=True)
class Choice:
    """Log-probabilities are natural logarithms."""

    label: str
    # The scored text after the prompt or the blank. It includes the end of the prompt if the choice
    # joins its last token (see `decode.rank.rank`).
    text: str
    score: float  # the ranking score; see `Answer.ranked_by`
    log_prob: float  # log p(text | prompt), the sum over its tokens
    # exp(log_prob) over its sum for all choices: probability of this label among all labels
    probability: float


@dataclass(frozen=True)
class Answer:
    text: str  # after post-processing; for a ranking, the best label or choice
    raw: str  # the unprocessed output of the model, or the ranked text
    language: str  # of the answer
    # "stop", "length" or "timeout" for generated answers, "ranked" for choices, "last word" for
    # answers compared with the reference.
    finish_reason: str
    choices: tuple[Choice, ...]  # best first; empty if the answer was generated
    citations: tuple[Passage, ...]  # the passages in the prompt: the first is [1]
    examples: int  # number of examples in the prompt
    shortened: bool  # part of the input was left out
    context_shortened: bool  # part of the row's own context was left out
    prompt: str  # with a blank, the prompt of the best choice
    # Scorer and normalization, such as "logprob per_byte"; empty if the answer was generated.
    ranked_by: str = ""
    log_prob: float | None = None  # of the reference after the prompt, for last words
    profile: tuple[Entry, ...] = ()  # the entries of the person's profile in the prompt
    work: Work | None = None  # parts, calls and tokens; None in answers read from a file


@dataclass(frozen=True)
class Evaluation:
    rows: int
    scores: dict[str, Score]  # of the model; the first is the main metric of the task
    baseline: str  # name of the baseline
    baseline_scores: dict[str, Score]
    # Accuracy of choices under each of NORMALIZATIONS; empty without choices.
    normalised: dict[str, Score]


def length_of(normalise: str, text: str) -> int:
    """Return the divisor of a log-probability.

    This is 1 for "sum", otherwise the number of characters or UTF-8 bytes of the text without
    leading white space, at least 1. In lm-evaluation-harness, "sum" is acc and "per_char" is
    acc_norm, which divides by len(choice) without the space that joins it to the prompt. "per_byte"
    differs from it only for choices with characters outside ASCII.
    """
    if normalise == "sum":
        return 1
    text = text.lstrip()
    return max(1, len(text) if normalise == "per_char" else len(text.encode()))


def check_references(task: Task, rows: Sequence[Row], language: str | None = None) -> None:
    """Check that all rows can be scored together.

    Raises:
      ValueError: a row has no reference, its reference is none of its labels or choices, or it has
        no choices although others do.
    """
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
            f"{sum(ranked)} of {len(rows)} rows have choices and the others have none, the first "
            f"of them row {ranked.index(False) + 1}; score the two groups separately"
        )


def evaluate(
    task: Task,
    rows: Sequence[Row],
    answers: Sequence[Answer],
    seed: int = 0,
    language: str | None = None,
) -> Evaluation:
    """Score answers, and those of a trivial baseline, against the references of the rows.

    ``language`` is that of the inputs, as in `template_of`. Raises ValueError as `check_references`
    does.
    """
    references = [row.references for row in rows]
    texts = [answer.text for answer in answers]
    languages = [answer.language for answer in answers]
    if all(answer.finish_reason == "last word" for answer in answers):
        commonest = max(references, key=references.count)[0]
        guess = measure(("accuracy",), [commonest] * len(rows), references, languages, seed)
        scores = measure(("accuracy",), texts, references, languages, seed)
        log_probs = np.array([answer.log_prob for answer in answers], np.float64)
        scores["perplexity"] = _perplexity(log_probs, seed)
        return Evaluation(len(rows), scores, "the commonest word", guess, {})
    check_references(task, rows, language)
    if rows[0].choices:
        scores = measure(("accuracy",), texts, references, languages, seed)
        return Evaluation(
            len(rows),
            scores,
            "by chance",
            {"accuracy": chance(rows, seed)},
            _accuracy_by_normalization(rows, answers, seed),
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


def _accuracy_by_normalization(
    rows: Sequence[Row], answers: Sequence[Answer], seed: int
) -> dict[str, Score]:
    # Only the scores of "logprob" can be normalized another way.
    if not all(answer.choices and answer.ranked_by.startswith("logprob ") for answer in answers):
        return {}
    found = {}
    for name in NORMALIZATIONS:
        right = [
            max(
                answer.choices, key=lambda choice: choice.log_prob / length_of(name, choice.text)
            ).label
            in row.references
            for row, answer in zip(rows, answers, strict=True)
        ]
        found[name] = mean(np.array(right, np.float64), seed)
    return found


def _perplexity(values: np.ndarray, seed: int) -> Score:
    """Return e^-(mean log-probability of a reference) with its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Score(*(math.exp(min(-float(each), 700.0)) for each in (values.mean(), high, low)))


# Files of answers


def record_of(number: int, row: Row, answer: Answer) -> dict:
    """Return one line of an answers file: the row and the fields of its `Answer`.

    ``row`` counts from 1; ``options`` are the choices of the row in their order.
    """
    asked = {"row": number, "input": row.input, "references": list(row.references)}
    asked |= {"context": row.context} if row.context else {}
    asked |= {"options": list(row.choices)} if row.choices else {}
    return asked | dataclasses.asdict(answer)


class AnswersFile:
    """An answers file to which each answer is appended at once, so an interruption loses none."""

    def __init__(self, path: str | os.PathLike, rows: Sequence[Row]):
        """Create the file; raise FileExistsError if it exists."""
        self.path = Path(path)
        self._rows = rows
        self._file = open(self.path, "x", encoding="utf-8", newline="\n")

    def add(self, index: int, answer: Answer) -> None:
        line = json.dumps(
            record_of(index + 1, self._rows[index], answer), ensure_ascii=False, allow_nan=False
        )
        # Lone surrogates cannot be encoded as UTF-8.
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
    """Read (rows, answers) to score from a file of any origin.

    .txt holds one answer per line, in the order of ``rows``; ``\\n`` in it is a line break of the
    answer. .jsonl, .ndjson and .json (lines or a list) hold objects in the format of `record_of`.
    ``text`` is required (or answer, prediction, output, response, completion, generated_text);
    without ``rows``, so are ``input`` and ``references`` (or reference). If every object has a
    ``row``, it is the number of the answered row, counted from 1; otherwise the order is the same.

    Raises:
      OSError: the file cannot be read.
      ValueError: answers and rows do not match.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8-sig")
    lines = text.split("\n")
    items: Sequence[Mapping]
    if path.suffix.lower() == ".txt":
        if rows is None:
            raise ValueError(f"{path} holds answers without rows; give the rows with --eval")
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
            "give one for each (--limit removes rows)"
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
            "rows in all; "
            "let the model finish, or give only the answered rows"
        )
    if len(found) > count:
        raise ValueError(
            f"{path} answers {len(found):,} rows, and there are {count:,}; give the answered rows"
        )
    return [found[number] for number in range(1, count + 1)]


def _row_of(where: str, item: Mapping) -> Row:
    references = item.get("references", item.get("reference"))
    if references is None or references == [] or references == "":
        raise ValueError(
            f"{where} has no references, only {', '.join(map(str, item))[:80]}; "
            "add them, or give the rows with --eval"
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
            f"{where} has no text, only {', '.join(map(str, item))[:80]}; "
            f"give it as one of {', '.join(keys)}"
        )
    seen, template = template_of(task, row.input, language)
    # Choices of a ranking by record_of; files of other origin may hold anything here.
    choices = item.get("choices") or ()
    try:
        choices = tuple(Choice(**choice) for choice in choices)
    except (TypeError, AttributeError):
        choices = ()
    log_prob = item.get("log_prob")
    finish = item.get("finish_reason", "")
    if finish == "last word" and log_prob is None:
        finish = ""
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
