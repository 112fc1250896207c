"""From a row to the prompt that a model reads, never longer than its context; and to pairs for
fine-tuning."""

import collections
import dataclasses
import functools
import random
import re
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtnlg_jax.data.read.documents import Document
from mtnlg_jax.tasks.passages import Passage, Retriever
from mtnlg_jax.tasks.templates import LANGUAGES, Task, Template, check_choices, fill_in
from mtnlg_jax.tasks.text import UNSPACED, cut, language_of, normalise


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


@dataclass(frozen=True)
class Prompt:
    text: str
    candidates: tuple[
        tuple[str, str], ...
    ]  # (label or choice, the text behind the prompt); empty: to be written
    examples: int  # shown, the last of those given
    passages: tuple[Passage, ...]  # shown, in order: the first is [1]
    shortened: bool  # part of the input was left out
    context_shortened: bool  # part of the row's own context was left out
    neutral: str  # the same without the input, for rankings by pmi
    language: str  # of the answer
    texts: tuple[
        str, ...
    ] = ()  # of each candidate, where a blank makes them differ; else ``text`` is that of all


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
        input=_input(task, row) if text is None else text,
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


def split_last_word(row: Row) -> Row:
    """A row without reference asks for the last word of its input."""
    if row.references:
        return row
    parts = row.input.rstrip().rsplit(None, 1)
    if len(parts) < 2:
        raise ValueError(
            f"the input {row.input[:40]!r} has no last word behind others; give it a reference"
        )
    return dataclasses.replace(row, input=parts[0], references=(parts[1],))


class Examples:
    """Rows with references to show before others; never one that asks what the row itself asks
    (`same_question`)."""

    def __init__(self, task: Task, rows: Sequence[Row], language: str | None = None):
        self._by_language = collections.defaultdict(list)
        for row in rows:
            self._by_language[template_of(task, row.input, language)[0]].append(row)
        self._copies = collections.Counter(_folded(row.input) for row in rows)

    def of(
        self, row: Row, language: str, shots: int | None = None, seed: int | None = None
    ) -> list[Row]:
        """Those of the row's language: the first ``shots``, in their order, or as many drawn by
        ``seed`` and the row's input, the same for it whatever else is evaluated; all where
        ``shots`` is None."""
        pool = self._by_language[language]
        if shots is not None and seed is not None:
            asked = _folded(row.input)
            wanted = min(len(pool), shots + self._copies[asked])
            pool = random.Random(f"{seed} {zlib.crc32(repr(asked).encode())}").sample(pool, wanted)
        found = []
        for example in pool:
            if len(found) == shots:
                break
            if not same_question(example, row):
                found.append(example)
        return found


def same_question(one: Row, other: Row) -> bool:
    """Whether two rows ask the same, whatever their answers: inputs that differ in case and spaces
    at most, and contexts and choices that are the same or that one of them lacks."""
    if _folded(one.input) != _folded(other.input):
        return False
    contexts = {_folded(row.context) for row in (one, other) if row.context.strip()}
    choices = {tuple(sorted(map(_folded, row.choices))) for row in (one, other) if row.choices}
    return len(contexts) < 2 and len(choices) < 2


@functools.lru_cache(1 << 16)
def _folded(text: str) -> str:
    return normalise(text).casefold()


def compose(
    task: Task,
    row: Row,
    tokenizer,
    context: int,
    *,
    language: str | None = None,
    examples: Sequence[Row] = (),
    passages: Sequence[Passage] = (),
    reserve: int | None = None,
) -> Prompt:
    """The prompt of a row: instruction, examples in their order, passages, input.

    Args:
      context: tokens that the prompt and its answer may take together.
      passages: looked up, best first; they stand behind the row's own context.
      reserve: tokens kept free for a written answer; default: those of the task's decoding, but at
        most a quarter of the context. Candidates keep what the longest of them needs.
    Where all of it does not fit, these go one after the other until it does: passages but the best,
    the first examples, then what the task does not need of the input (`Task.keep`). The last
    passage is shortened to what is left. A context that does not fit is looked through for the
    passages that speak about the input; as many as fit are shown, in the order of the text. Raises
    ValueError where the input is empty, or still too long.
    """
    from mtnlg_jax.decode.results import encode_prompt

    if not row.input.strip():
        raise ValueError(
            f"the input of task {task.name!r} is empty; give a text, as with --input=FILE"
        )
    seen, template = template_of(task, row.input, language)
    if row.context or passages:
        check_passages(task, template)
    whole = _input(task, row)
    filled = []
    if _blank(task, row):
        whole, behind = _around(row, whole)
        filled = [_filled(whole, choice).removeprefix(whole) for choice in row.choices]
        candidates = tuple((choice, behind) for choice in row.choices)
        check_choices(list(row.choices))
        endings = [fill + behind for fill in filled]
    else:
        candidates = candidates_of(task, template, row)
        endings = [ending for _, ending in candidates] or [""]
    reserve = _reserve(task, context) if reserve is None else reserve

    def length(prompt: str) -> int:
        # 1 more where a tokenizer has no <bos> before texts: a ranking may put one there.
        tokens = (
            max(len(encode_prompt(tokenizer, prompt + ending)) for ending in endings)
            + 1
            - tokenizer.prompt_bos
        )
        return tokens if candidates else tokens + reserve

    def build(text, passages, examples):
        before = "".join(_example(task, template, each) for each in examples)
        return template.instruction + before + render(task, template, row, passages, text)

    def fits(text, passages=(), examples=()):
        return length(build(text, passages, examples)) <= context

    text = whole
    own = _given(row, lambda passage: fits(text, [passage]))
    wanted = [*own, *passages]
    shown = _most(list(examples), lambda examples: fits(text, wanted[:1], examples))
    if not fits(text):
        text = _shortened(task, row, text, fits, length(build(text, (), ())), context)
    taken = []
    for passage in wanted:
        if fits(text, _ordered([*taken, passage], own), shown):
            taken = _ordered([*taken, passage], own)
        elif not taken and (
            part := cut(
                passage.text,
                "start",
                lambda part, passage=passage: fits(
                    text, [dataclasses.replace(passage, text=part)], shown
                ),
            )
        ):
            taken.append(dataclasses.replace(passage, text=part, end=passage.start + len(part)))
            own = [taken[0] if each is passage else each for each in own]
    prompt = build(text, taken, shown)
    context_shortened = bool(row.context.strip()) and not any(
        each.source == "context" and each.text == row.context for each in taken
    )
    return Prompt(
        prompt,
        candidates,
        len(shown),
        tuple(taken),
        text != whole,
        context_shortened,
        build("", (), shown),
        template.answer_language or seen,
        tuple(prompt + fill for fill in filled),
    )


