"""What the engine takes and what it answers.

This module imports no part of JAX that computes: a request is checked here before it is queued, so
that a mistake costs no time on the device and raises one ValueError with the value, the limit and
the way out.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

from mtnlg_jax.config import DecodeConfig, validate_decode
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.constraint import Constraint

Reason = Literal["stop", "length", "cancelled", "deadline", "error"]

# The most alternatives that are told with each token, as in OpenAI's top_logprobs.
MOST_ALTERNATIVES = 20


class Busy(Exception):
    """The queue is full. ``retry_after``: seconds after which a place is likely to be free."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Draining(Exception):
    """The engine finishes what it has and takes nothing new."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """One row to write: a prompt, its settings and its seed.

    What is written depends on ``tokens``, ``settings``, ``seed`` and ``constraint`` alone, not on
    other requests or on when it arrives. Equal shapes round alike; other numbers of rows may round
    a product differently in its last bit.

    Raises ValueError if a setting is out of range or acts on more than one row.
    """

    # Ids of the prompt, with its <bos> if it has one; at least one.
    tokens: tuple[int, ...]
    # Settings of one row. ``seed`` is not read from here; ``max_time`` counts from the first step.
    settings: DecodeConfig
    seed: int
    # Requests with different keys take turns; within a key the first to come is served first.
    key: str = ""
    # A time of time.monotonic() at which the row ends with what is there; None: no limit.
    deadline: float | None = None
    # Which ids may come next, as an object of this row; see `Constraint`.
    constraint: Constraint | None = None
    # The alternatives that are told with each token, 0 to 20.
    alternatives: int = 0

    def __post_init__(self):
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if not self.tokens:
            raise ValueError("the prompt has no tokens; give at least one, such as <bos>")
        validate_decode(self.settings)
        _check_row(self.settings)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is outside 0 to {2**32 - 1}; give one in between")
        if not 0 <= self.alternatives <= MOST_ALTERNATIVES:
            raise ValueError(
                f"{self.alternatives} alternatives a token are outside 0 to {MOST_ALTERNATIVES}; "
                "ask for fewer"
            )
        _check_deadline(self.deadline)


@dataclasses.dataclass(frozen=True)
class Job:
    """Work that is no single row, done in slices between the steps of rows.

    Such work is ranking, scoring, beams and echo.
    """

    # Called once, on the engine's thread. Each next() of what it returns is one slice, of at most
    # 1,024 tokens; the last value yielded is the result.
    run: Callable[[Decoder], Iterator[object]]
    key: str = ""
    # A time of time.monotonic() after which no further slice starts; None: no limit.
    deadline: float | None = None

    def __post_init__(self):
        _check_deadline(self.deadline)


Work = Generation | Job


def close(slices: object) -> None:
    """End what `Job.run` returned before its last slice; None, or closed already, is no mistake."""
    # Only generators have an end to run.
    getattr(slices, "close", lambda: None)()


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens that a request took. The prompt counts whole, also where keys were reused."""

    prompt_tokens: int
    completion_tokens: int  # without the end token
    cached_tokens: int  # of the prompt, those whose keys were already there


@dataclasses.dataclass(frozen=True)
class Token:
    """One token that was written."""

    index: int  # among the new tokens, from 0
    token: int
    text: str  # what may be shown now; "" while it is held back
    logprob: float  # natural logarithm, in the model's own distribution
    # (id, log-probability) of the most probable tokens, best first; as many as were asked for. The
    # number of ``token`` is ``logprob``, bit for bit.
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of a request; always its last event.

    A `Job` that ends well has a `Result` before it and the reason "stop".
    """

    # "length": max_new_tokens or the context's end. "deadline": the deadline or max_time passed.
    reason: Reason
    text: str  # what was held back and is text after all; not the whole text
    usage: Usage
    error: str = ""  # a sentence for the user where the reason is "error"


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a `Job`."""

    value: Any


Event = Token | Result | Finished


def _check_row(settings: DecodeConfig) -> None:
    """Raise ValueError on settings that write or guess more than one row."""
    if settings.num_beams > 1:
        raise ValueError(
            f"num_beams={settings.num_beams} is not one row; run beam search as a Job, or set "
            "num_beams=1"
        )
    if settings.num_return_sequences > 1:
        raise ValueError(
            f"num_return_sequences={settings.num_return_sequences} is not one row; submit one "
            "Generation for each, with seed + i"
        )
    if settings.prompt_lookup_num_tokens:
        raise ValueError(
            f"prompt_lookup_num_tokens={settings.prompt_lookup_num_tokens}: rows that share steps "
            "do not guess tokens; set it to 0, or run `generate` as a Job"
        )


def _check_deadline(deadline: float | None) -> None:
    if deadline is not None and math.isnan(deadline):
        raise ValueError("the deadline is not a number; give a time of time.monotonic(), or None")
