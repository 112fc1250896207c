"""/v1/completions: prompts in, continuations out, with OpenAI's fields."""

import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mtnlg_jax.serve.answers import PING_SECONDS, EventStream, answer, unless_gone
from mtnlg_jax.serve.beams import Beams
from mtnlg_jax.serve.following import MOST_BEHIND, Watch, result_of
from mtnlg_jax.serve.models import Model
from mtnlg_jax.serve.refusals import Refused
from mtnlg_jax.serve.requests import Finished, Job, Token
from mtnlg_jax.serve.schema import Completion
from mtnlg_jax.serve.settings import MOST_SAMPLES, grammar_of, seed_of, settings_of, within
from mtnlg_jax.serve.slices import Scored, score_slices
from mtnlg_jax.serve.writing import (
    Call,
    Choice,
    Count,
    Followed,
    Offsets,
    Rows,
    Writer,
    gather,
    generations,
    now,
    reason_of,
    stream_rows,
)

MOST_PROMPTS = 128
MOST_LOGPROBS = 5
# Prompts and samples of one request.
MOST_ROWS = 256


async def completions(
    request: Request, query: Completion, model: Model, call: Call, watch: Watch
) -> Response:
    """Answer a request of /v1/completions."""
    _check(query)
    prompts = _prompts(query, model)
    best_of = query.n if query.best_of is None else query.best_of
    if len(prompts) * best_of > MOST_ROWS:
        raise Refused(
            f"{len(prompts)} prompts times {best_of} samples are {len(prompts) * best_of} rows, "
            f"and {MOST_ROWS} are the most; send fewer at once",
            "prompt",
        )
    settings = settings_of(query, model, max(query.max_tokens, 1), best_of)
    seed = seed_of(query.seed)
    grammar = await grammar_of(query, model)
    writer: Writer | None = None
    samples = best_of
    if query.max_tokens and query.use_beam_search:
        samples = query.n
        writer = Beams(model, prompts, settings, seed, call, query.logprobs or 0, grammar)
    elif query.max_tokens:
        alternatives = query.logprobs or 0
        rows = generations(
            model, prompts, settings, best_of, seed, call, alternatives, grammar=grammar
        )
        writer = Rows(model, rows)
    one = _Completion(query, model, prompts, writer, samples, seed)
    if not query.stream:
        return await unless_gone(request, one.whole(call, watch))
    # Before the rows: nobody would read their events while the prompts are scored.
    scores = await unless_gone(request, one.scores(call, watch))
    following = writer.follow(watch, MOST_BEHIND) if writer else None
    close = following.cancel if following else lambda: None
    return EventStream(one.stream(following, scores), close)


def _check(query: Completion) -> None:
    if query.suffix:
        raise Refused(
            "suffix is not supported, as the model writes from left to right; use /v1/fill for a "
            "gap, or leave it out",
            "suffix",
        )
    if query.logprobs is not None:
        within("logprobs", query.logprobs, 0, MOST_LOGPROBS)
    within("max_tokens", query.max_tokens, 0, 2**31 - 1)
    if query.max_tokens == 0 and not query.echo:
        raise Refused(
            "max_tokens=0 writes nothing, and echo is not set; give 1 or more, or set echo",
            "max_tokens",
        )
    within("n", query.n, 1, MOST_SAMPLES)
    if query.best_of is not None:
        within("best_of", query.best_of, query.n, MOST_SAMPLES)
        if query.stream and query.best_of > query.n and not query.use_beam_search:
            raise Refused(
                f"best_of={query.best_of} chooses when all texts are known, so it cannot stream; "
                f"set stream=false, or best_of={query.n}",
                "best_of",
            )


def _prompts(query: Completion, model: Model) -> list[tuple[int, ...]]:
    """Return the tokens of each prompt: texts, ids, or lists of them."""
    given = query.prompt
    entries: list[Any]
    if isinstance(given, str):
        entries = [given]
    elif given and all(isinstance(each, int) for each in given):
        entries = [given]
    else:
        entries = list(given)
    if not 1 <= len(entries) <= MOST_PROMPTS:
        raise Refused(
            f"prompt has {len(entries)} texts; give 1 to {MOST_PROMPTS} in a request", "prompt"
        )
    prompts = []
    for entry in entries:
        if isinstance(entry, int):
            raise Refused(
                "prompt mixes token ids with texts or lists; give texts, ids, or lists of ids",
                "prompt",
            )
        if isinstance(entry, str):
            tokens = model.encode(entry, query.add_special_tokens)
        else:
            tokens = model.check_ids(entry, "prompt") or (model.tokenizer.bos_id,)
        model.check_room(tokens, 1 if query.max_tokens else 0, "prompt")
        prompts.append(tokens)
    return prompts


