"""The bodies of requests, as types. A body is read once, and every field is checked."""

import re
from typing import Any, Literal

import msgspec

from mtnlg_jax.serve.refusals import Refused

# Fields of OpenAI's clients that change nothing in an answer.
HARMLESS = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "verbosity", "parallel_tool_calls"),
    )
)
# Values by which a client says that it does not use a field.
_UNUSED: tuple[Any, ...] = (None, False, 0, "", [], {}, "auto", "none")


class Choice(msgspec.Struct, kw_only=True):
    """vLLM's structured_outputs: one of the four."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None


class JsonSchema(msgspec.Struct, kw_only=True):
    name: str = ""
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    grammar: str | None = None


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class Sampling(msgspec.Struct, kw_only=True):
    """The settings that completions and chat share; names of OpenAI, vLLM and DecodeConfig."""

    model: str | None = None
    temperature: float | None = None  # 1, and 0 for beams
    top_p: float = 1.0
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    mirostat_tau: float = 0.0
    mirostat_eta: float = 0.1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    min_tokens: int = 0
    stop_token_ids: list[int] = msgspec.field(default_factory=list)
    bad_words_ids: list[list[int]] = msgspec.field(default_factory=list)
    suppress_tokens: list[int] = msgspec.field(default_factory=list)
    ignore_eos: bool = False
    max_time: float | None = None
    # vLLM's: n beams, or best_of of them.
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    response_format: ResponseFormat | None = None
    structured_outputs: Choice | None = None


class Completion(Sampling, kw_only=True):
    prompt: str | list[str | int | list[int]] = ""
    max_tokens: int = 16
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True


class Part(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class Message(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None


class Chat(Sampling, kw_only=True):
    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


class Rank(msgspec.Struct, kw_only=True):
    prompt: str
    model: str | None = None
    candidates: list[str] | None = None
    n: int | None = None
    scorers: str | list[str] | dict[str, float] = "logprob"
    normalise: Literal["sum", "per_token", "per_char", "per_byte"] = "per_token"
    # Settings of single scorers, by the names of ScorerOptions.
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    # Settings of the candidates to write.
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: str | list[str] | None = None
    seed: int | None = None


class Document(msgspec.Struct, kw_only=True):
    text: str


class Rerank(msgspec.Struct, kw_only=True):
    query: str
    documents: list[str | Document]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool = False
    max_tokens_per_doc: int | None = None
    truncation: bool | None = None


class Fill(msgspec.Struct, kw_only=True):
    text: str
    model: str | None = None
    top_k: int = 5


class Tokenize(msgspec.Struct, kw_only=True):
    prompt: str | None = None
    messages: list[Message] | None = None
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Detokenize(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


def parse[Body: msgspec.Struct](body: bytes, kind: type[Body]) -> Body:
    """Return a body as ``kind``. Raise Refused with the place and the way out."""
    try:
        given = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise Refused(f"the body is not JSON ({error}); send one JSON object") from None
    if not isinstance(given, dict):
        raise Refused(
            f'the body is a JSON {type(given).__name__}, not an object; send {{"name": value, ...}}'
        )
    known = kind.__struct_fields__
    for name, value in given.items():
        if name not in known and name not in HARMLESS and not _unused(value):
            raise Refused(
                f"the field {name[:60]!r} is not known here; leave it out. Known are "
                f"{', '.join(known)}",
                name[:60],
            )
    # null means the default, as in OpenAI's API.
    kept = {name: value for name, value in given.items() if name in known and value is not None}
    try:
        return msgspec.convert(kept, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        message = str(error)
        place = re.search(r"`\$\.?([^`]*)`", message)
        field = re.match(r"\w+", place[1]) if place else None
        missing = re.search(r"missing required field `(\w+)`", message)
        name = field[0] if field else missing[1] if missing else None
        raise Refused(f"{message}; correct that value", name) from None


def _unused(value: Any) -> bool:
    return any(value == each and type(value) is type(each) for each in _UNUSED)
