"""Byte-level BPE by tiktoken, for tokenizers whose ids it gives, several times as fast."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

# Patterns that split a text into words, as in the tokenizer.json of the models.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}{_REST}"
GPT_4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDS}|{_BEFORE}{_UPPER}+{_LOWER}*{_ENDS}|\p{{N}}{{1,3}}{_REST}"
)
# Both libraries match these alike; tests/data/test_merge_order.py compares them.
COMPARED = (LLAMA_3, QWEN_2, TEKKEN, GPT_4O)
# tiktoken gives up where one match goes back a million times, as it does in a run of white space.
_LONG_SPACE = re.compile(r"\s{100000}")


def in_merge_order(
    bare: "tokenizers.Tokenizer", ids: dict[str, int], pairs: list[tuple[str, str]]
) -> dict[str, int] | None:
    """Return {merged token: id} if tiktoken merges a word as `tokenizers` does, else None.

    ``bare`` has the model alone, without splitting into words. tiktoken merges whatever spells a
    token, in the order of ids; `tokenizers` merges the pairs of the list, in the order of the list.
    They agree if ids follow the order of the list and each token, encoded alone, is itself. For the
    text between the ends of a token just before its merge was made by earlier merges that crossed
    neither end, as in the token alone, so it is the pair of the list.
    """
    merged = {left + right: ids[left + right] for left, right in pairs}
    order = list(merged.values())
    if order != sorted(order) or len(merged) != len(pairs):
        return None
    encoded = bare.encode_batch_fast(list(merged))
    alone = all(found.ids == [index] for found, index in zip(encoded, order, strict=True))
    return merged if alone else None


def encode_words(
    encoding: "tiktoken.Encoding", texts: list[str], threads: int
) -> list[list[int] | None]:
    """Return the ids of texts, None for one that tiktoken might give up."""
    short = [text for text in texts if not is_hard(text)]
    if threads > 1:
        found = iter(encoding.encode_ordinary_batch(short, num_threads=threads))
    else:
        found = map(encoding.encode_ordinary, short)
    return [None if is_hard(text) else next(found) for text in texts]


def is_hard(text: str) -> bool:
    """Return whether tiktoken might give up a text."""
    return len(text) > 100_000 and _LONG_SPACE.search(text) is not None
