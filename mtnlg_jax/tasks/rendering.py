"""Render one row of a task with a template: its prompt, its answer and its candidates."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from mtnlg_jax.data.segment import UNSPACED, language_of
from mtnlg_jax.tasks.passages import Passage
from mtnlg_jax.tasks.templates import LANGUAGES, Task, Template, check_choices, fill_in
from mtnlg_jax.tasks.text import normalize


@dataclass(frozen=True)
class Row:
    input: str
    # Right answers: the best match counts, and the first is trained on.
    references: tuple[str, ...] = ()
    context: str = ""  # a passage that comes with the row
    choices: tuple[str, ...] = ()  # answers to choose from, other than the labels of the task
    # The mark in the input that the choices replace. Tasks that continue the input then score the
    # text after it.
    blank: str = ""

    def __post_init__(self):
        if isinstance(self.references, str):
            object.__setattr__(self, "references", (self.references,))


def template_of(task: Task, text: str, language: str | None = None) -> tuple[str, Template]:
    """Return the language of a text, given or detected, and the task's template for it."""
    chosen = language or language_of(text)
    if chosen not in task.templates:
        raise ValueError(
            f"language={chosen!r} has no template in task {task.name!r}; choose from "
            f"{', '.join(task.templates)}, or add one with a templates file"
        )
    return chosen, task.templates[chosen]


def render(
    task: Task,
    template: Template,
    row: Row,
    passages: Sequence[Passage] = (),
    text: str | None = None,
) -> str:
    """Return the prompt of one row without instruction; ``text`` replaces the input of the row."""
    shown = "".join(
        fill_in(template.passage, number=str(number), text=normalize(passage.text))
        for number, passage in enumerate(passages, 1)
    )
    choices = ""
    if "{choices}" in template.prompt:
        choices = "".join(
            fill_in(template.choice, letter=letter, text=normalize(choice))
            for letter, choice in zip(_letters(row), row.choices, strict=True)
        )
    return fill_in(
        template.prompt,
        input=input_of(task, row) if text is None else text,
        passages=shown,
        choices=choices,
    )


def answer_of(task: Task, template: Template, row: Row) -> str:
    """Return the text that a model should write after the prompt of a row.

    The text comes from the first reference; a label is replaced by its word in the template.
    """
    if not row.references or not row.references[0].strip():
        raise ValueError(
            f"the row with input {row.input[:40]!r} has no reference; give it a right answer"
        )
    answer = row.references[0]
    words = dict(template.labels)
    if words and not row.choices:
        if answer not in words:
            raise ValueError(
                f"reference {answer[:40]!r} is none of the labels {', '.join(words)}; "
                "map references to labels, as in "
                f"--labels={answer.split()[0][:20]}={next(iter(words))}"
            )
        return fill_in(template.answer, answer=words[answer])
    if row.choices:
        if answer not in row.choices:
            raise ValueError(
                f"reference {answer[:40]!r} is none of the {len(row.choices)} choices of the row "
                f"with input {row.input[:40]!r}; copy it exactly"
            )
        return dict(candidates_of(task, template, row))[answer]
    return fill_in(template.answer, answer=answer.rstrip() if task.joined else normalize(answer))


def candidates_of(task: Task, template: Template, row: Row) -> tuple[tuple[str, str], ...]:
    """Return (label, text after the prompt) of every label or choice.

    Choices that the prompt lists with letters are answered by letter, unless the template sets
    ``chosen_by``. Where the answer continues the input, a missing space is added to the choice.
    """
    if not row.choices:
        return tuple(
            (label, fill_in(template.answer, answer=word)) for label, word in template.labels
        )
    check_choices(list(row.choices))
    if "{choices}" in template.prompt and template.chosen_by == "letter":
        words = _letters(row)
    elif task.joined:
        words = [seam(row.input, choice) + choice.rstrip() for choice in row.choices]
    else:
        words = [normalize(choice) for choice in row.choices]
    return tuple(
        (choice, fill_in(template.answer, answer=word))
        for choice, word in zip(row.choices, words, strict=True)
    )


def seam(text: str, after: str) -> str:
    """Return " " if two texts need a space between them, else ""."""
    last = text[-1:]
    first = after[:1]
    if (
        not last
        or not first
        or last.isspace()
        or first.isspace()
        or UNSPACED.match(last)
        or UNSPACED.match(first)
    ):
        return ""
    return " " if first.isalnum() or first in "\"'“‘([{$#@&" else ""


def _letters(row: Row) -> list[str]:
    if len(row.choices) > len(string.ascii_uppercase):
        raise ValueError(
            f"the row with input {row.input[:40]!r} has {len(row.choices)} choices, "
            "and there are 26 letters for {choices}; use a template without them"
        )
    return list(string.ascii_uppercase[: len(row.choices)])


def has_blank(task: Task, row: Row) -> bool:
    return bool(task.joined and row.blank and row.choices)


def fill_blank(before: str, choice: str) -> str:
    choice = normalize(choice)
    return before + seam(before, choice) + choice


def around_blank(row: Row, text: str) -> tuple[str, str]:
    """Return the input before and after its blank, which may be several marks in a row."""
    parts = re.split(f"(?:{re.escape(row.blank)})+", text)
    if len(parts) != 2 or not parts[1].strip():
        raise ValueError(
            f"the input {row.input[:40]!r} has {len(parts) - 1} blanks {row.blank!r} "
            "with text after the last; give it one blank, with a text after it to score"
        )
    return parts[0], parts[1].rstrip()


def check_passages(task: Task, template: Template) -> None:
    if "{passages}" not in template.prompt:
        raise ValueError(
            f"task {task.name!r} takes no passages, as its prompt {template.prompt!r} "
            "does not contain {passages}; leave them out, or add it in a templates file"
        )


def check_task(task: Task, template: Template, tokenizer) -> None:
    """Check that the tokenizer can encode the words of the template, or raise ValueError."""
    # Check each text separately, so that the error names the one to change.
    named = {
        "instruction": template.instruction,
        "prompt": template.prompt,
        "passage": template.passage,
    }
    if "{choices}" in template.prompt:
        named["choice"] = template.choice
    words = {
        f"the word of label {label!r}": fill_in(template.answer, answer=word)
        for label, word in template.labels
    }
    tokens: dict[tuple[int, ...], str] = {}
    for what, text in ({name: _fixed(text) for name, text in named.items()} | words).items():
        if not text.strip():
            continue
        ids = tuple(tokenizer.encode(text))
        if not ids or tokenizer.is_special[list(ids)].any() or "\ufffd" in tokenizer.decode(ids):
            decoded = tokenizer.decode(ids, skip_special=False)
            raise ValueError(
                f"task {task.name!r}: {what}, {text!r}, is {decoded!r} to this run's "
                "tokenizer, which lacks tokens for it; change it in a templates file, or use a run "
                "that knows "
                f"{LANGUAGES[language_of(text)]}"
            )
        if what in words:
            if ids in tokens:
                raise ValueError(
                    f"task {task.name!r}: {what} and {tokens[ids]} have the same tokens "
                    "in this run's tokenizer; change one of them in a templates file"
                )
            tokens[ids] = what


def _fixed(template: str) -> str:
    return fill_in(template, input="", passages="", choices="", number="", text="", letter="")


def input_of(task: Task, row: Row) -> str:
    return normalize(row.input, lines=task.joined)
