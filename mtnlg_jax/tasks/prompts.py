"""From a row to the prompt that a model reads, never longer than its context; and to pairs for fine-tuning."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtnlg_jax.data.documents import Document
from mtnlg_jax.decode.generate import encode_prompt
from mtnlg_jax.tasks.passages import Passage, Retriever
from mtnlg_jax.tasks.templates import LANGUAGES, Task, Template, check_choices, fill_in
from mtnlg_jax.tasks.text import cut, language_of, normalise


@dataclass(frozen=True)
class Row:
    input: str
    references: tuple[str, ...] = ()  # right answers; the best counts, and the first is learnt
    context: str = ""  # a passage given with the row
    choices: tuple[str, ...] = ()  # answers to choose from, other than the labels of the task

    def __post_init__(self):
        if isinstance(self.references, str):
            object.__setattr__(self, "references", (self.references,))


@dataclass(frozen=True)
class Prompt:
    text: str
    candidates: tuple[tuple[str, str], ...]  # (label or choice, the text behind the prompt); empty: to be written
    examples: int  # shown, the last of those given
    passages: tuple[Passage, ...]  # shown, in order: the first is [1]
    shortened: bool  # part of the input was left out
    neutral: str  # the same without the input, for rankings by pmi
    language: str  # of the answer


def template_of(task: Task, text: str, language: str | None = None) -> tuple[str, Template]:
    """The language of a text, given or seen, and the task's template for it."""
    chosen = language or language_of(text)
    if chosen not in task.templates:
        raise ValueError(f"language={chosen!r} has no template in task {task.name!r}; choose from "
                         f"{', '.join(task.templates)}, or add one with a templates file")
    return chosen, task.templates[chosen]


def render(task: Task, template: Template, row: Row, passages: Sequence[Passage] = (), text: str | None = None) -> str:
    """The prompt of one row, without instruction; ``text`` in place of its input."""
    shown = "".join(fill_in(template.passage, number=str(number), text=normalise(passage.text))
                    for number, passage in enumerate(passages, 1))
    return fill_in(template.prompt, input=_input(task, row) if text is None else text, passages=shown)


def answer_of(task: Task, template: Template, row: Row) -> str:
    """What a model should write behind the prompt of a row, from its first reference: of a label, its word."""
    if not row.references or not row.references[0].strip():
        raise ValueError(f"the row with input {row.input[:40]!r} has no reference; give it a right answer")
    answer = row.references[0]
    words = dict(template.labels)
    if words and not row.choices:
        if answer not in words:
            raise ValueError(f"reference {answer[:40]!r} is none of the labels {', '.join(words)}; name what stands "
                             f"for which, as in --labels={answer.split()[0][:20]}={next(iter(words))}")
        return fill_in(template.answer, answer=words[answer])
    if row.choices and answer not in row.choices:
        raise ValueError(f"reference {answer[:40]!r} is none of the {len(row.choices)} choices of the row with input "
                         f"{row.input[:40]!r}; give it as it stands there")
    return fill_in(template.answer, answer=answer.rstrip() if task.joined else normalise(answer))


def candidates_of(template: Template, row: Row) -> tuple[tuple[str, str], ...]:
    """(label, text behind the prompt) of all there are to choose from."""
    if row.choices:
        check_choices(list(row.choices))
        return tuple((choice, fill_in(template.answer, answer=normalise(choice))) for choice in row.choices)
    return tuple((label, fill_in(template.answer, answer=word)) for label, word in template.labels)


def compose(task: Task, row: Row, tokenizer, context: int, *, language: str | None = None,
            examples: Sequence[Row] = (), passages: Sequence[Passage] = (), reserve: int | None = None) -> Prompt:
    """The prompt of a row: instruction, examples in their order, passages, input.

    Args:
      context: tokens that the prompt and its answer may take together.
      passages: looked up, best first; they stand behind the row's own context.
      reserve: tokens kept free for a written answer; default: those of the task's decoding, but at most a quarter of
        the context. Candidates keep what the longest of them needs.
    Where all of it does not fit, these go one after the other until it does: passages but the best, the first
    examples, then what the task does not need of the input (`Task.keep`). The last passage is shortened to what is
    left. A context that does not fit is looked through for its best passages. Raises ValueError where the input is
    empty, or still too long.
    """
    if not row.input.strip():
        raise ValueError(f"the input of task {task.name!r} is empty; give a text, as with --input=FILE")
    seen, template = template_of(task, row.input, language)
    if row.context or passages:
        check_passages(task, template)
    candidates = candidates_of(template, row)
    reserve = _reserve(task, context) if reserve is None else reserve
    endings = [ending for _, ending in candidates] or [""]

    def length(prompt: str) -> int:
        # 1 more where a tokenizer has no <bos> before texts: a ranking may put one there.
        tokens = max(len(encode_prompt(tokenizer, prompt + ending)) for ending in endings) + 1 - tokenizer.prompt_bos
        return tokens if candidates else tokens + reserve

    def build(text, passages, examples):
        before = "".join(_example(task, template, each) for each in examples)
        return template.instruction + before + render(task, template, row, passages, text)

    def fits(text, passages=(), examples=()):
        return length(build(text, passages, examples)) <= context

    text, shown = _input(task, row), list(examples)
    wanted = [*_given(row, lambda passage: fits(text, [passage])), *passages]
    while shown and not fits(text, wanted[:1], shown):
        shown = shown[1:]
    if not fits(text):
        text = _shortened(task, row, text, fits, length(build(text, (), ())), context)
    taken = []
    for passage in wanted:
        if fits(text, [*taken, passage], shown):
            taken.append(passage)
        elif not taken and (part := cut(passage.text, "start", lambda part, passage=passage: fits(
                text, [dataclasses.replace(passage, text=part)], shown))):
            taken.append(dataclasses.replace(passage, text=part, end=passage.start + len(part)))
    return Prompt(build(text, taken, shown), candidates, len(shown), tuple(taken), text != _input(task, row),
                  build("", (), shown), template.answer_language or seen)


