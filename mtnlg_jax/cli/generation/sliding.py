"""Texts longer than the context: the flags of a sliding window, and what --stats says of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.decoding import devices
from mtnlg_jax.cli.generation import options

if TYPE_CHECKING:
    from mtnlg_jax.config import DecodeConfig, ModelConfig
    from mtnlg_jax.decode.results import Generated
    from mtnlg_jax.decode.sliding import Sliding
    from mtnlg_jax.decode.words import Pace

# Tokens for each word that is asked for, where --max_new_tokens does not say how many.
TOKENS_PER_WORD = 16
# The words between whose costs --stats tells the ratio, each the mean of the words around it.
EARLY = 500
LATE = 5000
AROUND = 250
# From here on the last words are others than those around EARLY.
LEAST_WORDS = EARLY + 3 * AROUND

with command.flag_group("Texts longer than the context"):
    WORDS = flags.DEFINE_integer(
        "words",
        None,
        "write beyond the context, up to the first sentence that ends after this number of words "
        f"(Chinese: characters); --max_new_tokens is then {TOKENS_PER_WORD} times as many",
        lower_bound=1,
    )
    SLIDE = flags.DEFINE_enum(
        "slide",
        None,
        ["auto", "shift", "recompute"],
        "what to do when the context is full, once the oldest tokens are dropped: move the cached "
        "keys of the others, or read the others again; auto: shift, where positions allow it",
    )
    SINKS = flags.DEFINE_integer(
        "sinks", None, "first tokens that are never dropped; default: 4", lower_bound=0
    )
    KEEP = flags.DEFINE_integer(
        "keep", None, "last tokens to keep when the context is full; default: half of it"
    )
    WINDOW = flags.DEFINE_integer(
        "window", None, "tokens that the model sees at once; default: its context"
    )
# Each of them makes the window slide.
FLAGS = ("words", "slide", "sinks", "keep", "window")


def asked() -> bool:
    """Return whether a flag asks for a text beyond the context."""
    return any(map(options.is_given, FLAGS))


def check_flags() -> None:
    """Raise ValueError on flags with which a window cannot slide."""
    name = next(filter(options.is_given, FLAGS), None)
    if name is None:
        return
    for other, why in (
        ("chat", "a conversation ends with the context"),
        ("prompts", "it slides over the text of one prompt"),
        ("draft", "guesses are verified at positions that must not move"),
        ("image", "it slides over tokens"),
        ("prefix", "it slides over tokens"),
    ):
        if options.is_given(other):
            raise ValueError(
                f"--{name} is for a sliding window, and --{other} is given: {why}; leave one of "
                "the two out"
            )


def lengthened(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings ``given`` with as many tokens as --words may need."""
    if WORDS.value is None:
        return given
    return {"max_new_tokens": TOKENS_PER_WORD * WORDS.value} | given


def sliding() -> "Sliding":
    """Return how the window slides by the flags."""
    from mtnlg_jax.decode.sliding import Sliding

    values: dict[str, Any] = {"mode": SLIDE.value, "sinks": SINKS.value, "keep": KEEP.value}
    values |= {"window": WINDOW.value, "words": WORDS.value}
    return Sliding(**{name: value for name, value in values.items() if value is not None})


def check_model(config: "ModelConfig", decode: "DecodeConfig") -> None:
    """Raise ValueError if the window of this model cannot slide as asked."""
    from mtnlg_jax.decode.sliding import check_sliding, room_of

    check_sliding(decode)
    room_of(config, sliding())


def note_prompt(config: "ModelConfig", length: int) -> None:
    """Say which part of a prompt of ``length`` tokens is read, if it is too long."""
    from mtnlg_jax.decode.sliding import room_of

    room = room_of(config, sliding())
    if length > room.size:
        devices.note(
            f"(the prompt has {length:,} tokens and the window {room.size:,}: the model reads the "
            f"first {room.sinks} and the last {room.size - room.sinks:,})"
        )


def note_end(result: "Generated", decode: "DecodeConfig") -> None:
    """Say why a text has fewer words than --words."""
    from mtnlg_jax.decode.words import count_words

    words = count_words(result.text)
    if WORDS.value is not None and words < WORDS.value:
        why = {
            "length": f"max_new_tokens={decode.max_new_tokens:,}",
            "timeout": f"max_time={decode.max_time}",
        }.get(result.finish_reason, "the model ended it, or a stop did")
        devices.note(f"(ended after {words:,} of {WORDS.value:,} words: {why})")


def near_words(pace: "Pace", tokenizer, tokens: Sequence[int]) -> dict[str, Any]:
    """Return what a token costs near word EARLY and near word LATE, or the last words there are.

    Of a text that is too short for both, say so and return {}.
    """
    from mtnlg_jax.decode.words import words_by_token

    words = words_by_token(tokenizer, tokens)[0][-1] if tokens else 0
    if words < LEAST_WORDS:
        devices.note(
            f"(late_over_early compares the {2 * AROUND} words around word {EARLY} with "
            f"{2 * AROUND} later ones, so it needs a text of {LEAST_WORDS:,} words; this one has "
            f"{words:,})"
        )
        return {}
    found: dict[str, Any] = {}
    for name, word in (("early", EARLY), ("late", LATE)):
        near = pace.seconds_per_token(tokenizer, tokens, word, AROUND)
        assert near is not None, "a text of so many words has two"
        found |= {f"{name}_word": near[0], f"{name}_ms_per_token": round(1000 * near[1], 4)}
    ratio = found["late_ms_per_token"] / found["early_ms_per_token"]
    return found | {"late_over_early": round(ratio, 3)}
