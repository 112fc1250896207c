"""Compose prompts that fit the context of a model, and prompt/answer pairs for fine-tuning."""

import collections
import dataclasses
import functools
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtnlg_jax.data.read.documents import Document
from mtnlg_jax.tasks.passages import Passage, Retriever
from mtnlg_jax.tasks.rendering import (
    Row,
    answer_of,
    around_blank,
    candidates_of,
    check_passages,
    fill_blank,
    has_blank,
    input_of,
    render,
    template_of,
)
from mtnlg_jax.tasks.templates import Task, Template, check_choices
from mtnlg_jax.tasks.text import cut, normalize
from mtnlg_jax.tasks.work import Work


class InputTooLong(ValueError):
    """The input does not fit the context, and the task can spare no part of it."""


@dataclass(frozen=True)
class Prompt:
    text: str
    candidates: tuple[tuple[str, str], ...]  # (label or choice, its text); empty: to be generated
    examples: int  # number of examples shown, the last of those given
    passages: tuple[Passage, ...]  # passages shown, in order: the first is [1]
    shortened: bool  # part of the input was left out
    context_shortened: bool  # part of the row's own context was left out
    neutral: str  # the prompt without the input, for rankings by pmi
    language: str  # of the answer
    # The prompt of each candidate if a blank makes them differ; otherwise all of them use ``text``.
    texts: tuple[str, ...] = ()


def split_last_word(row: Row) -> Row:
    """Make the last word of the input the reference of a row that has none."""
    if row.references:
        return row
    parts = row.input.rstrip().rsplit(None, 1)
    if len(parts) < 2:
        raise ValueError(
            f"the input {row.input[:40]!r} has no last word to split off; give it a reference"
        )
    return dataclasses.replace(row, input=parts[0], references=(parts[1],))


class Examples:
    """Rows with references to show as examples.

    An example is never shown before a row that asks the same question (`same_question`).
    """

    def __init__(self, task: Task, rows: Sequence[Row], language: str | None = None):
        self._by_language = collections.defaultdict(list)
        for row in rows:
            self._by_language[template_of(task, row.input, language)[0]].append(row)
        self._copies = collections.Counter(_folded(row.input) for row in rows)

    def of(
        self, row: Row, language: str, shots: int | None = None, seed: int | None = None
    ) -> list[Row]:
        """Return ``shots`` examples in the row's language; None: all of them.

        Without ``seed`` these are the first ones, in their order. With ``seed`` they are drawn by
        the seed and the row's input, so they do not depend on the other rows.
        """
        pool = self._by_language[language]
        if shots is not None and seed is not None:
            asked = _folded(row.input)
            wanted = min(len(pool), shots + self._copies[asked])
            pool = random.Random(f"{seed} {zlib.crc32(repr(asked).encode())}").sample(pool, wanted)
        found: list[Row] = []
        for example in pool:
            if len(found) == shots:
                break
            if not same_question(example, row):
                found.append(example)
        return found


def work_of(tokenizer, prompt: Prompt, written: int) -> Work:
    """Return the work of an answer to a whole input; ``written`` is its number of new tokens."""
    from mtnlg_jax.decode.results import encode_prompt

    prompts = prompt.texts or (prompt.text,)
    read = sum(len(encode_prompt(tokenizer, text)) for text in prompts)
    return Work("whole", 1, len(prompts), read, written)


def same_question(one: Row, other: Row) -> bool:
    """Return whether two rows ask the same question, regardless of their answers.

    Their inputs differ at most in case and white space. Their contexts and choices are equal, or
    missing from one of them.
    """
    if _folded(one.input) != _folded(other.input):
        return False
    contexts = {_folded(row.context) for row in (one, other) if row.context.strip()}
    choices = {tuple(sorted(map(_folded, row.choices))) for row in (one, other) if row.choices}
    return len(contexts) < 2 and len(choices) < 2


