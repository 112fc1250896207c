"""What completions and chat share: rows to write, their events, choices and usage."""

import codecs
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.grammar import Grammar
from mtnlg_jax.serve.following import Following, Watch, ended
from mtnlg_jax.serve.models import Model
from mtnlg_jax.serve.requests import Event, Finished, Generation, Token
from mtnlg_jax.serve.settings import with_room

_REASONS = {"stop": "stop", "length": "length", "deadline": "timeout"}


@dataclasses.dataclass(frozen=True)
class Call:
    """Who asks, and until when; what every handler gets."""

    key: str
    deadline: float  # of time.monotonic()


class Followed(Protocol):
    """Rows that are written; `Following` is one."""

    def events(self, patience: float | None = None) -> AsyncIterator[tuple[int, Event] | None]: ...

    def cancel(self) -> None: ...


class Writer(Protocol):
    """What writes the rows of a request: `Rows`, or beams."""

    @property
    def number(self) -> int: ...

    def follow(self, watch: Watch, most_behind: int | None = None) -> Followed: ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that the engine writes beside those of other requests."""

    model: Model
    rows: Sequence[Generation]

    @property
    def number(self) -> int:
        return len(self.rows)

    def follow(self, watch: Watch, most_behind: int | None = None) -> Following:
        """Queue the rows. Raise Refused where the engine takes none."""
        return Following(self.model.engine, self.rows, watch, most_behind)


@dataclasses.dataclass
class Choice:
    """One row as it is written."""

    text: str = ""
    reason: str = ""  # "" until it has ended; a search may find fewer beams than were asked for
    tokens: list[Token] = dataclasses.field(default_factory=list)

    def take(self, event: Event) -> None:
        """Add an event. Raise Refused where the row failed, or ended before it began."""
        if isinstance(event, Token):
            self.text += event.text
            self.tokens.append(event)
        elif isinstance(event, Finished):
            check_end(event, bool(self.tokens))
            self.text += event.text
            self.reason = _REASONS[event.reason]

    @property
    def per_token(self) -> float:
        """The mean log-probability, by which best_of chooses."""
        return sum(each.logprob for each in self.tokens) / max(len(self.tokens), 1)


def check_end(event: Finished, has_text: bool) -> None:
    """Raise Refused if a row failed, or its time was over before it had text."""
    if event.reason not in _REASONS or (event.reason == "deadline" and not has_text):
        raise ended(event)


def reason_of(event: Finished) -> str:
    return _REASONS[event.reason]


@dataclasses.dataclass
class Count:
    """Tokens of a request, for its usage."""

    prompt: int
    written: int = 0
    cached: int = 0

    def take(self, event: Finished) -> None:
        self.written += event.usage.completion_tokens
        self.cached += event.usage.cached_tokens

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def generations(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: DecodeConfig,
    samples: int,
    seed: int,
    call: Call,
    alternatives: int = 0,
    grammar: Grammar | None = None,
) -> list[Generation]:
    """Return the rows of a request: ``samples`` of each prompt, the i-th with seed + i.

    Raises ValueError on settings that a row cannot have.
    """
    rows = []
    for prompt in prompts:
        row_settings = with_room(settings, model.decoder.context - len(prompt))
        for sample in range(samples):
            rows.append(
                Generation(
                    tuple(prompt),
                    row_settings,
                    (seed + sample) % 2**32,
                    key=call.key,
                    deadline=call.deadline,
                    constraint=grammar.row() if grammar else None,
                    alternatives=alternatives,
                )
            )
    return rows


async def gather(following: Followed, number: int, count: Count) -> list[Choice]:
    """Return the rows when all have ended, in order. Cancels them if it is cancelled or fails."""
    choices = [Choice() for _ in range(number)]
    try:
        async for each in following.events():
            if each is None:
                continue
            index, event = each
            choices[index].take(event)
            if isinstance(event, Finished):
                count.take(event)
    finally:
        following.cancel()
    return choices


async def stream_rows(
    following: Followed, count: Count, patience: float
) -> AsyncIterator[tuple[int, Event] | None]:
    """Yield the events of rows; None after ``patience`` seconds of silence."""
    begun = set()
    try:
        async for each in following.events(patience):
            if each is not None:
                index, event = each
                if isinstance(event, Token):
                    begun.add(index)
                elif isinstance(event, Finished):
                    check_end(event, index in begun)
                    count.take(event)
            yield each
    finally:
        following.cancel()


class Offsets:
    """Where each token begins in a text, in characters."""

    def __init__(self, start: int = 0):
        self._at = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, data: bytes) -> int:
        """Return where a token with these bytes begins."""
        here = self._at
        self._at += len(self._decoder.decode(data))
        return here


def now() -> int:
    return int(time.time())
