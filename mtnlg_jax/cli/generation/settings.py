"""Read the settings of DecodeConfig from the command line."""

import dataclasses
from typing import TYPE_CHECKING, Any

from mtnlg_jax.cli.decoding import shared_flags
from mtnlg_jax.cli.decoding.preset_flag import PRESET, apply_preset, must_act
from mtnlg_jax.cli.decoding.settings import merge, read_assignments
from mtnlg_jax.cli.generation import options
from mtnlg_jax.cli.generation.entries import unescape
from mtnlg_jax.cli.generation.settings_flags import EARLY, FLAG_OF, LISTS, SETTINGS, WORDS

if TYPE_CHECKING:
    from mtnlg_jax.config import DecodeConfig


def given_settings() -> dict[str, Any]:
    """Return the settings of DecodeConfig that flags and --set give."""
    return merge(_given_by_flags(), read_assignments(shared_flags.SET.value), FLAG_OF)


def _given_by_flags() -> dict[str, Any]:
    given = {name: flag.value for name, flag in SETTINGS.items() if flag.value is not None}
    if "early_stopping" in given:
        given["early_stopping"] = EARLY[given["early_stopping"]]
    for name in ("stop_strings", "dry_sequence_breakers"):
        if name in given:
            given[name] = tuple(map(unescape, given[name]))
    for name, (read, form, several, flag) in LISTS.items():
        if flag.value is None:
            continue
        texts: list[str] = flag.value if several else [flag.value]
        try:
            entries = [read(text) for text in texts]
        except ValueError:
            example = form.replace("BIAS", "-2.5").replace("POSITION", "0").replace("ID", "7")
            raise ValueError(
                f"--{name}={' '.join(texts)} is not of the form {form}, as in --{name}={example}"
            ) from None
        if name == "logit_bias":
            if any(len(tokens) > 1 for tokens, _ in entries):
                raise ValueError(
                    "--logit_bias is for one token; give several in a row to --sequence_bias"
                )
            entries = [(tokens[0], bias) for tokens, bias in entries]
        given[name] = tuple(entries) if several else entries[0]
    return given


def as_given(key: str) -> str:
    """Return the flag that gives a setting, for messages: "--n" or "--set=decode.top_k"."""
    flag = FLAG_OF.get(key, key)
    if not options.is_given(flag) and key in read_assignments(shared_flags.SET.value):
        return f"--set=decode.{key}"
    return f"--{flag}"


def with_words(tokenizer, given: dict[str, Any]) -> dict[str, Any]:
    """Return ``given`` extended by the flags of WORDS, in the tokens of ``tokenizer``."""
    texts = {name: list(map(unescape, flag.value or [])) for name, flag in WORDS.items()}
    added: dict[str, list] = {
        "bad_words_ids": [],
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "stop_sequences": [],
        "sequence_bias": [],
    }
    for name, setting in (("bad_words", "bad_words_ids"), ("stop_words", "stop_sequences")):
        for text in texts[name]:
            added[setting] += _forms(tokenizer, name, text)
    for name, setting in (
        ("suppress_words", "suppress_tokens"),
        ("begin_suppress_words", "begin_suppress_tokens"),
    ):
        for text in texts[name]:
            forms = _forms(tokenizer, name, text)
            single = [form[0] for form in forms if len(form) == 1]
            if not single:
                raise ValueError(
                    f"--{name}={text} is {len(forms[0])} tokens, {','.join(map(str, forms[0]))}, "
                    "which occur in other texts as well; --bad_words forbids them in a row"
                )
            added[setting] += single
    for entry in texts["word_bias"]:
        text, _, bias = entry.rpartition(":")
        try:
            added["sequence_bias"] += [
                (form, float(bias)) for form in _forms(tokenizer, "word_bias", text)
            ]
        except ValueError:
            raise ValueError(
                f"--word_bias={entry} is not of the form TEXT:BIAS, as in --word_bias=sea:-2.5"
            ) from None
    return given | {
        name: (*given.get(name, ()), *values) for name, values in added.items() if values
    }


def _forms(tokenizer, name: str, text: str) -> list[tuple[int, ...]]:
    """Return the tokens of a text at the beginning, and those after a space."""
    if not text:
        raise ValueError(f"--{name} is empty; leave it out")
    forms = [tokenizer.encode(text)] + ([] if text[0].isspace() else [tokenizer.encode(f" {text}")])
    return list(dict.fromkeys(tuple(form) for form in forms if form))


def decode_settings(
    rows: list[dict], run_decode: "DecodeConfig", given: dict[str, Any]
) -> "DecodeConfig":
    """Return the settings of the run, or of --preset, with those of the command line.

    Raise ValueError on settings of the command line that cannot act.
    """
    from mtnlg_jax.config import DecodeConfig, acting, validate_decode

    all_have_candidates = all("candidates" in row for row in rows)
    if options.MODE.value == "ranking" and all_have_candidates and (given or PRESET.value):
        name = as_given(next(iter(given))) if given else f"--{PRESET.name}"
        raise ValueError(
            f"{name} affects generated candidates, and each line of {options.PROMPTS.value} has "
            "its own; leave one of the two out"
        )
    decode = dataclasses.replace(apply_preset(run_decode), **given)
    given_candidates = bool(options.CANDIDATES.value) or all_have_candidates
    # Ranking needs different samples, which greedy decoding does not give.
    sampling = options.MODE.value == "ranking" and not given_candidates
    greedy = decode.temperature == 0 and decode.num_beams == 1 and decode.penalty_alpha == 0
    if sampling and greedy and "temperature" not in given:
        decode = dataclasses.replace(decode, temperature=1.0)
    # Settings of the run that have no effect are reset; those of the command line are refused.
    decode = acting(decode, must_act(given))
    if options.DRAFT.value is None:
        decode = dataclasses.replace(decode, num_assistant_tokens=DecodeConfig.num_assistant_tokens)
    validate_decode(decode)
    if "seed" in given and decode.temperature == 0:
        raise ValueError(
            f"seed={decode.seed} affects sampling only, and temperature=0 does not sample; set "
            "temperature above 0, or leave seed out"
        )
    return decode
