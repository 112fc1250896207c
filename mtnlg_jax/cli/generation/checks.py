"""Check that the flags of launch/generate.py fit together."""

import os
import re
import sys
from typing import Any

from mtnlg_jax.cli.decoding import shared_flags
from mtnlg_jax.cli.decoding.devices import of_mesh
from mtnlg_jax.cli.decoding.preset_flag import PRESET
from mtnlg_jax.cli.generation import options, prefixes, sliding
from mtnlg_jax.cli.generation.control_flags import check_preset
from mtnlg_jax.cli.generation.settings import as_given
from mtnlg_jax.cli.generation.settings_flags import NAMES

# Every flag that sets DecodeConfig.
DECODE_FLAGS = (*NAMES, PRESET.name, shared_flags.SET.name)


def check_flags() -> None:
    """Raise ValueError on a flag that has no effect beside the others."""
    _check_mode()
    _check_chat()
    _check_prompts()
    check_preset()
    sliding.check_flags()
    if options.STREAM.value and shared_flags.JSON.value:
        raise ValueError(
            "--stream shows text as it comes, and --json prints it at the end; leave one of the "
            "two out"
        )
    _note_escapes()


def _check_mode() -> None:
    """Refuse flags of another mode than --mode, and settings for candidates that are given."""
    mode = options.MODE.value
    generated = ("generative",) if options.CANDIDATES.value else ("generative", "ranking")
    acts_in: dict[str, tuple[str, ...]] = {}  # modes by the names of flags
    acts_in |= dict.fromkeys(DECODE_FLAGS, ("generative", "ranking"))
    acts_in |= dict.fromkeys(["stream", "stats", "draft", "num_assistant_tokens"], ("generative",))
    acts_in |= dict.fromkeys(sliding.FLAGS, ("generative",))
    acts_in |= dict.fromkeys(["candidates", "normalise", "scorer", *options.SCORING], ("ranking",))
    acts_in |= dict.fromkeys(prefixes.KEYS, ("generative", "ranking"))
    acts_in |= {"guesses": ("fill",)} | dict.fromkeys(["cache", "show_special"], generated)
    acts_in |= dict.fromkeys(
        ["checkpoint", "dtype", "weights", "prompts", "output", "batch"],
        ("generative", "ranking", "fill"),
    )
    for name, modes in acts_in.items():
        if not _is_given(name) or mode in modes:
            continue
        if mode == "ranking" and name in ("cache", "show_special"):
            raise ValueError(
                f"--{name} affects generated texts, and --candidates gives the texts; leave it out"
            )
        raise ValueError(
            f"--{name} is for --mode={' or '.join(modes)}, not --mode={mode}; leave it out"
        )
    if mode == "ranking" and options.CANDIDATES.value:
        for name in DECODE_FLAGS:
            if _is_given(name):
                raise ValueError(
                    f"--{name} affects generated candidates, and --candidates gives them; leave "
                    "one of the two out"
                )


def _is_given(name: str) -> bool:
    """Check whether a flag is given, --set for more than the mesh."""
    if name == shared_flags.SET.name and all(map(of_mesh, shared_flags.SET.value)):
        return False
    return options.is_given(name)


def _check_chat() -> None:
    """Refuse flags of prompts beside --chat, and flags of a conversation without it."""
    if not options.CHAT.value:
        for name in ("system", "chat_template"):
            if options.is_given(name):
                raise ValueError(f"--{name} is for a conversation; add --chat, or leave it out")
        return
    if options.MODE.value != "generative":
        raise ValueError(
            f"--chat generates answers, and --mode={options.MODE.value} does not; leave one of the "
            "two out"
        )
    of_text = ("prompt", "input", "prompts", "parse_special", "show_special", "stats", "json")
    for name in (*of_text, *prefixes.KEYS):
        if options.is_given(name):
            raise ValueError(
                f"--{name} is for prompts, and --chat reads a conversation; leave one of the two "
                "out"
            )


def _check_prompts() -> None:
    """Refuse flags of one prompt beside --prompts, and flags of many without it."""
    for name in ("output", "batch"):
        if options.is_given(name) and not options.PROMPTS.value:
            raise ValueError(
                f"--{name} is for many prompts; name their file with --prompts, or leave it out"
            )
    if options.PROMPTS.value:
        for name in ("prompt", "input", "stream", "stats", "json", *prefixes.KEYS):
            if options.is_given(name):
                raise ValueError(
                    f"--{name} is for one prompt, and --prompts={options.PROMPTS.value} holds "
                    "many; leave one of the two out"
                )


def _note_escapes() -> None:
    """Print a note for each text in which a backslash may be meant as an escape."""
    for text in (options.PROMPT.value or "", *options.CANDIDATES.value):
        if re.search(r"\\[nt]", text):
            print(
                f"note: {text[:40]!r} holds a backslash and a letter, not a line end or a tab; "
                "for those write $'\\n' in the shell",
                file=sys.stderr,
            )


def check_settings(given: dict[str, Any]) -> None:
    """Refuse --stream and --chat for several texts, and settings of a draft model where none can
    guess."""
    several = given.get("num_return_sequences", 1)
    if options.CHAT.value and several > 1:
        raise ValueError(
            f"--chat continues one answer, and {as_given('num_return_sequences')}={several} asks "
            "for several; leave one of the two out"
        )
    if options.STREAM.value and given.get("num_return_sequences", 1) > 1:
        name = as_given("num_return_sequences")
        raise ValueError(
            f"--stream shows one text as it comes, and {name}={given['num_return_sequences']} asks "
            "for several; leave one of the two out"
        )
    if "num_assistant_tokens" in given and options.DRAFT.value is None:
        name = as_given("num_assistant_tokens")
        # A flag is refused by `check_flags`; --set is for other modes as well.
        if options.MODE.value != "generative":
            raise ValueError(
                f"{name} is for --mode=generative, not --mode={options.MODE.value}; leave it out"
            )
        raise ValueError(
            f"{name}={given['num_assistant_tokens']} are guessed by a draft model; name its run "
            "with --draft, or leave it out"
        )


def check_output() -> None:
    """Raise ValueError if --output cannot be written, before the model is loaded."""
    if options.OUTPUT.value is None:
        return
    if os.path.exists(options.OUTPUT.value):
        raise ValueError(f"--output={options.OUTPUT.value} exists; name another file, or remove it")
    folder = os.path.dirname(os.path.abspath(options.OUTPUT.value))
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"--output={options.OUTPUT.value} cannot be written, as {folder} is not a writable "
            "folder; create it, or name another file"
        )
