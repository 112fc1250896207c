"""Read the settings of DecodeConfig from the command line."""

from typing import Any

from mtnlg_jax.cli.generation.entries import unescape
from mtnlg_jax.cli.generation.settings_flags import EARLY, LISTS, SETTINGS, WORDS


def given_settings() -> dict[str, Any]:
    """Return the settings of DecodeConfig that the command line gives."""
    given = {name: flag.value for name, flag in SETTINGS.items() if flag.value is not None}
    if "early_stopping" in given:
        given["early_stopping"] = EARLY[given["early_stopping"]]
    if "stop_strings" in given:
        given["stop_strings"] = tuple(map(unescape, given["stop_strings"]))
    for name, (read, form, several, flag) in LISTS.items():
        texts = flag.value if several else [flag.value]
        if flag.value is None:
            continue
        try:
            entries = [read(text) for text in texts]
        except ValueError:
            raise ValueError(
                f"--{name}={' '.join(texts)} is not of the form {form}, as in --{name}="
                f"{form.replace('BIAS', '-2.5').replace('PLACE', '0').replace('ID', '7')}"
            ) from None
        if name == "logit_bias":
            if any(len(tokens) > 1 for tokens, _ in entries):
                raise ValueError(
                    "--logit_bias is for one token; give several in a row to --sequence_bias"
                )
            entries = [(tokens[0], bias) for tokens, bias in entries]
        given[name] = tuple(entries) if several else entries[0]
    return given


def with_words(tokenizer, given: dict) -> dict:
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
                    "which "
                    "occur in other texts as well; --bad_words forbids them in a row"
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
