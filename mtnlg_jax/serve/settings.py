"""From the fields of a request to the settings of a row, checked before anything is queued."""

import asyncio
import dataclasses
import json
import math
import secrets
from typing import Any

from mtnlg_jax.config import DecodeConfig, validate_decode
from mtnlg_jax.config.decode_rules import acting
from mtnlg_jax.decode.batched_settings import check_tokens
from mtnlg_jax.decode.grammar import Grammar
from mtnlg_jax.serve.models import Model
from mtnlg_jax.serve.refusals import Refused
from mtnlg_jax.serve.schema import Sampling

MOST_STOPS = 4
MOST_STOP_CHARACTERS = 256
MOST_BIASES = 300
MOST_TOKENS = 64  # of lists of ids
MOST_SAMPLES = 16  # n, best_of


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise Refused unless ``value`` is in [low, high]."""
    if not low <= value <= high:
        # An int of many digits is no float.
        shown = f"{value:g}" if isinstance(value, float) else str(value)[:40]
        raise Refused(
            f"{name}={shown} is outside {low:g} to {high:g}; give a value in between", name
        )


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """Return the stop strings. Raise Refused on too many, empty or long ones."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MOST_STOPS:
        raise Refused(
            f"stop has {len(stops)} texts, and {MOST_STOPS} are the most; leave some out", "stop"
        )
    for text in stops:
        if not 0 < len(text) <= MOST_STOP_CHARACTERS:
            raise Refused(
                f"stop has a text of {len(text)} characters; give texts of 1 to "
                f"{MOST_STOP_CHARACTERS}, or leave it out",
                "stop",
            )
    return stops


def seed_of(seed: int | None) -> int:
    """Return the seed of a request; a random one, which the answer names, where none is given."""
    if seed is None:
        return secrets.randbits(31)
    if not -(2**63) <= seed < 2**64:
        raise Refused(f"seed={str(seed)[:40]} does not fit 64 bits; give a smaller one", "seed")
    return seed % 2**32


def settings_of(query: Sampling, model: Model, new: int, samples: int = 1) -> DecodeConfig:
    """Return the settings of one row that writes at most ``new`` tokens, or of its beams.

    ``samples``: how many beams are searched; n of them are told.

    Raises Refused on a value that is out of range. At temperature 0 the limits of sampling change
    nothing, and are left out.
    """
    within("n", query.n, 1, MOST_SAMPLES)
    temperature = query.temperature
    if temperature is None:
        temperature = 0.0 if query.use_beam_search else 1.0
    within("temperature", temperature, 0, 100)
    beams = _beams(query, samples)
    within("top_p", query.top_p, 0, 1)
    within("presence_penalty", query.presence_penalty, -2, 2)
    within("frequency_penalty", query.frequency_penalty, -2, 2)
    within("min_tokens", query.min_tokens, 0, max(new, query.min_tokens if query.ignore_eos else 0))
    within("top_k", query.top_k, -1, 2**31 - 1)
    for name in ("stop_token_ids", "suppress_tokens", "bad_words_ids"):
        given = getattr(query, name)
        if len(given) > MOST_TOKENS:
            raise Refused(
                f"{name} has {len(given)} entries, and {MOST_TOKENS} are the most; leave some out",
                name,
            )
    config = DecodeConfig(
        max_new_tokens=new,
        # guidellm and the benchmark of vLLM ask for texts of a known length.
        min_new_tokens=new if query.ignore_eos else query.min_tokens,
        temperature=temperature,
        # 0 keeps the best token alone; DecodeConfig wants a share above 0.
        top_p=query.top_p or 1e-6,
        top_k=max(query.top_k, 0),
        min_p=query.min_p,
        typical_p=query.typical_p,
        epsilon_cutoff=query.epsilon_cutoff,
        eta_cutoff=query.eta_cutoff,
        mirostat_tau=query.mirostat_tau,
        mirostat_eta=query.mirostat_eta,
        repetition_penalty=query.repetition_penalty,
        no_repeat_ngram_size=query.no_repeat_ngram_size,
        dry_multiplier=query.dry_multiplier,
        dry_base=query.dry_base,
        dry_allowed_length=query.dry_allowed_length,
        dry_penalty_last_n=query.dry_penalty_last_n,
        presence_penalty=query.presence_penalty,
        frequency_penalty=query.frequency_penalty,
        logit_bias=_biases(query.logit_bias),
        bad_words_ids=tuple(map(tuple, query.bad_words_ids)),
        suppress_tokens=tuple(query.suppress_tokens),
        stop_strings=stops_of(query.stop),
        stop_token_ids=tuple(query.stop_token_ids),
        max_time=query.max_time,
        **beams,
    )
    config = acting(config)
    try:
        validate_decode(config)
        check_tokens(config, model.tokenizer.vocab_size)
    except ValueError as error:
        raise Refused(str(error), _named(str(error), query)) from None
    return config