def pairs(task: Task, rows: Sequence[Row], *, language: str | None = None, tokenizer=None,
          context: int | None = None) -> list[dict[str, str]]:
    """{"prompt": ..., "answer": ...} of each row, as the task will ask it without examples: what a model is fine-tuned
    on. With a tokenizer and the model's context, inputs are shortened to it as they will be then. The answer has its
    own leading space, so `launch/prepare_data.py` takes it as --answer='{answer}'. Raises ValueError naming the row.
    """
    made = []
    for number, row in enumerate(rows, 1):
        try:
            _, template = template_of(task, row.input, language)
            answer = answer_of(task, template, row)
            if tokenizer is None:
                if not row.input.strip():
                    raise ValueError("the input is empty; leave the row out")
                if row.context:
                    check_passages(task, template)
                given = _given(row, lambda passage: True)
                prompt = template.instruction + render(task, template, row, given)
            else:
                room = max(_reserve(task, context), len(tokenizer.encode(answer)) + 1)
                prompt = compose(task, row, tokenizer, context, language=language, reserve=room).text
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        made.append({"prompt": prompt, "answer": answer})
    return made


def check_passages(task: Task, template: Template) -> None:
    if "{passages}" not in template.prompt:
        raise ValueError(f"task {task.name!r} takes no passages, as its prompt {template.prompt!r} has no place for "
                         "them; leave them out, or write {passages} there in a templates file")


def check_task(task: Task, template: Template, tokenizer) -> None:
    """Raises ValueError where the tokenizer has no tokens for what the template says."""
    # The fixed words one by one, so that the one to change is named.
    named = {"instruction": template.instruction, "prompt": template.prompt, "passage": template.passage}
    words = {f"the word of label {label!r}": fill_in(template.answer, answer=word) for label, word in template.labels}
    tokens = {}
    for what, text in ({name: _fixed(text) for name, text in named.items()} | words).items():
        if not text.strip():
            continue
        ids = tuple(tokenizer.encode(text))
        if not ids or tokenizer.is_special[list(ids)].any() or "\ufffd" in tokenizer.decode(ids):
            told = tokenizer.decode(ids, skip_special=False)
            raise ValueError(f"task {task.name!r}: {what}, {text!r}, is {told!r} to this run's tokenizer, which lacks "
                             "tokens for it; write it otherwise in a templates file, or take a run that knows "
                             f"{LANGUAGES[language_of(text)]}")
        if what in words:
            if ids in tokens:
                raise ValueError(f"task {task.name!r}: {what} and {tokens[ids]} have the same tokens in this run's "
                                 "tokenizer; write one of them otherwise in a templates file")
            tokens[ids] = what


def _fixed(template: str) -> str:
    return fill_in(template, input="", passages="", number="", text="")


def _input(task: Task, row: Row) -> str:
    return normalise(row.input, lines=task.joined)


def _example(task: Task, template: Template, row: Row) -> str:
    passages = _given(row, lambda passage: True) if "{passages}" in template.prompt else ()
    return render(task, template, row, passages) + answer_of(task, template, row) + template.separator


def _reserve(task: Task, context: int) -> int:
    return min(task.decode.max_new_tokens, max(1, context // 4))


def _given(row: Row, fits: Callable[[Passage], bool]) -> list[Passage]:
    """The row's own context: whole, or where that does not fit its passages that speak about the input."""
    if not row.context.strip():
        return []
    whole = Passage(row.context, "context", 0, len(row.context))
    if fits(whole):
        return [whole]
    found = Retriever([Document(row.context, "context")], size=200)
    return found.best(row.input, 10) or found.passages[:1]


def _shortened(task: Task, row: Row, text: str, fits, length: int, context: int) -> str:
    what = (f"the input {row.input[:40]!r} takes {length} tokens with its prompt and room for the answer, and the "
            f"model's context holds {context}")
    if not task.keep:
        raise ValueError(f"{what}; task {task.name!r} needs all of it: give it in parts, such as its sentences, or use "
                         "a model with more positions")
    text = cut(text, task.keep, fits)
    if not text:
        raise ValueError(f"{what}, where not a word of it would fit; use a shorter template, or a model with more "
                         "positions")
    return text