@functools.lru_cache(1 << 16)
def _folded(text: str) -> str:
    return normalize(text).casefold()


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
    """Compose the prompt of a row: instruction, examples in their order, passages, input.

    Args:
      context: maximum number of tokens of the prompt and its answer together.
      passages: retrieved passages, best first; they follow the row's own context.
      reserve: tokens kept free for a generated answer. Default: the length in the task's decoding,
        but at most a quarter of the context. Candidates reserve the length of the longest one.

    If the prompt does not fit, parts are removed in this order: passages except the best, the first
    examples, then the part of the input that the task can spare (`Task.keep`). The last passage is
    shortened to the remaining space. If the row's own context does not fit, its passages most
    relevant to the input are shown instead, as many as fit, in the order of the text.

    Raises:
      InputTooLong: the input is still too long.
      ValueError: the input is empty.
    """
    from mtnlg_jax.decode.results import encode_prompt

    if not row.input.strip():
        raise ValueError(
            f"the input of task {task.name!r} is empty; give a text, as with --input=FILE"
        )
    seen, template = template_of(task, row.input, language)
    if row.context or passages:
        check_passages(task, template)
    whole = input_of(task, row)
    filled = []
    if has_blank(task, row):
        whole, behind = around_blank(row, whole)
        filled = [fill_blank(whole, choice).removeprefix(whole) for choice in row.choices]
        candidates = tuple((choice, behind) for choice in row.choices)
        check_choices(list(row.choices))
        endings = [fill + behind for fill in filled]
    else:
        candidates = candidates_of(task, template, row)
        endings = [ending for _, ending in candidates] or [""]
    reserve = _reserve(task, context) if reserve is None else reserve

    @functools.cache
    def length(prompt: str) -> int:
        # Leave room for the <bos> that a ranking may add if the tokenizer adds none.
        longest = max(len(encode_prompt(tokenizer, prompt + ending)) for ending in endings)
        tokens = longest + 1 - tokenizer.prompt_bos
        return tokens if candidates else tokens + reserve

    def build(text, passages, examples):
        before = "".join(_example(task, template, each) for each in examples)
        return template.instruction + before + render(task, template, row, passages, text)

    def fits(text, passages=(), examples=()):
        return length(build(text, passages, examples)) <= context

    def begins_to_fit(passage: Passage, part: str) -> bool:
        return fits(text, [dataclasses.replace(passage, text=part)], shown)

    text = whole
    own = _given(row, lambda passage: fits(text, [passage]))
    wanted = [*own, *passages]
    shown = _most(list(examples), lambda examples: fits(text, wanted[:1], examples))
    if not fits(text):
        text = _shortened(task, row, text, fits, length(build(text, (), ())), context)
    taken: list[Passage] = []
    for passage in wanted:
        if fits(text, _ordered([*taken, passage], own), shown):
            taken = _ordered([*taken, passage], own)
        elif not taken and (
            part := cut(passage.text, "start", functools.partial(begins_to_fit, passage))
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
    """Return the longest tail of the examples that fits, by bisection."""
    if not examples or fits(examples):
        return examples
    low = 0
    high = len(examples) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(examples[len(examples) - middle :]):
            low = middle
        else:
            high = middle - 1
    return examples[len(examples) - low :]


def _ordered(passages: list[Passage], own: Sequence[Passage]) -> list[Passage]:
    """Order passages: first those of the row's own context, as in its text, then by score."""
    ours = [passage for passage in passages if any(passage is each for each in own)]
    others = [passage for passage in passages if not any(passage is each for each in own)]
    return sorted(ours, key=lambda passage: passage.start) + others


def pairs(
    task: Task,
    rows: Sequence[Row],
    *,
    language: str | None = None,
    tokenizer=None,
    context: int | None = None,
) -> list[dict[str, str]]:
    """Return {"prompt": ..., "answer": ...} of each row, to fine-tune a model on.

    Prompts are those of the task without examples. With a tokenizer and the context of the model,
    inputs are shortened as they will be at inference. The answer includes its leading space, so
    pass --answer='{answer}' to `launch/prepare_data.py`.

    Raises:
      ValueError: a row is invalid; the message names it.
    """
    made = []
    for number, row in enumerate(rows, 1):
        try:
            _, template = template_of(task, row.input, language)
            answer = answer_of(task, template, row)
            if has_blank(task, row):
                before, answer = around_blank(row, input_of(task, row))
                made.append({"prompt": fill_blank(before, row.references[0]), "answer": answer})
                continue
            if tokenizer is None:
                if not row.input.strip():
                    raise ValueError("the input is empty; leave the row out")
                if row.context:
                    check_passages(task, template)
                given = _given(row, lambda passage: True)
                prompt = template.instruction + render(task, template, row, given)
            else:
                assert context is not None, "a tokenizer comes with the model's context"
                room = max(_reserve(task, context), len(tokenizer.encode(answer)) + 1)
                prompt = compose(
                    task, row, tokenizer, context, language=language, reserve=room
                ).text
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        made.append({"prompt": prompt, "answer": answer})
    return made


def _example(task: Task, template: Template, row: Row) -> str:
    passages = _given(row, lambda passage: True) if "{passages}" in template.prompt else ()
    if has_blank(task, row):
        before, behind = around_blank(row, input_of(task, row))
        text = fill_blank(before, row.references[0]) + behind
        return render(task, template, row, passages, text) + template.separator
    return (
        render(task, template, row, passages) + answer_of(task, template, row) + template.separator
    )


def _reserve(task: Task, context: int) -> int:
    return min(task.decode.max_new_tokens, max(1, context // 4))


def _given(row: Row, fits: Callable[[Passage], bool]) -> list[Passage]:
    """Return the row's own context whole, or its passages most relevant to the input."""
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
        f"answer, and the model's context holds {context}"
    )
    if not task.keep:
        raise InputTooLong(
            f"{what}; task {task.name!r} needs all of it: give it in parts, such as "
            "its sentences, or use a model with more positions"
        )
    text = cut(text, task.keep, fits)
    if not text:
        raise InputTooLong(
            f"{what}, and not one word of it fits; use a shorter template, or a "
            "model with more positions"
        )
    return text
