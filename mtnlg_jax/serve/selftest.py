"""Prove on a loaded model that what a request is told depends on nothing but itself."""

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.serve.engine import Engine
from mtnlg_jax.serve.requests import Event, Finished, Generation, Token

# Differences of log-probabilities that other shapes of products may cause, in nats: float32 rounds
# at 1e-7, bfloat16 and int8 at 1e-2.
ROUNDING = 0.05
NEW = 24


class Answer:
    """What one request was told."""

    def __init__(self):
        self.events: list[Event] = []
        self._done = threading.Event()

    def __call__(self, events: list[Event]) -> None:
        self.events += events
        if isinstance(events[-1], Finished):
            self._done.set()

    def wait(self, timeout: float | None = None) -> "Answer":
        """Wait for the end. Raise TimeoutError if it does not come."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"no end after {timeout} s; the engine may be busy or stopped")
        return self

    @property
    def ended(self) -> bool:
        """Whether the end came."""
        return self._done.is_set()

    @property
    def tokens(self) -> list[Token]:
        """The tokens, in order."""
        return [event for event in self.events if isinstance(event, Token)]

    @property
    def text(self) -> str:
        """All text that was shown."""
        return "".join(event.text for event in self.tokens) + self.end.text

    @property
    def end(self) -> Finished:
        """The last event."""
        end = self.events[-1]
        assert isinstance(end, Finished)
        return end


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of `selftest`."""

    requests: int
    equal: int  # equal tokens, text and reason
    # Requests that part from their lone run at a token whose two candidates are as probable as
    # rounding can tell: shapes differ between 1 row and several.
    near_ties: int
    different: tuple[int, ...]  # requests that differ otherwise; there should be none
    largest_difference: float  # of log-probabilities of equal tokens, in nats
    compiles: int  # programs compiled while serving; there should be none

    @property
    def passed(self) -> bool:
        """Whether nothing differs and nothing was compiled."""
        return not self.different and not self.compiles


def selftest(engine: Engine, requests: Sequence[Generation] | None = None) -> Report:
    """Write requests one at a time and then all at once, and compare what each was told.

    The engine must be started, ready and otherwise idle. ``requests``: default 16 random prompts,
    greedy, sampled, with filters and penalties, and with stop strings.

    Raises RuntimeError if the engine stops.
    """
    engine.wait_ready()
    given = list(random_requests(engine)) if requests is None else list(requests)
    before = engine.statistics()["counters"]["compiles_serving"]
    alone = [_ask(engine, [request])[0] for request in given]
    together = _ask(engine, given)
    after = engine.statistics()["counters"]["compiles_serving"]
    equal = 0
    ties = 0
    different = []
    largest = 0.0
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        largest = max(largest, _distance(one, other))
        if _told(one) == _told(other):
            equal += 1
        elif _is_tie(one, other):
            ties += 1
        else:
            different.append(number)
    return Report(len(given), equal, ties, tuple(different), largest, after - before)


def random_requests(engine: Engine, count: int = 16) -> list[Generation]:
    """Return requests of all kinds, with prompts of random tokens of the tokenizer."""
    draws = np.random.default_rng(0)
    ordinary = np.flatnonzero(~np.asarray(engine.tokenizer.is_special, bool))
    ordinary = ordinary[ordinary < engine.decoder.config.vocabulary]
    context = engine.decoder.context
    new = min(NEW, context // 4)
    plain = DecodeConfig(max_new_tokens=new)
    kinds = [
        plain,
        dataclasses.replace(plain, temperature=1.0),
        dataclasses.replace(plain, temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.1),
        dataclasses.replace(plain, temperature=1.0, stop_strings=("a", "e")),
        dataclasses.replace(plain, presence_penalty=0.5, no_repeat_ngram_size=3),
    ]
    longest = max(2, min(200, context - new))
    return [
        Generation(
            tuple(draws.choice(ordinary, int(draws.integers(1, longest))).tolist()),
            kinds[number % len(kinds)],
            seed=number,
        )
        for number in range(count)
    ]


def _ask(engine: Engine, requests: Sequence[Generation]) -> list[Answer]:
    answers = [Answer() for _ in requests]
    for request, answer in zip(requests, answers, strict=True):
        engine.submit(request, answer)
    return [answer.wait() for answer in answers]


def _told(answer: Answer) -> tuple:
    return [each.token for each in answer.tokens], answer.text, answer.end.reason


def _common(one: Answer, other: Answer) -> int:
    pairs = list(zip(one.tokens, other.tokens, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a.token != b.token), len(pairs))


def _distance(one: Answer, other: Answer) -> float:
    count = _common(one, other)
    pairs = zip(one.tokens[:count], other.tokens[:count], strict=True)
    return max((abs(a.logprob - b.logprob) for a, b in pairs), default=0.0)


def _is_tie(one: Answer, other: Answer) -> bool:
    at = _common(one, other)
    if at >= min(len(one.tokens), len(other.tokens)) or _distance(one, other) > ROUNDING:
        return False
    return abs(one.tokens[at].logprob - other.tokens[at].logprob) <= ROUNDING
