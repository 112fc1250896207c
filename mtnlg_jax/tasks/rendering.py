"""A row of a task in the words of a template: its prompt, its answer and its candidates."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from mtnlg_jax.tasks.passages import Passage
from mtnlg_jax.tasks.templates import LANGUAGES, Task, Template, check_choices, fill_in
from mtnlg_jax.tasks.text import UNSPACED, language_of, normalise


@dataclass(frozen=True)
class Row:
    input: str
    references: tuple[str, ...] = ()  # right answers; the best counts, and the first is learnt
    context: str = ""  # a passage given with the row
    choices: tuple[str, ...] = ()  # answers to choose from, other than the labels of the task
    # What the choices fill in the input. Tasks whose answer goes on from the input then score what
    # follows it.
    blank: str = ""

    def __post_init__(self):
        if isinstance(self.references, str):
            object.__setattr__(self, "references", (self.references,))


def template_of(task: Task, text: str, language: str | None = None) -> tuple[str, Template]:
    """The language of a text, given or seen, and the task's template for it."""
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
    """The prompt of one row, without instruction; ``text`` in place of its input."""
    shown = "".join(
        fill_in(template.passage, number=str(number), text=normalise(passage.text))
        for number, passage in enumerate(passages, 1)
    )
    choices = ""
    if "{choices}" in template.prompt:
        choices = "".join(
            fill_in(template.choice, letter=letter, text=normalise(choice))
            for letter, choice in zip(_letters(row), row.choices, strict=True)
        )
    return fill_in(
        template.prompt,
        input=input_of(task, row) if text is None else text,
        passages=shown,
        choices=choices,
    )


def answer_of(task: Task, template: Template, row: Row) -> str:
    """What a model should write behind the prompt of a row, from its first reference: of a label,
    its word."""
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
                "name what stands "
                "for which, as in "
                f"--labels={answer.split()[0][:20]}={next(iter(words))}"
            )
        return fill_in(template.answer, answer=words[answer])
    if row.choices:
        if answer not in row.choices:
            raise ValueError(
                f"reference {answer[:40]!r} is none of the {len(row.choices)} choices "
                "of the row with "
                f"input {row.input[:40]!r}; give it as it stands there"
            )
        return dict(candidates_of(task, template, row))[answer]
    return fill_in(template.answer, answer=answer.rstrip() if task.joined else normalise(answer))


def candidates_of(task: Task, template: Template, row: Row) -> tuple[tuple[str, str], ...]:
    """(label, text behind the prompt) of all there are to choose from. Of choices that the prompt
    lists with letters the letter stands behind it, unless the template says otherwise. Where the
    answer goes on from the input, a choice gets the space that it lacks."""
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
        words = [normalise(choice) for choice in row.choices]
    return tuple(
        (choice, fill_in(template.answer, answer=word))
        for choice, word in zip(row.choices, words, strict=True)
    )


def seam(text: str, behind: str) -> str:
    """ " " where two texts need a space between them, else ""."""
    last = text[-1:]
    first = behind[:1]
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
            "and there are 26 "
            "letters for {choices}; use a template without them"
        )
    return list(string.ascii_uppercase[: len(row.choices)])


def has_blank(task: Task, row: Row) -> bool:
    return bool(task.joined and row.blank and row.choices)


def fill_blank(before: str, choice: str) -> str:
    choice = normalise(choice)
    return before + seam(before, choice) + choice


def around_blank(row: Row, text: str) -> tuple[str, str]:
    """The input before and behind its blank, which may be drawn by several marks in a row."""
    parts = re.split(f"(?:{re.escape(row.blank)})+", text)
    if len(parts) != 2 or not parts[1].strip():
        raise ValueError(
            f"the input {row.input[:40]!r} has {len(parts) - 1} blanks {row.blank!r} "
            "with text behind "
            "the last; it needs one, and a text behind it, which is what is scored"
        )
    return parts[0], parts[1].rstrip()


def check_passages(task: Task, template: Template) -> None:
    if "{passages}" not in template.prompt:
        raise ValueError(
            f"task {task.name!r} takes no passages, as its prompt {template.prompt!r} "
            "has no place for "
            "them; leave them out, or write {passages} there in a templates file"
        )


def check_task(task: Task, template: Template, tokenizer) -> None:
    """Raises ValueError where the tokenizer has no tokens for what the template says."""
    # The fixed words one by one, so that the one to change is named.
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
    tokens = {}
    for what, text in ({name: _fixed(text) for name, text in named.items()} | words).items():
        if not text.strip():
            continue
        ids = tuple(tokenizer.encode(text))
        if not ids or tokenizer.is_special[list(ids)].any() or "\ufffd" in tokenizer.decode(ids):
            told = tokenizer.decode(ids, skip_special=False)
            raise ValueError(
                f"task {task.name!r}: {what}, {text!r}, is {told!r} to this run's "
                "tokenizer, which lacks "
                "tokens for it; write it otherwise in a templates file, or take a run "
                "that knows "
                f"{LANGUAGES[language_of(text)]}"
            )
        if what in words:
            if ids in tokens:
                raise ValueError(
                    f"task {task.name!r}: {what} and {tokens[ids]} have the same "
                    "tokens in this run's "
                    "tokenizer; write one of them otherwise in a templates file"
                )
            tokens[ids] = what


def _fixed(template: str) -> str:
    return fill_in(template, input="", passages="", choices="", number="", text="", letter="")


def input_of(task: Task, row: Row) -> str:
    return normalise(row.input, lines=task.joined)