def _most(examples: list[Row], fits: Callable[[list[Row]], bool]) -> list[Row]:
    """The most of the last examples that fit, by bisection."""
    if not examples or fits(examples):
        return examples
    low = 0
    high = len(examples) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if fits(examples[len(examples) - middle :]) else (low, middle - 1)
        )
    return examples[len(examples) - low :]


def _ordered(passages: list[Passage], own: Sequence[Passage]) -> list[Passage]:
    """Those of the row's own context in the order of its text, then those looked up, best first."""
    ours = [passage for passage in passages if any(passage is each for each in own)]
    others = [passage for passage in passages if not any(passage is each for each in own)]
    return sorted(ours, key=lambda passage: passage.start) + others


def _blank(task: Task, row: Row) -> bool:
    return bool(task.joined and row.blank and row.choices)


def _filled(before: str, choice: str) -> str:
    choice = normalise(choice)
    return before + seam(before, choice) + choice


def _around(row: Row, text: str) -> tuple[str, str]:
    """The input before and behind its blank, which may be drawn by several marks in a row."""
    parts = re.split(f"(?:{re.escape(row.blank)})+", text)
    if len(parts) != 2 or not parts[1].strip():
        raise ValueError(
            f"the input {row.input[:40]!r} has {len(parts) - 1} blanks {row.blank!r} "
            "with text behind "
            "the last; it needs one, and a text behind it, which is what is scored"
        )
    return parts[0], parts[1].rstrip()


def pairs(
    task: Task,
    rows: Sequence[Row],
    *,
    language: str | None = None,
    tokenizer=None,
    context: int | None = None,
) -> list[dict[str, str]]:
    """{"prompt": ..., "answer": ...} of each row, as the task will ask it without examples: what a
    model is fine-tuned on. With a tokenizer and the model's context, inputs are shortened to it as
    they will be then. The answer has its own leading space, so `launch/prepare_data.py` takes it as
    --answer='{answer}'. Raises ValueError naming the row.
    """
    made = []
    for number, row in enumerate(rows, 1):
        try:
            _, template = template_of(task, row.input, language)
            answer = answer_of(task, template, row)
            if _blank(task, row):
                before, answer = _around(row, _input(task, row))
                made.append({"prompt": _filled(before, row.references[0]), "answer": answer})
                continue
            if tokenizer is None:
                if not row.input.strip():
                    raise ValueError("the input is empty; leave the row out")
                if row.context:
                    check_passages(task, template)
                given = _given(row, lambda passage: True)
                prompt = template.instruction + render(task, template, row, given)
            else:
                room = max(_reserve(task, context), len(tokenizer.encode(answer)) + 1)
                prompt = compose(
                    task, row, tokenizer, context, language=language, reserve=room
                ).text
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        made.append({"prompt": prompt, "answer": answer})
    return made


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


def _input(task: Task, row: Row) -> str:
    return normalise(row.input, lines=task.joined)


def _example(task: Task, template: Template, row: Row) -> str:
    passages = _given(row, lambda passage: True) if "{passages}" in template.prompt else ()
    if _blank(task, row):
        before, behind = _around(row, _input(task, row))
        text = _filled(before, row.references[0]) + behind
        return render(task, template, row, passages, text) + template.separator
    return (
        render(task, template, row, passages) + answer_of(task, template, row) + template.separator
    )


def _reserve(task: Task, context: int) -> int:
    return min(task.decode.max_new_tokens, max(1, context // 4))


def _given(row: Row, fits: Callable[[Passage], bool]) -> list[Passage]:
    """The row's own context: whole, or where that does not fit its passages that speak about the
    input."""
    if not row.context.strip():
        return []
    whole = Passage(row.context, "context", 0, len(row.context))
    if fits(whole):
        return [whole]
    found = Retriever([Document(row.context, "context")], size=200)
    return found.best(row.input, 10) or found.passages[:1]


def _shortened(task: Task, row: Row, text: str, fits, length: int, context: int) -> str:
    what = (
        f"the input {row.input[:40]!r} takes {length} tokens with its prompt and room for the "
        "answer, and the "
        f"model's context holds {context}"
    )
    if not task.keep:
        raise ValueError(
            f"{what}; task {task.name!r} needs all of it: give it in parts, such as "
            "its sentences, or use "
            "a model with more positions"
        )
    text = cut(text, task.keep, fits)
    if not text:
        raise ValueError(
            f"{what}, where not a word of it would fit; use a shorter template, or a "
            "model with more "
            "positions"
        )
    return text
