"""What the server serves: each model with its engine, tokenizer, chat template and grammars."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mtnlg_jax.config import StageConfig
from mtnlg_jax.data.tokenizer.chat import Chat
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.grammar import Grammar, Grammars, SwitchedGrammar
from mtnlg_jax.decode.results import encode_prompt
from mtnlg_jax.serve.refusals import Refused, not_found
from mtnlg_jax.serve.requests import Event, Work


class Ticket(Protocol):
    """A submitted work."""

    def cancel(self) -> None:
        """End it at the next turn."""


class Engine(Protocol):
    """What the API needs of `serve.engine.Engine`."""

    @property
    def ready(self) -> bool: ...

    @property
    def failure(self) -> BaseException | None: ...

    def start(self) -> None: ...

    def drain(self) -> object: ...

    def close(self) -> None: ...

    def check_room(self) -> None: ...

    def submit(self, work: Work, on_events: Callable[[list[Event]], None]) -> Ticket: ...

    def statistics(self) -> dict[str, Any]: ...


@dataclasses.dataclass
class Model:
    """A model under the name that requests call it by."""

    name: str
    engine: Engine
    decoder: Decoder
    tokenizer: Any
    chat: Chat | None = None
    chat_template: str | None = None  # for /tokenizer_info
    stages: Sequence[StageConfig] | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    base: str | None = None  # the name of the model that this one adapts

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Raises ValueError where llguidance is not installed."""
        more = self.chat.ends() if self.chat else ()
        return Grammars(self.tokenizer, self.decoder.config.vocabulary, more)

    @functools.cached_property
    def _switched(self) -> SwitchedGrammar:
        return SwitchedGrammar()

    def grammar_of_jobs(self, grammar: Grammar) -> Callable:
        """Return the ``constraint`` of a job of this model; jobs run one at a time."""
        return self._switched.of(grammar)

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        return {name: index for index, name in self.tokenizer.special_names.items()}

    def token_bytes(self, token: int) -> bytes:
        """Return the text of a token as UTF-8, empty for a row of the head that no token has.

        Such a row is never written, but it may be among the best alternatives.
        """
        return self.tokenizer.token_bytes(token) if token < self.tokenizer.vocab_size else b""

    def piece(self, token: int) -> str:
        """Return a token as text for log-probabilities: different tokens, different texts.

        A token that is not UTF-8 by itself is "bytes:\\xe4", as in OpenAI's API. A row of the head
        that no token has is "unused:" and its number.
        """
        name = self.tokenizer.special_names.get(token)
        if name is not None:
            return name
        if token >= self.tokenizer.vocab_size:
            return f"unused:{token}"
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def encode(self, text: str, special: bool = True) -> tuple[int, ...]:
        """Return the tokens of a prompt. ``special``: with the <bos> that training put there."""
        if special:
            return tuple(encode_prompt(self.tokenizer, text))
        return tuple(self.tokenizer.encode(text)) or (self.tokenizer.bos_id,)

    def check_ids(self, tokens: Sequence[int], param: str) -> tuple[int, ...]:
        """Return ``tokens``. Raise Refused if one is not of the vocabulary."""
        limit = self.tokenizer.vocab_size
        for token in tokens:
            if not 0 <= token < limit:
                raise Refused(
                    f"{param} has token {token}, which is outside the vocabulary, 0 to "
                    f"{limit - 1}; look it up with /tokenize",
                    param,
                )
        return tuple(tokens)

    def check_room(self, tokens: Sequence[int], room: int, param: str) -> None:
        """Raise Refused if ``tokens`` and ``room`` further ones exceed the context."""
        if len(tokens) + room > self.decoder.context:
            behind = f" with room for {room} more" if room else ""
            raise Refused(
                f"{param} has {len(tokens)} tokens, and the model's context holds "
                f"{self.decoder.context}{behind}; shorten it",
                param,
                code="context_length_exceeded",
            )


class Models:
    """The models by name; the first one answers requests that name none."""

    def __init__(self, models: Sequence[Model]):
        self.all = tuple(models)
        self._by_name = {model.name: model for model in models}

    def get(self, name: str | None) -> Model:
        """Return a model. Raise Refused (404) if there is none of this name."""
        if not name:
            return self.all[0]
        if name not in self._by_name:
            raise not_found(
                f"there is no model {name[:100]!r} here; ask for {' or '.join(self._by_name)}, or "
                "leave model out",
                "model_not_found",
                "model",
            )
        return self._by_name[name]

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Each engine once."""
        return tuple({id(model.engine): model.engine for model in self.all}.values())

    @property
    def ready(self) -> bool:
        return all(engine.ready for engine in self.engines)

    @property
    def failure(self) -> BaseException | None:
        """What ended an engine, or None."""
        return next((each.failure for each in self.engines if each.failure is not None), None)
