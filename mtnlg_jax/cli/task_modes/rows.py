"""Read the input of a task: one text, or the rows of a file."""

import dataclasses
from typing import TYPE_CHECKING

from mtnlg_jax import command
from mtnlg_jax.cli.task_modes import options

if TYPE_CHECKING:
    from mtnlg_jax.tasks.rendering import Row
    from mtnlg_jax.tasks.templates import Task

_EXAMPLES = {
    "columns": "input=0,reference=1",
    "labels": "0=negative,1=positive",
    "score_weights": "repetition=4,outline=0",
}


def read_input() -> str:
    """Return the text of --input or standard input."""
    name, text = command.read_text(options.INPUT.value, "the text", "utf-8-sig")
    if not text.strip():
        raise ValueError(f"{name} is empty; give a text to work on")
    return text


def read_rows(
    task: "Task", path: str, limit: int | None, notes: list[str] | None = None
) -> list["Row"]:
    """Return the rows of a file as --columns, --labels, --choices, --blank and --last_word say.

    ``notes`` receives a line for each guess of the reader.
    """
    from mtnlg_jax.tasks import examples
    from mtnlg_jax.tasks.prompts import split_last_word

    needs = ("input",) if options.LAST_WORD.value else ("input", "reference")
    columns = read_assignments("columns", options.COLUMNS.value)
    rows = examples.read_rows(
        path,
        columns or None,
        read_assignments("labels", options.LABELS.value),
        limit,
        needs,
        seed=options.SEED.value or 0,
        choices=options.CHOICES.value,
        notes=notes,
    )
    if options.BLANK.value:
        if not task.joined:
            raise ValueError(
                f"--blank={options.BLANK.value} fills the input itself, and task {task.name!r} "
                "asks about the input; use --task=continue"
            )
        rows = [dataclasses.replace(row, blank=options.BLANK.value) for row in rows]
    return [split_last_word(row) for row in rows] if options.LAST_WORD.value else rows


def read_assignments(flag: str, entries: list[str]) -> dict[str, str]:
    """Return {name: value} of the entries NAME=VALUE of a flag in `_EXAMPLES`."""
    found: dict[str, str] = {}
    name = ""
    for entry in entries:
        if flag == "columns" and "=" not in entry and name:
            found[name] += f"+{entry}"  # choices=sol1,sol2
            continue
        name, equals, value = entry.partition("=")
        if not equals or not value:
            raise ValueError(
                f"--{flag}={entry} is not of the form NAME=VALUE, as in --{flag}={_EXAMPLES[flag]}"
            )
        if name in found:
            raise ValueError(f"--{flag} names {name!r} twice; keep one of them")
        found[name] = value
    return found
