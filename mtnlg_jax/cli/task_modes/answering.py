"""--input: answer one text."""

import dataclasses
import sys
from typing import TYPE_CHECKING

from mtnlg_jax.cli.decoding import devices, shared_flags
from mtnlg_jax.cli.decoding.output import dump
from mtnlg_jax.cli.task_modes import options, performing, profiles
from mtnlg_jax.cli.task_modes.long_printing import print_work
from mtnlg_jax.cli.task_modes.rows import read_input

if TYPE_CHECKING:
    from mtnlg_jax.tasks.answers import Answer
    from mtnlg_jax.tasks.rendering import Row
    from mtnlg_jax.tasks.templates import Task


def answer_input(task: "Task") -> None:
    """Answer the text of --input or standard input, and print the answer."""
    from mtnlg_jax.tasks.rendering import Row

    row = Row(devices.on_first(read_input), choices=tuple(options.CHOICES.value))
    notes: list[str] = []
    support = performing.read_support(task, notes)
    run, answers = performing.perform(task, [row], support)
    answer = answers[0]
    if shared_flags.JSON.value:
        head = {"task": task.name, "step": run.step, "input": row.input}
        print(dump(head | dataclasses.asdict(answer)))
        return
    _print_answer(task, row, answer)
    if support["profile"] is not None:
        print(profiles.describe(support["profile"], answer), file=sys.stderr)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _print_answer(task: "Task", row: "Row", answer: "Answer") -> None:
    """Print the answer, its choices and citations, and what was shortened."""
    print((row.input.rstrip() if task.joined else "") + answer.text)
    for choice in answer.choices:
        print(f"  {choice.probability:6.1%}  {choice.label}  ({choice.score:.4f})")
    if answer.choices:
        print(
            f"(probability among these choices, and {answer.ranked_by} in nats, which ranks them)"
        )
    for number, passage in enumerate(answer.citations, 1):
        print(
            f"[{number}] {passage.source}, characters {passage.start} to {passage.end}: "
            f"{passage.text[:60]!r} ..."
        )
    print_work(answer)
    for part, shortened in (
        ("input", answer.shortened),
        ("input's own context", answer.context_shortened),
    ):
        if shortened:
            print(f"(the {part} was shortened to the model's context)", file=sys.stderr)
