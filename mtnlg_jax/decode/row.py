"""One row of a running batch, as the host knows it."""

# Shapes: U steps of a turn at most, B rows, A alternatives

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.batched_settings import Rows as Fields
from mtnlg_jax.decode.constraint import Constraint
from mtnlg_jax.decode.results import check_finite, ends_of_config, text_stream
from mtnlg_jax.decode.slots import Written


@dataclasses.dataclass(frozen=True)
class NewToken:
    """A token that a row wrote; see `Token` of serve/requests.py for the fields."""

    index: int
    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...]


class Row:
    """One row of a `Batch`. ``reason`` is "" while it runs, then as in `Generated` or "error"."""

    def __init__(self, tokenizer, tokens: Sequence[int], settings: DecodeConfig, seed: int):
        self.known = list(tokens)  # prompt and all that was written, an end token included
        self.prompt = len(self.known)
        self.settings = settings
        self.seed = seed
        self.constraint: Constraint | None = None
        self.alternatives = 0
        self.slot = -1
        self.placed = False  # whether it writes; its prompt is read first
        self.read = 0  # tokens whose keys are in the cache
        self.cached = 0  # tokens of the prompt whose keys were there already
        self.longest = 0
        self.mu = 2 * settings.mirostat_tau  # as `mirostat.start`
        self.reason = ""
        self.error = ""
        self.tail = ""  # text that was held back, shown at the end
        self.new: list[int] = []  # what `Generated` has as tokens
        self.stream = text_stream(tokenizer, settings)
        self.ends = ends_of_config(tokenizer, settings)
        self.began = math.inf  # when the first step began
        self.tier = 0
        self.fields: Fields | None = None  # its settings
        self.allowed: np.ndarray | None = None  # what its constraint allows next

    @property
    def text(self) -> str:
        """All text shown so far."""
        return self.stream.text

    def take(self, written: Written) -> list[NewToken]:
        """Add what the device wrote, and return the tokens that are part of the text."""
        at = self.slot
        count = int(written.lengths_B[at]) - len(self.known)
        first = len(self.known) - self.prompt
        tokens = written.tokens_UB[:count, at].tolist()
        logprobs = written.logprobs_UB[:count, at]
        self.known += tokens
        self.read = len(self.known) - 1
        self.mu = float(written.mu_B[at])
        try:
            check_finite(np.asarray(logprobs), 0, first)
        except ValueError as error:
            self.fail(str(error))
            return []
        told: list[NewToken] = []
        for number, token in enumerate(tokens):
            # What follows a stop string was written in the same turn, and is not part of the row.
            if self.stream.stopped or token in self.ends:
                break
            self.new.append(token)
            piece = self.stream.push(token)
            top = self._top(written, number)
            told.append(NewToken(len(self.new) - 1, token, piece, float(logprobs[number]), top))
            if not self._accept(token):
                return told
        if self.stream.stopped or len(self.new) < len(self.known) - self.prompt:
            self.end("stop")
        elif written.done_B[at]:
            self.end("length")
        elif self.settings.max_time and time.monotonic() - self.began > self.settings.max_time:
            self.end("timeout")
        return told

    def ask(self) -> None:
        """Ask the constraint what may come next; the row ends with "error" if it fails."""
        if self.constraint is None:
            return
        try:
            self.allowed = np.asarray(self.constraint.allowed(), bool)
        except Exception as error:  # of a library: it must not end other rows
            self.fail(f"the constraint failed: {error}")

    def end(self, reason: str) -> None:
        """End the row; text that was held back becomes its ``tail``."""
        self.reason = reason
        self.tail = self.stream.finish()

    def fail(self, error: str) -> None:
        """End the row with an error."""
        self.error = error
        self.end("error")

    def _accept(self, token: int) -> bool:
        if self.constraint is not None:
            try:
                self.constraint.accept(token)
            except Exception as error:  # as in `ask`
                self.fail(f"the constraint failed: {error}")
        return not self.reason

    def _top(self, written: Written, number: int) -> tuple[tuple[int, float], ...]:
        if not self.alternatives:
            return ()
        assert written.top_tokens_UBA is not None and written.top_logprobs_UBA is not None
        ids_A = written.top_tokens_UBA[number, self.slot, : self.alternatives]
        logprobs_A = written.top_logprobs_UBA[number, self.slot, : self.alternatives]
        return tuple(zip(ids_A.tolist(), logprobs_A.tolist(), strict=True))
