"""/v1/chat/completions: a conversation in, the next answer out, by the model's chat template."""

import dataclasses
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mtnlg_jax.serve.answers import PING_SECONDS, EventStream, answer, unless_gone
from mtnlg_jax.serve.beams import Beams
from mtnlg_jax.serve.bounded import within_seconds
from mtnlg_jax.serve.following import MOST_BEHIND, Watch
from mtnlg_jax.serve.models import Model
from mtnlg_jax.serve.refusals import Refused, not_found
from mtnlg_jax.serve.requests import MOST_ALTERNATIVES, Finished, Token
from mtnlg_jax.serve.schema import Chat, Message
from mtnlg_jax.serve.settings import grammar_of, seed_of, settings_of, within
from mtnlg_jax.serve.writing import (
    Call,
    Count,
    Followed,
    Rows,
    Writer,
    gather,
    generations,
    now,
    reason_of,
    stream_rows,
)

MOST_MESSAGES = 1024
# A template is a program that came with the weights.
TEMPLATE_SECONDS = 5.0
# Names that a request may not take from the template.
_OWN = frozenset(("messages", "add_generation_prompt"))


async def chat(request: Request, query: Chat, model: Model, call: Call, watch: Watch) -> Response:
    """Answer a request of /v1/chat/completions."""
    within("top_logprobs", query.top_logprobs, 0, MOST_ALTERNATIVES)
    if query.top_logprobs and not query.logprobs:
        raise Refused(
            f"top_logprobs={query.top_logprobs} needs logprobs=true; set it, or leave both out",
            "top_logprobs",
        )
    prompt = await prompt_of(query.messages, model, query.chat_template_kwargs)
    model.check_room(prompt, 1, "messages")
    new = query.max_completion_tokens or query.max_tokens
    for name in ("max_tokens", "max_completion_tokens"):
        if getattr(query, name) is not None:
            within(name, getattr(query, name), 1, 2**31 - 1)
    most = new or model.decoder.context - len(prompt)
    settings = settings_of(query, model, most, query.n)
    assert model.chat is not None
    settings = dataclasses.replace(settings, eos_token_id=model.chat.ends())
    seed = seed_of(query.seed)
    grammar = await grammar_of(query, model)
    alternatives = query.top_logprobs
    writer: Writer
    if query.use_beam_search:
        writer = Beams(model, [prompt], settings, seed, call, alternatives, grammar)
    else:
        rows = generations(model, [prompt], settings, query.n, seed, call, alternatives, grammar)
        writer = Rows(model, rows)
    one = _Answer(query, model, writer, len(prompt), seed)
    if query.stream:
        following = writer.follow(watch, MOST_BEHIND)
        return EventStream(one.stream(following), following.cancel)
    return await unless_gone(request, one.whole(watch))


async def prompt_of(
    messages: Sequence[Message], model: Model, variables: dict[str, Any]
) -> tuple[int, ...]:
    """Return the tokens of a conversation up to where the answer begins.

    Raises Refused without a template (404), and where the template refuses the turns or runs too
    long (400).
    """
    chat = model.chat
    if chat is None:
        raise not_found(
            f"the model {model.name} has no chat template; use /v1/completions, or start the "
            "server with --chat_template=FILE",
            "no_chat_template",
        )
    if len(messages) > MOST_MESSAGES:
        raise Refused(
            f"the conversation has {len(messages)} messages, and {MOST_MESSAGES} are the most; "
            "leave early ones out",
            "messages",
        )
    if taken := _OWN & variables.keys():
        raise Refused(
            f"chat_template_kwargs has {min(taken)!r}, which the server sets; leave it out",
            "chat_template_kwargs",
        )
    turns = [_turn(number, each) for number, each in enumerate(messages, 1)]
    try:
        # In a thread, so that a template that loops holds up nobody else.
        tokens = await within_seconds(lambda: chat.prompt(turns, **variables), TEMPLATE_SECONDS)
    except TimeoutError:
        raise Refused(
            f"the chat template took more than {TEMPLATE_SECONDS:g} s; send a shorter "
            "conversation, or start the server with another --chat_template",
            "messages",
        ) from None
    except (ValueError, TypeError) as error:
        raise Refused(str(error), "messages") from None
    return tuple(tokens)


def _turn(number: int, message: Message) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        other = next((part.type for part in content if part.type != "text"), None)
        if other is not None:
            raise Refused(
                f"message {number} has a part of type {other[:40]!r}, and this model reads text; "
                "send parts of type text",
                "messages",
            )
        content = "".join(part.text or "" for part in content)
    turn = {"role": message.role, "content": content}
    return turn if message.name is None else turn | {"name": message.name}


class _Answer:
    """A request that passed its checks, and how it is answered."""

    def __init__(self, query: Chat, model: Model, writer: Writer, prompt: int, seed: int):
        self.query = query
        self.model = model
        self.writer = writer
        self.count = Count(prompt)
        self.head = {
            "id": "chatcmpl-" + secrets.token_hex(12),
            "created": now(),
            "model": model.name,
            "seed": seed,
        }

    async def whole(self, watch: Watch) -> Response:
        choices = await gather(self.writer.follow(watch), self.writer.number, self.count)
        told = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "finish_reason": choice.reason,
                "logprobs": self.logprobs(choice.tokens),
            }
            for index, choice in enumerate(choices)
            if choice.reason
        ]
        return answer(
            {
                **self.head,
                "object": "chat.completion",
                "choices": told,
                "usage": self.count.usage(),
            }
        )

    async def stream(self, following: Followed) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the chunks of a streamed answer."""
        usage = self.query.stream_options is not None and self.query.stream_options.include_usage
        head = {**self.head, "object": "chat.completion.chunk"}
        more = {"usage": None} if usage else {}

        def chunk(index: int, delta: dict, reason: str | None = None, logprobs: Any = None) -> dict:
            choice = {
                "index": index,
                "delta": delta,
                "finish_reason": reason,
                "logprobs": logprobs,
            }
            return {**head, "choices": [choice], **more}

        try:
            for index in range(self.query.n):
                yield chunk(index, {"role": "assistant", "content": ""})
            async for each in stream_rows(following, self.count, PING_SECONDS):
                if each is None:
                    yield None
                    continue
                index, event = each
                if isinstance(event, Token):
                    if event.text or self.query.logprobs:
                        yield chunk(index, {"content": event.text}, None, self.logprobs([event]))
                elif isinstance(event, Finished):
                    if event.text:
                        yield chunk(index, {"content": event.text})
                    yield chunk(index, {}, reason_of(event))
        finally:
            following.cancel()
        if usage:
            yield {**head, "choices": [], "usage": self.count.usage()}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.query.logprobs:
            return None
        return {
            "content": [
                {
                    **self._told(each.token, each.logprob),
                    "top_logprobs": [self._told(*pair) for pair in each.top],
                }
                for each in tokens
            ],
            "refusal": None,
        }

    def _told(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.model.token_bytes(token)
        return {"token": self.model.piece(token), "logprob": logprob, "bytes": list(data)}
