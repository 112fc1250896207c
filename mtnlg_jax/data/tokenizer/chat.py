"""Conversations as tokens: to be answered by a model, or to train it on its own turns.

The special tokens of the chat template are special tokens, and there is no bos but the template's.
A special token that is spelled in a message stays text, unlike in transformers, so that nobody can
end a turn or begin another one from inside a message.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtnlg_jax.data.tokenizer.base import HIDE, NO_TOKEN, Tokenizer
from mtnlg_jax.data.tokenizer.template import (
    ChatTemplate,
    check_messages,
    hide_specials,
    read_template,
)

Messages = Sequence[Mapping[str, Any]]
_PROBE = "answer"


@dataclasses.dataclass(frozen=True)
class TrainingRow:
    """A conversation to train on: ``answers`` [tokens] bool is true on the assistant's turns."""

    tokens: list[int]
    answers: np.ndarray
    text: str


class Chat:
    """A tokenizer and its chat template."""

    def __init__(self, tokenizer: Tokenizer, source: str | None = None):
        """``source``: the text of a template to use instead of the tokenizer's.

        Raises ValueError if there is none.
        """
        self._tokenizer = tokenizer
        self._template: ChatTemplate = read_template(tokenizer, source)

    @property
    def source(self) -> str:
        """Return the text of the chat template."""
        return self._template.source

    def prompt(self, messages: Messages, **variables: Any) -> list[int]:
        """Return the tokens of a conversation up to where the answer begins.

        ``variables``: further names of the template. Raises ValueError if roles are out of order or
        the template refuses the conversation.
        """
        check_messages(messages, answered=False)
        text = self._render(messages, add_generation_prompt=True, **variables).text
        return self._tokenizer.encode_rendering(text)[0]

    def text(self, messages: Messages, **variables: Any) -> str:
        """Return the text of a conversation, as apply_chat_template of transformers does."""
        return self._render(messages, **variables).text.replace(HIDE, "")

    def ends(self) -> tuple[int, ...]:
        """Return the tokens that end an answer: those of the tokenizer, and the one that the
        template writes behind an answer."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        ends = [index for index in self._tokenizer.eos_ids if index != NO_TOKEN]
        try:
            text = self._render(turns).text
        except ValueError:  # a template of other roles
            return tuple(ends)
        ids, _ = self._tokenizer.encode_rendering(text[text.rfind(_PROBE) + len(_PROBE) :])
        behind = [index for index in ids if self._tokenizer.is_special[index]]
        return tuple(dict.fromkeys(ends + behind[:1]))

    def training_row(self, messages: Messages, **variables: Any) -> TrainingRow:
        """Return the tokens of a whole conversation, with those of the assistant marked.

        They are what the template's ``generation`` tag surrounds. Without that tag they are what a
        turn adds to the rendering of the turns before it, to the end token.

        Raises ValueError also if nothing is left to train on, or the answers cannot be found.
        """
        check_messages(messages, answered=True)
        hidden = hide_specials(messages, self._tokenizer)
        text, spans = self._template.render(hidden, **variables)
        if spans is None:
            spans = [
                self._find_answer(hidden, number, text, variables)
                for number, message in enumerate(hidden)
                if message["role"] == "assistant"
            ]
        ids, offsets = self._tokenizer.encode_rendering(text)
        answers = np.zeros(len(ids), bool)
        for index, offset in enumerate(offsets):
            if offset is None:
                raise ValueError(
                    "the tokenizer loses text, so its tokens cannot be told apart by speaker; use "
                    "the tokenizer.json of the model"
                )
            answers[index] = any(_overlap(offset, span) for span in spans)
        answers[:1] = False  # nothing predicts the first token
        if not answers.any():
            raise ValueError(
                "the chat template marks no token of the assistant, so there is nothing to train "
                "on; give the conversation an answer"
            )
        return TrainingRow(ids, answers, text.replace(HIDE, ""))

    def _render(self, messages: Messages, **variables: Any):
        return self._template.render(hide_specials(messages, self._tokenizer), **variables)

    def _find_answer(
        self, messages: list[dict], number: int, whole: str, variables: dict
    ) -> tuple[int, int]:
        """Return (start, stop) in ``whole`` of turn ``number``, by the difference that it makes."""

        def render(count: int, add_generation_prompt: bool = False) -> str:
            return self._template.render(
                messages[:count], add_generation_prompt=add_generation_prompt, **variables
            ).text

        before = render(number, add_generation_prompt=True)
        if whole.startswith(before):
            start = len(before)
            after = render(number + 1)
            # Some templates write the last answer at more length, such as with its thoughts: then
            # the turn is the end of that, and must hold at least the last line of the answer.
            lines = str(messages[number].get("content") or "").strip().splitlines() or [""]
            added = after[start:] if after.startswith(before) else ""
            rest = whole[start:]
            length = next(
                (size for size in range(len(added), 0, -1) if rest.startswith(added[-size:])), 0
            )
            if length and (length == len(added) or lines[-1] in rest[:length]):
                return start, start + self._to_end(rest[:length])
        raise ValueError(
            f"turn {number + 1} cannot be told apart in the rendering, since the chat template "
            "writes the turns before it differently later; give a template that has "
            "{% generation %} ... {% endgeneration %} around the assistant's turns"
        )

    def _to_end(self, turn: str) -> int:
        """Return the length of a turn to its end token, without a line end behind that."""
        names = [self._tokenizer.special_names.get(index) for index in self.ends()]
        spelled = "|".join(re.escape(name) for name in names if name)
        found = re.search(rf"(?:{spelled})(\s*)\Z", turn) if spelled else None
        return len(turn) - len(found[1]) if found else len(turn)


def _overlap(token: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token, which may have no characters, is in a span."""
    return span[0] <= token[0] < span[1] or token[0] < span[1] and span[0] < token[1]
