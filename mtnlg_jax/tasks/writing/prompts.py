"""Compose the prompts of the writer within the model's context.

The prompt of a piece holds, in this order: a person's profile, if given, the instruction, the
topic, the summary of what stands, names and facts, the heading of its section, the heading that
follows, and the end of the text. Profile, instruction and the section's heading are whole. Of the
tokens that are left (R), the topic, the summary and the facts have at most R/4, R/4 and R/8, and
the next heading R/8 or nothing. The end of the text has all the rest, so parts that are short leave
it more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtnlg_jax.data.tokenizer.base import Tokenizer
from mtnlg_jax.decode.results import encode_prompt
from mtnlg_jax.tasks.templates import fill_in
from mtnlg_jax.tasks.text import cut
from mtnlg_jax.tasks.writing.kinds import Frame, Kind, frame_of

# Fewest tokens for the topic, the memory and the end of the text together.
LEAST = 16
# A piece has at most this number of tokens, so that ranking has a choice often enough.
PIECE = 512
_SHARES = {"topic": 4, "memory": 4, "facts": 8, "following": 8}


@dataclass(frozen=True)
class Memory:
    """What a prompt says of the text so far."""

    summary: str = ""
    facts: tuple[str, ...] = ()
    tail: str = ""  # the end of the text, verbatim, with the white space before what follows


@dataclass(frozen=True)
class Composer:
    """Makes the prompts of one text. ``piece`` is the room for what is written, in tokens."""

    tokenizer: Tokenizer
    context: int
    kind: Kind
    language: str
    topic: str
    piece: int
    profile: str = ""  # what prompts show of a person's profile, ahead of the instruction

    @property
    def frame(self) -> Frame:
        return frame_of(self.language)

    @property
    def summary_tokens(self) -> int:
        """Return the most tokens of a summary: what its share of a prompt holds."""
        return max(8, (self.context - self.piece) // _SHARES["memory"])

    @property
    def heading_tokens(self) -> int:
        """Return the most tokens of a heading that the model writes."""
        return max(4, min(16, (self.context - self.piece) // 8))

    def count(self, text: str) -> int:
        """Return the number of tokens of a text as a prompt."""
        return len(encode_prompt(self.tokenizer, text))

    def check(self, headings: Sequence[str]) -> None:
        """Raise ValueError if a section's prompt has no room beside instruction and heading.

        Without ``headings``, those count that the model may write.
        """
        for number in range(1, len(headings) + 1):
            self._room(headings, number)
        if not headings:
            self._room((fill_in(self.frame.part, number="1"),), 1, self.heading_tokens)

    def of_piece(self, headings: Sequence[str], number: int, memory: Memory) -> str:
        """Return the prompt of a piece of section ``number``, from 1.

        Raises ValueError as `check` does.
        """
        frame = self.frame
        room = self._room(headings, number)
        following = headings[number] if number < len(headings) else ""
        facts = list(memory.facts)
        while facts and not self._fits("facts", self._joined(facts), room):
            facts.pop()
        parts = {
            "topic": self._part("topic", self.topic, room),
            "memory": self._part("memory", memory.summary, room),
            "facts": self._part("facts", self._joined(facts), room),
        }
        if not following or not self._fits("following", following, room):
            following = ""
        head = (
            self._instruction()
            + "".join(parts.values())
            + self._section(headings, number)
            + (fill_in(frame.following, text=following) if following else "")
            + frame.body
        )
        return head + self._end(memory.tail, head, self.context - self.piece)

    def of_outline(self, headings: Sequence[str]) -> str:
        """Return the prompt of the heading that follows ``headings``; the first may be left out."""
        frame = self.frame
        most = self.context - self.heading_tokens
        head = self._instruction() + frame.outline
        room = most - self.count(head)
        head = self._instruction() + self._part("topic", self.topic, room) + frame.outline
        lines = [f"{i}.{frame.space}{heading}\n" for i, heading in enumerate(headings, 1)]
        last = f"{len(headings) + 1}."
        while lines and self.count(head + "".join(lines) + last) > most:
            lines.pop(0)
        return head + "".join(lines) + last

    def of_summary(self, summary: str, text: str) -> str:
        """Return the prompt that asks for a summary of ``summary`` and the text behind it."""
        frame = self.frame
        most = self.context - self.summary_tokens
        head = self._part("memory", summary, most)

        def fits(part: str) -> bool:
            return self.count(head + part + frame.summary) <= most

        return head + cut(text, "end", fits) + frame.summary

    def _room(self, headings: Sequence[str], number: int, more: int = 0) -> int:
        """Return R: the tokens that instruction and heading leave to the other parts.

        ``more`` tokens are kept free for a longer heading.
        """
        budget = self.context - self.piece
        text = self._instruction() + self._section(headings, number) + self.frame.body
        fixed = self.count(text) + more
        room = budget - fixed
        if room < LEAST:
            raise ValueError(
                f"section {number}, {headings[number - 1][:40]!r}, needs {fixed} "
                f"tokens for instruction and heading and {LEAST} for the text before it, and of "
                f"the model's context of {self.context} a prompt has {budget}, beside pieces of "
                f"{self.piece}; shorten the heading, write shorter pieces with a smaller "
                "--set=decode.max_new_tokens, "
                f"{'lower --profile_share, ' if self.profile else ''}or use a model with more "
                "positions"
            )
        return room

    def _instruction(self) -> str:
        return self.profile + self.kind.instructions[self.language] + "\n"

    def _section(self, headings: Sequence[str], number: int) -> str:
        return fill_in(
            self.frame.section,
            number=str(number),
            count=str(len(headings)),
            text=headings[number - 1],
        )

    def _joined(self, facts: Sequence[str]) -> str:
        return self.frame.fact_separator.join(facts)

    def _part(self, name: str, text: str, room: int) -> str:
        """Return a part with its words, shortened to its share of ``room`` tokens, or ""."""
        if not text:
            return ""
        text = cut(text, "start", lambda part: self._fits(name, part, room))
        return fill_in(getattr(self.frame, name), text=text) if text else ""

    def _fits(self, name: str, text: str, room: int) -> bool:
        filled = fill_in(getattr(self.frame, name), text=text)
        return len(self.tokenizer.encode(filled)) <= room // _SHARES[name]

    def _end(self, tail: str, head: str, budget: int) -> str:
        """Return the longest end of ``tail`` that fits behind ``head``."""
        fits: Callable[[str], bool] = lambda part: self.count(head + part) <= budget  # noqa: E731
        # A token has few characters: what is longer than this cannot fit.
        return cut(tail[-32 * budget :], "end", fits)