def _beams(query: Sampling, samples: int) -> dict[str, Any]:
    """Return the settings of beam search. Raise Refused on what it cannot do."""
    if not query.use_beam_search:
        for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(query, name) != neutral:
                raise Refused(
                    f"{name} affects beams only; set use_beam_search=true, or leave it out", name
                )
        return {}
    if samples < 2:
        raise Refused(
            "use_beam_search needs 2 beams or more, and n is 1; raise n (or best_of of "
            "/v1/completions), or set temperature=0 without beams for greedy text",
            "n",
        )
    if query.stop:
        raise Refused(
            "stop cannot be looked for while beams are compared; give stop_token_ids, or leave it "
            "out",
            "stop",
        )
    return {
        "num_beams": samples,
        "num_return_sequences": query.n,
        "length_penalty": query.length_penalty,
        "early_stopping": query.early_stopping,
    }


def with_room(config: DecodeConfig, room: int) -> DecodeConfig:
    """Return ``config`` for a prompt that leaves ``room`` tokens of the context."""
    new = min(config.max_new_tokens, room)
    return dataclasses.replace(
        config, max_new_tokens=new, min_new_tokens=min(config.min_new_tokens, new)
    )


async def grammar_of(query: Sampling, model: Model) -> Grammar | None:
    """Return the compiled grammar that a request asks for; None for free text.

    Raises Refused (400) with the compiler's words. Compiling leaves the event loop free.
    """
    found = _form(query)
    if found is None:
        return None
    field, kind, source = found

    def compile_it() -> Grammar:
        return model.grammars.compile(kind, source)

    try:
        return await asyncio.to_thread(compile_it)
    except ValueError as error:
        raise Refused(str(error), field) from None


def _form(query: Sampling) -> tuple[str, str, Any] | None:
    """Return (field, kind of grammar, source) of the form that a request asks for."""
    form = query.response_format
    wanted = query.structured_outputs
    if form is not None and form.type != "text" and wanted is not None:
        raise Refused(
            "response_format and structured_outputs both say what is written; leave one out",
            "structured_outputs",
        )
    if form is not None and form.type != "text":
        field = "response_format"
        if form.type == "json_object":
            return field, "json_schema", {"type": "object"}
        source: Any = (
            (form.json_schema.schema if form.json_schema else None)
            if form.type == "json_schema"
            else getattr(form, form.type)
        )
        if source is None:
            inside = "json_schema.schema" if form.type == "json_schema" else form.type
            raise Refused(
                f"response_format has type={form.type} and no {inside}; add it, or set type=text",
                field,
            )
        return field, form.type, source
    if wanted is None:
        return None
    given = [name for name in wanted.__struct_fields__ if getattr(wanted, name) is not None]
    if len(given) != 1:
        raise Refused(
            f"structured_outputs names {len(given)} forms; give one of "
            f"{', '.join(wanted.__struct_fields__)}",
            "structured_outputs",
        )
    (name,) = given
    value = getattr(wanted, name)
    if name == "choice":
        if not value or "" in value:
            raise Refused(
                "structured_outputs.choice needs texts to choose from, none of them empty",
                "structured_outputs",
            )
        return "structured_outputs", "grammar", _choices(value)
    return "structured_outputs", {"json": "json_schema"}.get(name, name), value


def _choices(texts: list[str]) -> str:
    """Return a grammar in Lark's notation of one of ``texts``."""
    return "start: " + " | ".join(json.dumps(text) for text in dict.fromkeys(texts))


def _biases(given: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    given = given or {}
    if len(given) > MOST_BIASES:
        raise Refused(
            f"logit_bias has {len(given)} tokens, and {MOST_BIASES} are the most; leave some out",
            "logit_bias",
        )
    biases = []
    for name, bias in given.items():
        if not name.isascii() or not name.isdigit() or len(name) > 9:
            raise Refused(
                f"logit_bias has the key {name[:40]!r}; give token ids, which /tokenize tells",
                "logit_bias",
            )
        if not math.isfinite(bias) or not -100 <= bias <= 100:
            raise Refused(
                f"logit_bias adds {bias:g} to token {name}; give a value from -100 to 100",
                "logit_bias",
            )
        biases.append((int(name), bias))
    return tuple(biases)


def _named(message: str, query: Sampling) -> str | None:
    """Return the field of a request that a message of DecodeConfig's rules begins with."""
    word = message.split("=")[0].split()[0].strip(":,")
    return word if word in query.__struct_fields__ else None