class _Completion:
    """A request that passed its checks, and how it is answered."""

    def __init__(
        self,
        query: Completion,
        model: Model,
        prompts: Sequence[tuple[int, ...]],
        writer: Writer | None,
        samples: int,
        seed: int,
    ):
        self.query = query
        self.model = model
        self.prompts = prompts
        self.writer = writer
        self.samples = samples
        self.count = Count(sum(map(len, prompts)))
        self.head = {
            "id": "cmpl-" + secrets.token_hex(12),
            "object": "text_completion",
            "created": now(),
            "model": model.name,
            # With it the same request writes the same text.
            "seed": seed,
        }

    async def scores(self, call: Call, watch: Watch) -> list[Scored | None]:
        """Return the log-probabilities of the prompts where echo shows them."""
        if not self.query.echo or self.query.logprobs is None:
            return [None] * len(self.prompts)
        # Each number of best tokens is a program of its own, so there are two.
        top = 1 if self.query.logprobs <= 1 else MOST_LOGPROBS
        run = score_slices(self.prompts, top)
        return await result_of(self.model.engine, Job(run, call.key, call.deadline), watch)

    async def whole(self, call: Call, watch: Watch) -> Response:
        scores = await self.scores(call, watch)
        number = len(self.prompts) * self.samples
        choices = [Choice(reason="length") for _ in range(number)]
        if self.writer is not None:
            choices = await gather(self.writer.follow(watch), self.writer.number, self.count)
        told: list[Any] = []
        for prompt, score in enumerate(scores):
            own = choices[prompt * self.samples : (prompt + 1) * self.samples]
            own = [choice for choice in own if choice.reason]
            if self.samples > self.query.n:
                own = sorted(own, key=lambda each: -each.per_token)[: self.query.n]
            for choice in own:
                table = self.table(prompt, score)
                if table is not None:
                    self.add(table, choice.tokens)
                    del table["decoder"]
                text = self.echoed(prompt) + choice.text
                told.append(_choice(len(told), text, choice.reason, table))
        return answer({**self.head, "choices": told, "usage": self.count.usage()})

    async def stream(
        self, following: Followed | None, scores: Sequence[Scored | None]
    ) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the chunks of a streamed answer."""
        usage = self.query.stream_options is not None and self.query.stream_options.include_usage
        more = {"usage": None} if usage else {}

        def chunk(*values: Any) -> dict[str, Any]:
            return {**self.head, "choices": [_choice(*values)], **more}

        tables: list[dict[str, Any] | None] = []
        try:
            for prompt, score in enumerate(scores):
                for _ in range(self.query.n):
                    table = self.table(prompt, score)
                    tables.append(table)
                    if self.query.echo:
                        end = None if self.writer else "length"
                        shown = _shown(table)
                        yield chunk(len(tables) - 1, self.echoed(prompt), end, shown)
            if following is not None:
                async for each in stream_rows(following, self.count, PING_SECONDS):
                    if each is None:
                        yield None
                        continue
                    index, event = each
                    table = tables[index]
                    if isinstance(event, Token):
                        if table is not None:
                            self.add(table, [event])
                        if event.text or table is not None:
                            yield chunk(index, event.text, None, _shown(table))
                    elif isinstance(event, Finished):
                        yield chunk(index, event.text, reason_of(event), None)
        finally:
            if following is not None:
                following.cancel()
        if usage:
            yield {**self.head, "choices": [], "usage": self.count.usage()}

    def echoed(self, prompt: int) -> str:
        return self.model.tokenizer.decode(self.prompts[prompt]) if self.query.echo else ""

    def table(self, prompt: int, score: Scored | None) -> dict[str, Any] | None:
        """Return the start of the log-probabilities of a choice; None if they are not asked for."""
        if self.query.logprobs is None:
            return None
        table: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
            "decoder": Offsets(),
        }
        if not self.query.echo:
            return table
        assert score is not None
        tokens = self.prompts[prompt]
        # Nothing predicts the first token.
        self._append(table, tokens[0], None, None)
        for at, token in enumerate(tokens[1:]):
            logprob = float(score.logprobs[at])
            best = zip(score.best[at].tolist(), score.best_logprobs[at].tolist(), strict=True)
            self._append(table, token, logprob, dict(best))
        return table

    def add(self, table: dict[str, Any], tokens: Sequence[Token]) -> None:
        for each in tokens:
            self._append(table, each.token, each.logprob, dict(each.top))

    def _append(
        self,
        table: dict[str, Any],
        token: int,
        logprob: float | None,
        top: dict[int, float] | None,
    ) -> None:
        table["tokens"].append(self.model.piece(token))
        table["token_logprobs"].append(logprob)
        if top is not None:
            most = self.query.logprobs or 0
            # The chosen token is always among them, as in OpenAI's API.
            shown = dict(list(top.items())[: max(most, 1)]) | {token: logprob}
            named = {self.model.piece(index): value for index, value in shown.items()}
            table["top_logprobs"].append(named)
        else:
            table["top_logprobs"].append(None)
        table["text_offset"].append(table["decoder"].next(self.model.tokenizer.token_bytes(token)))


def _choice(index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}


def _shown(table: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what is new in a table, and empty it."""
    if table is None:
        return None
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    shown = {name: table[name] for name in names}
    for name in names:
        table[name] = []
    return shown
