"""--eval and --score: score the answers to many rows."""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtnlg_jax.cli.decoding import shared_flags
from mtnlg_jax.cli.decoding.output import dump
from mtnlg_jax.cli.task_modes import options, performing
from mtnlg_jax.cli.task_modes.rows import read_rows

if TYPE_CHECKING:
    from mtnlg_jax.tasks.answers import Answer, Evaluation
    from mtnlg_jax.tasks.rendering import Row
    from mtnlg_jax.tasks.templates import Task


class MetricsFailed(Exception):
    """The answers are complete but could not be scored."""

    exit_code = 1


def evaluate_rows(task: "Task") -> None:
    """Answer the rows of --eval, write each answer to --output, and print the scores."""
    from mtnlg_jax.tasks.answers import AnswersFile, check_references

    notes: list[str] = []
    rows = read_rows(task, options.EVAL.value, options.LIMIT.value, notes)
    if not options.LAST_WORD.value:
        check_references(task, rows, options.LANGUAGE.value)
    support = performing.read_support(task, notes)
    path = options.OUTPUT.value
    if not path:
        folder = tempfile.mkdtemp(prefix="mtnlg_jax_task_")
        path = os.path.join(folder, "answers.jsonl")
    file = AnswersFile(path, rows)
    try:
        run, answers = performing.perform(task, rows, support, file.add)
        _report(task, rows, answers, notes, run.step)
    except BaseException:
        file.close()
        if os.path.getsize(path):
            print(f"the answers so far are in {path}; --score={path} scores them", file=sys.stderr)
        else:
            _remove(path)
        raise
    file.close()
    if not options.OUTPUT.value:
        _remove(path)


def _remove(path: str) -> None:
    """Remove the file of answers, and its folder if that is temporary."""
    os.remove(path)
    if not options.OUTPUT.value:
        os.rmdir(os.path.dirname(path))


def score_answers(task: "Task") -> None:
    """Score the answers of --score, without a model."""
    from mtnlg_jax.tasks.answers import check_references, read_answers

    notes: list[str] = []
    path = options.EVAL.value
    rows = read_rows(task, path, options.LIMIT.value, notes) if path else None
    rows, answers = read_answers(options.SCORE.value, task, rows, options.LANGUAGE.value)
    if not all(answer.finish_reason == "last word" for answer in answers):
        check_references(task, rows, options.LANGUAGE.value)
    _report(task, rows, answers, notes, None)


def _report(
    task: "Task",
    rows: Sequence["Row"],
    answers: Sequence["Answer"],
    notes: list[str],
    step: int | None,
) -> None:
    """Score the answers and print the scores; ``step`` is that of the model, if there is one."""
    from mtnlg_jax.tasks.answers import evaluate

    try:
        result = evaluate(task, rows, answers, language=options.LANGUAGE.value)
    except Exception as error:
        raise MetricsFailed(
            f"error: the metrics failed ({type(error).__name__}: {error})"
        ) from error
    shown = [answer.examples for answer in answers]
    content = {
        "task": task.name,
        "step": step,
        "examples": {"min": min(shown), "max": max(shown)},
        "shortened": sum(answer.shortened for answer in answers),
        "context_shortened": sum(answer.context_shortened for answer in answers),
        "ranked_by": next((answer.ranked_by for answer in answers if answer.ranked_by), ""),
        "notes": notes,
        "output": options.OUTPUT.value,
    }
    if shared_flags.JSON.value:
        print(dump(content | dataclasses.asdict(result)))
        return
    _print_scores(result, content, sum(bool(row.context) for row in rows))


def _print_scores(result: "Evaluation", content: dict, with_context: int) -> None:
    """Print the scores beside those of the baseline, below a line that describes the rows."""
    for note in content["notes"]:
        print(f"note: {note}", file=sys.stderr)
    step = content["step"]
    shown = content["examples"]
    parts = [
        f"{result.rows:,} rows",
        f"answers of {options.SCORE.value}" if step is None else f"checkpoint of step {step}",
        f"{shown['min']} to {shown['max']} examples",
        f"{content['shortened']:,} inputs shortened",
    ]
    if with_context:
        parts.append(f"{content['context_shortened']:,} of {with_context:,} contexts shortened")
    if content["ranked_by"]:
        parts.append(f"ranked by {content['ranked_by']}")
    print(f"{content['task']}: {', '.join(parts)}; 95 % intervals by bootstrap")
    print(f"{'':12}  {'model':24}  {result.baseline}")
    for name, score in result.scores.items():
        print(f"{name:12}  {str(score):24}  {result.baseline_scores.get(name, '')}".rstrip())
    for name, score in result.normalised.items():
        print(f"  {name:10}  {score}")
    if content["output"]:
        print(f"answers in {content['output']}")
