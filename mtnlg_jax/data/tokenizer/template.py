"""Chat templates: render a conversation as the text that its model was trained on.

A template is a Jinja program of the tokenizer's folder. It comes with the weights, from anyone, so
it runs in a sandbox. The environment is that of transformers, and so is the text.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from mtnlg_jax.data.tokenizer.base import HIDE, Tokenizer
from mtnlg_jax.data.tokenizer.files import token_name

if TYPE_CHECKING:
    import jinja2

# Noncharacters like HIDE, around what a template marks as the model's own.
_START = "\ufdd1"
_END = "\ufdd2"
_RESERVED = re.compile(f"[{HIDE}{_START}{_END}]")

_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Roles that a turn of the same role must not follow.
_ALTERNATING = ("user", "assistant")


class Rendering(NamedTuple):
    """A conversation as text.

    ``spans``: the characters that the template marks by its ``generation`` tag, as (start, stop);
    None if it has no such tag.
    """

    text: str
    spans: list[tuple[int, int]] | None


class ChatTemplate:
    """A chat template with the special tokens that it may name."""

    def __init__(self, source: str, variables: Mapping[str, str]):
        """Raise ValueError if ``source`` is not a template. ``variables``: bos_token and others."""
        import jinja2

        self.source = source
        self._variables = dict(variables)
        self._marks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template is not valid Jinja at line {error.lineno}: {error.message}; "
                "correct it, or copy it again"
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Rendering:
        """Return the text of a conversation.

        ``messages``: {"role": ..., "content": ...} each. ``add_generation_prompt``: append what
        comes before an answer. ``variables``: further names of the template, such as tools or
        enable_thinking.

        Raises ValueError with the template's own message if it refuses the conversation.
        """
        import jinja2

        given: dict[str, Any] = {"tools": None, "documents": None} | variables
        try:
            text = self._template.render(
                self._variables | given,
                messages=_plain(messages),
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                "the chat template cannot render the conversation "
                f"({type(error).__name__}: {error}); compare its messages with those that the "
                "template reads"
            ) from None
        return _unmark(text) if self._marks else Rendering(text, None)


def read_template(tokenizer: Tokenizer, source: str | None = None) -> ChatTemplate:
    """Return the chat template of a tokenizer, or that of ``source`` with its special tokens.

    It is chat_template.jinja of the tokenizer's folder, else chat_template of
    tokenizer_config.json; of several named ones, the one called default.

    Raises ValueError if there is none.
    """
    config = _settings(tokenizer)
    if source is None:
        content = tokenizer.companions.get("chat_template.jinja")
        found = config.get("chat_template") if content is None else decode_template(content)
        source = _default(found) if isinstance(found, list) else found
    if not isinstance(source, str):
        raise ValueError(
            "this tokenizer has no chat template: neither chat_template.jinja nor chat_template in "
            "tokenizer_config.json; give one with --chat_template=FILE, or use a model that was "
            "trained to chat"
        )
    names = {f"{role}_token": token_name(config.get(f"{role}_token")) for role in _NAMED}
    if not config:
        names = {
            f"{role}_token": tokenizer.special_names.get(getattr(tokenizer, f"{role}_id"))
            for role in ("bos", "eos", "pad", "sep")
        }
    return ChatTemplate(source, {name: token for name, token in names.items() if token})


def decode_template(content: bytes, name: str = "chat_template.jinja") -> str:
    """Return the text of a chat template. Raises ValueError if it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 at byte {error.start}; convert it, for example with iconv"
        ) from None


def check_messages(messages: Any, *, answered: bool) -> None:
    """Raise ValueError unless ``messages`` are a conversation in which user and assistant take
    turns.

    ``answered``: whether the last turn is an answer, or one that is to be answered.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"messages hold a {type(messages).__name__}, not a list of turns")
    if not messages:
        raise ValueError('the conversation is empty; give turns {"role": ..., "content": ...}')
    before = None
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str):
            raise ValueError(f'turn {number} has no "role"; write {{"role": ..., "content": ...}}')
        if message.get("content") is None and not message.get("tool_calls"):
            raise ValueError(f'turn {number}, of the {role}, has no "content"')
        if role == "system" and number > 1:
            raise ValueError(f"turn {number} is of the system, which speaks first or not at all")
        if role == "assistant" and before in (None, "system"):
            raise ValueError(f"turn {number} is of the assistant, but nobody has asked before it")
        if role == before and role in _ALTERNATING:
            raise ValueError(
                f"turns {number - 1} and {number} are both of the {role}; join them, or put the "
                "turn between them back"
            )
        before = role
    if answered and before != "assistant":
        raise ValueError(f"the last turn is of the {before}; end with an answer of the assistant")
    if not answered and before in ("assistant", "system"):
        raise ValueError(f"the last turn is of the {before}; end with one of the user")


def hide_specials(value: Any, tokenizer: Tokenizer) -> Any:
    """Return messages in which no text spells a special token: `HIDE` is inside each spelling."""
    names = [name for name in tokenizer.special_names.values() if len(name) > 1]
    spelled = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"\Z.")
    return _map_texts(value, lambda text: spelled.sub(_hidden, _RESERVED.sub("\ufffd", text)))


def _hidden(match: re.Match) -> str:
    return match[0][0] + HIDE + match[0][1:]


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(each, change) for each in value]
    return value


def _settings(tokenizer: Tokenizer) -> dict:
    """Return tokenizer_config.json over special_tokens_map.json."""
    names = ("special_tokens_map.json", "tokenizer_config.json")
    found = [json.loads(tokenizer.companions.get(name, b"{}")) for name in names]
    return found[0] | found[1]


def _default(named: list) -> str | None:
    """Return the template called default of a list of {"name": ..., "template": ...}."""
    try:
        found = {each["name"]: each["template"] for each in named}
    except (TypeError, LookupError):
        raise ValueError(
            "chat_template of tokenizer_config.json must be a string or a list of objects with a "
            "name and a template; copy the file again"
        ) from None
    if found and "default" not in found:
        raise ValueError(
            f"none of the chat templates {', '.join(found)} is called default; give the text of "
            "one with --chat_template=FILE"
        )
    return found.get("default")


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Return messages without the keys whose value is None, as transformers does."""
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]


def _unmark(text: str) -> Rendering:
    """Take the marks of the generation tag out of a text."""
    parts = []
    spans = []
    size = 0
    begins = None
    for part in re.split(f"([{_START}{_END}])", text):
        if part == _START:
            begins = size
        elif part == _END:
            spans.append((size if begins is None else begins, size))
            begins = None
        else:
            parts.append(part)
            size += len(part)
    return Rendering("".join(parts), [(start, stop) for start, stop in spans if start < stop])


@functools.cache
def _environment() -> "jinja2.sandbox.ImmutableSandboxedEnvironment":
    """Return the environment of transformers, with its functions and its ``generation`` tag."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """``{% generation %}`` ... ``{% endgeneration %}`` around what the model writes."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return _START + caller() + _END

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    # Jinja's own filter writes < > & ' as escapes of HTML.
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
