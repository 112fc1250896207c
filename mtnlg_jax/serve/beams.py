"""Beams over the API: a search between the turns of the engine, told as rows are."""

import dataclasses
import time
from collections.abc import AsyncIterator, Iterator, Sequence

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.best import score_best
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.grammar import Grammar
from mtnlg_jax.decode.results import Generated, text_stream
from mtnlg_jax.serve.following import Following, Watch, ended
from mtnlg_jax.serve.models import Model
from mtnlg_jax.serve.refusals import Refused
from mtnlg_jax.serve.requests import (
    MOST_ALTERNATIVES,
    Event,
    Finished,
    Job,
    Reason,
    Result,
    Token,
    Usage,
)
from mtnlg_jax.serve.slices import in_slices
from mtnlg_jax.serve.writing import Call, with_room

# A search without a limit of time is one slice; with one it returns after every few tokens.
_NO_LIMIT = 1e6
_REASONS: dict[str, Reason] = {"stop": "stop", "length": "length", "timeout": "deadline"}


@dataclasses.dataclass(frozen=True)
class Beams:
    """The beams of some prompts; a `writing.Writer`.

    ``settings.num_return_sequences`` of ``settings.num_beams`` beams are told of each prompt.
    """

    model: Model
    prompts: Sequence[tuple[int, ...]]
    settings: DecodeConfig
    seed: int
    call: Call
    alternatives: int = 0
    grammar: Grammar | None = None

    def __post_init__(self):
        if self.model.decoder.int8_cache:
            raise Refused(
                "beam search does not work with the int8 cache of this server; leave "
                "use_beam_search out, or start it without --cache=int8",
                "use_beam_search",
            )
        mesh = self.model.decoder.mesh
        if self.grammar is not None and mesh is not None and mesh.is_multi_process:
            raise Refused(
                "beam search with a response_format does not run over several processes; leave one "
                "of the two out",
                "use_beam_search",
            )

    @property
    def number(self) -> int:
        """The most rows that are told."""
        return len(self.prompts) * self.settings.num_return_sequences

    def follow(self, watch: Watch, most_behind: int | None = None) -> "_Followed":
        """Queue the search. Raise Refused where the engine takes none."""
        job = Job(in_slices(self._search), self.call.key, self.call.deadline)
        return _Followed(Following(self.model.engine, [job], watch, most_behind), self)

    def _search(self, decoder: Decoder) -> list[list["_Beam"]] | Refused:
        """Return the beams of each prompt, best first. Runs between turns of the engine."""
        # A grammar that stays the same function to the compiler, whatever its form.
        constraint = self.model.grammar_of_jobs(self.grammar) if self.grammar else None
        told = []
        for prompt in self.prompts:
            # It ends by itself, with the text that is there, before the engine would end it.
            left = max(0.9 * (self.call.deadline - time.monotonic()), 1e-3)
            settings = with_room(self.settings, decoder.context - len(prompt))
            settings = dataclasses.replace(
                settings,
                max_time=min(settings.max_time or _NO_LIMIT, left),
                # Nothing is drawn at temperature 0, and a seed is refused.
                seed=self.seed if settings.temperature else settings.seed,
            )
            try:
                found = generate(
                    decoder, self.model.tokenizer, [prompt], settings, constraint=constraint
                )
            except ValueError as error:  # what only the search shows, such as no possible beam
                return Refused(str(error), "use_beam_search")
            told.append(list(self._with_tops(decoder, prompt, found)))
        return told

    def _with_tops(
        self, decoder: Decoder, prompt: tuple[int, ...], found: list[Generated]
    ) -> Iterator["_Beam"]:
        if not self.alternatives:
            for each in found:
                yield _Beam(each, each.logprobs, [()] * len(each.tokens))
            return
        rows = [(*prompt, *each.tokens) for each in found]
        *_, scores = score_best(decoder, rows, MOST_ALTERNATIVES)
        for each, score in zip(found, scores, strict=True):
            assert score is not None
            start = len(prompt) - 1
            stop = start + len(each.tokens)
            best = score.best[start:stop, : self.alternatives].tolist()
            logprobs = score.best_logprobs[start:stop, : self.alternatives].tolist()
            tops = [tuple(zip(*pair, strict=True)) for pair in zip(best, logprobs, strict=True)]
            # Of the array of the alternatives, so that "it is the best" holds bit for bit.
            yield _Beam(each, tuple(score.logprobs[start:stop].tolist()), tops)

    def events_of(self, told: list[list["_Beam"]]) -> Iterator[tuple[int, Event]]:
        """Yield the events of each row, as if it had been written now."""
        for prompt, beams in enumerate(told):
            for number, beam in enumerate(beams):
                index = prompt * self.settings.num_return_sequences + number
                stream = text_stream(self.model.tokenizer, self.settings)
                for at, token in enumerate(beam.found.tokens):
                    text = stream.push(token)
                    yield index, Token(at, token, text, beam.logprobs[at], beam.tops[at])
                usage = Usage(len(self.prompts[prompt]), len(beam.found.tokens), 0)
                reason = _REASONS[beam.found.finish_reason]
                yield index, Finished(reason, stream.finish(), usage)


@dataclasses.dataclass(frozen=True)
class _Beam:
    """A beam with what is told of each of its tokens."""

    found: Generated
    logprobs: Sequence[float]
    tops: Sequence[tuple[tuple[int, float], ...]]


class _Followed:
    """A search that runs, followed as rows are."""

    def __init__(self, following: Following, beams: Beams):
        self._following = following
        self._beams = beams

    async def events(
        self, patience: float | None = None
    ) -> AsyncIterator[tuple[int, Event] | None]:
        """Yield the events of all rows once the search has ended; None as `Following.events`."""
        told = None
        async for each in self._following.events(patience):
            if each is None:
                yield None
                continue
            event = each[1]
            if isinstance(event, Result):
                told = event.value
            elif isinstance(event, Finished) and event.reason != "stop":
                raise ended(event)
        if isinstance(told, Refused):
            raise told
        assert told is not None
        for pair in self._beams.events_of(told):
            yield pair

    def cancel(self) -> None:
        """End the search; safe to call again."""
        self._following.cancel()
