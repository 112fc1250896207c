"""Personal data that the model writes, found by the rules by which the data recipe masks them."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.data.filter import pii
from mtnlg_jax.data.store.tokens import Tokens
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.evaluate.audit.counting import find_strings

_ROWS = 32  # texts that are written at once


class Found(NamedTuple):
    """A find in a text that the model wrote, and the line around it."""

    kind: str
    string: str
    line: str


def write_texts(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    temperature: float,
    seed: int,
    on_texts: Callable[[int], None] = lambda texts: None,
) -> list[str]:
    """Return a sampled continuation of each prompt (token ids), of at most ``tokens`` tokens."""
    texts = []
    for first in range(0, len(prompts), _ROWS):
        group = [list(prompt) for prompt in prompts[first : first + _ROWS]]
        filled = group + [group[0]] * (_ROWS - len(group) if first else 0)
        decode = [
            DecodeConfig(
                max_new_tokens=min(tokens, decoder.context - max(1, len(prompt))),
                temperature=temperature,
                seed=(seed + 1_000_003 * (first + number)) % (1 << 31),
            )
            for number, prompt in enumerate(filled)
        ]
        written = generate(decoder, tokenizer, filled, decode)
        texts += [each.text for each in written[: len(group)]]
        on_texts(len(group))
    return texts


def find(texts: Sequence[str]) -> list[Found]:
    """Return all finds of the recipe's rules."""
    found = []
    for text in texts:
        searched: dict[str, int] = {}  # a string may stand in several lines
        for kind, string in pii.find(text):
            start = text.find(string, searched.get(string, 0))
            if start < 0:  # a part of it was masked as another kind
                found.append(Found(kind, string, string))
                continue
            searched[string] = start + len(string)
            line_start = text.rfind("\n", 0, start) + 1
            line_end = text.find("\n", start + len(string))
            line = text[line_start : len(text) if line_end < 0 else line_end]
            found.append(Found(kind, string, line))
    return found


def summarize(
    texts: Sequence[str],
    found: Sequence[Found],
    parts: Sequence[Tokens],
    tokenizer: Tokenizer,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Return counts by kind, and whether each string stands in the training text.

    ``finds`` counts all; ``different`` each string once, and ``in_training`` those of them that
    stand in the text of ``parts``.
    """
    strings = sorted({each.string for each in found})
    known = dict(
        zip(strings, map(bool, find_strings(parts, tokenizer, strings, on_tokens)), strict=True)
        if strings
        else ()
    )
    kinds = {}
    for kind in sorted({each.kind for each in found}):
        own = [each.string for each in found if each.kind == kind]
        kinds[kind] = {
            "finds": len(own),
            "different": len(set(own)),
            "in_training": sum(known[string] for string in set(own)),
        }
    placeholders = Counter(
        kind for text in texts for kind in pii.KINDS for _ in range(text.count(f"<{kind.upper()}>"))
    )
    total = {
        "texts": len(texts),
        "characters": sum(map(len, texts)),
        "kinds": kinds,
        "finds": len(found),
        "different": len(strings),
        "in_training": sum(known.values()),
        "placeholders": dict(sorted(placeholders.items())),
    }
    return total, known
