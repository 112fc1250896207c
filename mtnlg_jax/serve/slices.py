"""Work of the model in slices, so that the engine can write tokens of others in between.

What these functions return can be pickled, since other processes may have to do the same.
"""

import functools
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mtnlg_jax.decode.best import Best as Scored
from mtnlg_jax.decode.best import score_best
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.serve.measures import JOB_THREAD

__all__ = ["Scored", "in_slices", "mean_slices", "score_slices"]


def score_slices(
    rows: Sequence[Sequence[int]], top: int
) -> Callable[[Decoder], Iterator[list[Scored]]]:
    """Return the `Job.run` that scores every token of each row; see `score_best`."""
    return functools.partial(_score, rows, top)


def _score(rows: Sequence[Sequence[int]], top: int, decoder: Decoder) -> Iterator[list[Any]]:
    for found in score_best(decoder, rows, top):
        for each in found:
            if each is not None and not np.isfinite(each.logprobs).all():
                raise ValueError(
                    "the log-probabilities of the prompt are not finite; look for parameters "
                    "of the model that are not finite, or take another checkpoint"
                )
        yield found


def mean_slices(
    rows: Sequence[Sequence[int]], starts: Sequence[int]
) -> Callable[[Decoder], Iterator[list[float]]]:
    """Return the `Job.run` that yields, for each row, exp of the mean log-probability from its
    start on."""
    return functools.partial(_mean, rows, starts)


def _mean(
    rows: Sequence[Sequence[int]], starts: Sequence[int], decoder: Decoder
) -> Iterator[list[float]]:
    for found in _score(rows, 1, decoder):
        yield [
            0.0 if each is None else math.exp(float(each.logprobs[start - 1 :].mean()))
            for each, start in zip(found, starts, strict=True)
        ]


class _Closed(BaseException):
    """Raised inside the work when nobody wants its result any more."""


# Seconds that the caller waits for a slice, and for one that was late already: a program that is
# compiled may take minutes.
PATIENCE = 0.1
PATIENCE_WHEN_LATE = 0.01
# Threads of iterators that were closed, by the parameters that they may still use.
_left: dict[int, threading.Thread] = {}


def in_slices(work: Callable[[Decoder], object]) -> Callable[[Decoder], Iterator[object]]:
    """Return the `Job.run` of a function that calls the model several times, such as `rank`.

    The function runs in a thread of its own. It stops each time it takes the parameters for another
    call of the model, and next() lets it go on. What it raises, next() raises. If the iterator is
    closed, the function ends at its next call.

    A slice that takes long, since it compiles, goes on while next() returns None, so that others
    can write. If the iterator is closed meanwhile, the next function waits for its end: two at a
    time would change what belongs to the model, such as the form of a grammar. Over a mesh next()
    waits: programs of two threads could meet in another order on each device, and their
    collectives would wait for each other.
    """
    return functools.partial(_run, work)


def _run(work: Callable[[Decoder], object], decoder: Decoder) -> Iterator[object]:
    turns: queue.SimpleQueue[bool] = queue.SimpleQueue()
    reports: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    first = True

    class Stepping(Decoder):
        """A decoder whose parameters are handed out once a slice."""

        __slots__ = ()

        @property
        def params(self):
            nonlocal first
            if not first:
                reports.put(("slice", None))
                if not turns.get():
                    raise _Closed
            first = False
            return decoder.params

    def body() -> None:
        try:
            reports.put(("result", work(Stepping(*decoder))))
        except _Closed:
            reports.put(("closed", None))
        except BaseException as error:
            reports.put(("error", error))

    key = id(decoder.params)
    before = _left.get(key)
    while before is not None and before.is_alive():
        before.join(PATIENCE_WHEN_LATE)
        if before.is_alive():
            yield None
    thread = threading.Thread(target=body, name=JOB_THREAD, daemon=True)
    thread.start()
    patience = PATIENCE if decoder.mesh is None else None
    try:
        while True:
            try:
                kind, value = reports.get(timeout=patience)
            except queue.Empty:
                patience = PATIENCE_WHEN_LATE
                yield None
                continue
            if kind == "error":
                raise value
            yield value
            if kind == "result":
                return
            patience = PATIENCE if decoder.mesh is None else None
            turns.put(True)
    finally:
        # It ends at its next call of the model, until which it may compile for long yet.
        turns.put(False)
        if decoder.mesh is None:
            _left[key] = thread
        else:
            thread.join()
