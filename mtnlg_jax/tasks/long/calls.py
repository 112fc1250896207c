"""The calls that long tasks make of the model: settings in one place, parts counted."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.results import encode_prompt
from mtnlg_jax.tasks import run
from mtnlg_jax.tasks.answers import Answer
from mtnlg_jax.tasks.long.parts import Fits, spans_of
from mtnlg_jax.tasks.passages import Passage
from mtnlg_jax.tasks.prompts import Examples, InputTooLong, compose
from mtnlg_jax.tasks.rendering import Row, answer_of, candidates_of, input_of, render, template_of
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.text import normalize
from mtnlg_jax.tasks.work import Part

# A prompt with less room for its input is an error: "a few tokens" must fit.
LEAST_ROOM = 8


@dataclass
class Calls:
    """The model with the arguments of `tasks.run.perform`, and the progress of all rows."""

    decoder: Decoder
    tokenizer: Any
    settings: dict[str, Any]  # further arguments of `tasks.run.perform`
    pool: Examples  # of the settings
    on_progress: Callable[[int, int], None]  # (parts done, parts known so far)
    done: int = 0
    known: int = 0

    def expect(self, parts: int) -> None:
        """Add to the number of parts known."""
        self.known += parts

    def tick(self, parts: int = 1) -> None:
        """Report parts that are done."""
        self.done += parts
        self.on_progress(self.done, self.known)

    @property
    def context(self) -> int:
        """Return the tokens of a prompt and its answer that a person's profile leaves free."""
        profile = self.settings["profile"]
        return self.decoder.context - (int(profile.share * self.decoder.context) if profile else 0)

    @property
    def batch(self) -> int:
        return self.settings["batch"]

    def decode_of(self, task: Task) -> DecodeConfig:
        return self.settings["decode"] or task.decode

    def perform(
        self,
        task: Task,
        rows: Sequence[Row],
        *,
        on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
        **changes,
    ) -> list[Answer]:
        """Answer rows that fit, by `tasks.run.perform` with ``changes`` of its arguments."""

        def finished(index: int, answer: Answer) -> None:
            on_answer(index, answer)
            self.tick()

        settings = self.settings | changes
        if not any(self.ranks(task, row) for row in rows):
            settings |= {"scorer": "logprob", "normalise": None}  # they are for other rows
        return run.perform(self.decoder, self.tokenizer, task, rows, on_answer=finished, **settings)

    def ranks(self, task: Task, row: Row) -> bool:
        """Return whether the answer to a row is a label or a choice."""
        return bool(row.choices or any(each.labels for each in task.templates.values()))

    def tokens_of(self, text: str) -> int:
        return len(self.tokenizer.encode(normalize(text)))

    def language_of(self, task: Task, text: str) -> str:
        return template_of(task, text, self.settings["language"])[0]

    def fitting(
        self,
        task: Task,
        row: Row,
        language: str,
        reserve: int,
        growth: float = 0.0,
        as_passage: bool = False,
    ) -> Callable[[str], bool]:
        """Return whether a text fits a prompt of the task as its input, or as a passage.

        Examples of the settings are counted as far as they take at most half of the context.
        ``reserve``: tokens kept free for a generated answer, besides ``growth`` for each token of
        the text.

        Raises:
          ValueError: fewer than LEAST_ROOM tokens are left for the text.
        """
        tokens = self._prompt_tokens(task, row, language, as_passage)

        def needed(text: str) -> int:
            grown = math.ceil(growth * self.tokens_of(text)) if growth else 0
            return tokens(text) + grown + reserve

        if self.context - needed("") < LEAST_ROOM * (1 + growth):
            profile = self.decoder.context - self.context
            beside = f" beside {profile} of the profile" if profile else ""
            raise ValueError(
                f"the prompt of task {task.name!r} without its text takes {needed('')} tokens with "
                f"room for the answer, and the model's context holds {self.context}{beside}: not "
                f"even {LEAST_ROOM} tokens of the text fit; use a shorter template, fewer new "
                f"tokens, {'a smaller --profile_share, ' if profile else ''}or a model with more "
                "positions"
            )
        return lambda text: needed(text) <= self.context

    def room_of(self, task: Task, row: Row, language: str) -> int:
        """Return the tokens that a prompt of the task leaves for its input and the answer."""
        return self.context - self._prompt_tokens(task, row, language)("")

    def _prompt_tokens(
        self, task: Task, row: Row, language: str, as_passage: bool = False
    ) -> Callable[[str], int]:
        """Return a function from a text to the tokens of its prompt and longest candidate."""
        template = task.templates[language]
        endings = [ending for _, ending in candidates_of(task, template, row)] or [""]
        before = template.instruction + self._examples(task, row, language)

        def tokens(text: str) -> int:
            shown = (Passage(text, "", 0, len(text)),) if as_passage else ()
            given = input_of(task, row) if as_passage else normalize(text)
            prompt = before + render(task, template, row, shown, given)
            longest = max(len(encode_prompt(self.tokenizer, prompt + each)) for each in endings)
            return longest + 1 - self.tokenizer.prompt_bos

        return tokens

    def is_whole(self, task: Task, row: Row) -> bool:
        """Return whether `tasks.run.perform` reads all of a row."""
        text = row.input + row.context
        # Composing a prompt from a text of thousands of words takes longer than this.
        if self.tokens_of(text) > self.context:
            return False
        try:
            prompt = compose(
                dataclasses.replace(task, decode=self.decode_of(task)),
                row,
                self.tokenizer,
                self.context,
                language=self.settings["language"],
            )
        except InputTooLong:
            return False
        return not prompt.shortened and not prompt.context_shortened

    def _examples(self, task: Task, row: Row, language: str) -> str:
        """Return the text of the examples that take at most half of the context."""
        template = task.templates[language]
        text = ""
        for each in reversed(self.examples_of(row, language)):
            answer = answer_of(task, template, each)
            longer = render(task, template, each) + answer + template.separator + text
            if 2 * len(self.tokenizer.encode(longer)) > self.context:
                break
            text = longer
        return text

    def examples_of(self, row: Row, language: str) -> list[Row]:
        """Return the examples of the settings for a row."""
        return self.pool.of(row, language, self.settings["shots"], self.settings["seed"])

    def parts_of(self, text: str, fits: Fits, packs: Fits | None = None) -> tuple[Part, ...]:
        """Return the parts of a text, as `parts.spans_of` does."""
        spans = spans_of(text, fits, packs)
        return tuple(Part(start, end, self.tokens_of(text[start:end])) for start, end in spans)


def part_rows(row: Row, text: str, parts: Sequence[Part]) -> list[Row]:
    """Return a row for each part of a text, in place of the input of ``row``."""
    return [dataclasses.replace(row, input=text[part.start : part.end]) for part in parts]


def whole_text(text: str) -> str:
    """Return a text with LF line ends, to which positions refer."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
