"""The bytes that each token of a tokenizer.json adds to a text."""

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mtnlg_jax.data.tokenizer.byte_level import piece_bytes

if TYPE_CHECKING:
    import tokenizers

_BYTE = re.compile("<0x([0-9A-F]{2})>")
# WordPiece's decoder removes these spaces that it put between tokens, in its order.
_CLEANUP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """``content``: the bytes that each id adds to a text. ``byte_ids``: ids of single bytes.
    ``prefixed``: the first piece of a text begins with a space that the text does not have."""

    content: list[bytes]
    byte_ids: list[int]
    prefixed: bool


def pieces_of(whole: dict, fast: "tokenizers.Tokenizer", ids: dict[str, int]) -> Pieces:
    """Return what the decoder of a tokenizer.json makes of each token in the middle of a text.

    ``whole`` is the object of the JSON, ``fast`` its tokenizer, and ``ids`` all of its tokens.
    Raises ValueError for a decoder that makes a token's text depend on the tokens around it. If
    there is no decoder, transformers writes a space between tokens; here the pre-tokenizer is
    inverted instead.
    """
    added = {index: token.content for index, token in fast.get_added_tokens_decoder().items()}
    steps = list(_flat(whole.get("decoder"), "decoders")) or [_inverse(whole, ids)]
    content = [b""] * (1 + max(ids.values()))
    with_bytes = any(step["type"] == "ByteFallback" for step in steps)
    byte_ids = []
    for piece, index in ids.items():
        if index in added:
            content[index] = added[index].encode()
            continue
        content[index] = _decode(piece, steps)
        if with_bytes and _BYTE.fullmatch(piece):
            byte_ids.append(index)
    prefixed = any(_drops_first_space(steps, number) for number in range(len(steps)))
    return Pieces(content, byte_ids, prefixed)


def _flat(part: dict | None, key: str) -> Iterator[dict]:
    """Yield the steps of a decoder or pre-tokenizer, which may be nested sequences."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for inner in part.get(key, []):
        yield from _flat(inner, key)


def _inverse(whole: dict, ids: dict[str, int]) -> dict:
    """Return a decoder for a tokenizer that has none."""
    found = {step["type"]: step for step in _flat(whole.get("pre_tokenizer"), "pretokenizers")}
    for kind in ("ByteLevel", "Metaspace"):
        if kind in found:
            return found[kind]
    prefix = whole["model"].get("continuing_subword_prefix")
    if prefix:
        return {"type": "WordPiece", "prefix": prefix, "cleanup": False}
    return {"type": "Fuse"} if " " in ids else {"type": "Spaces"}


def _decode(piece: str, steps: list[dict]) -> bytes:
    text = piece
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            return piece_bytes(text)
        if kind == "ByteFallback":
            if byte := _BYTE.fullmatch(text):
                return bytes([int(byte[1], 16)])
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and not step["stop"]:
            pass  # acts on the start of the whole text alone: see `_drops_first_space`
        elif kind in _STEPS and not (kind == "Strip" and fused):
            text = _STEPS[kind](text, step)
        else:
            raise ValueError(
                f"its decoder {kind} makes a token's text depend on the tokens around it, "
                "and a text is shown while it is written; use a tokenizer with another decoder"
            )
    return text.encode()


def _substitute(text: str, step: dict) -> str:
    pattern = step["pattern"]
    if "String" in pattern:
        return text.replace(pattern["String"], step["content"])
    return re.sub(pattern["Regex"], lambda _: step["content"], text)


def _join_words(text: str, step: dict) -> str:
    prefix = step["prefix"]
    text = text[len(prefix) :] if text.startswith(prefix) else " " + text
    for before, after in _CLEANUP if step.get("cleanup", True) else ():
        text = text.replace(before, after)
    return text


def _strip(text: str, step: dict) -> str:
    for _ in range(step["start"]):
        text = text.removeprefix(step["content"])
    for _ in range(step["stop"]):
        text = text.removesuffix(step["content"])
    return text


# The steps of decoders that change the text of one token alone.
_STEPS = {
    "Replace": _substitute,
    "Metaspace": lambda text, step: text.replace(step["replacement"], " "),
    "WordPiece": _join_words,
    "Spaces": lambda text, step: " " + text,
    "Strip": _strip,
}


def _drops_first_space(steps: list[dict], number: int) -> bool:
    """Whether step ``number`` of a decoder removes the space before the first token."""
    step = steps[number]
    if step["type"] == "Metaspace":
        by_default = "always" if step.get("add_prefix_space", True) else "never"
        return step.get("prepend_scheme", by_default) != "never"
    if step["type"] == "Strip":
        fused = any(before["type"] == "Fuse" for before in steps[:number])
        return fused and step["content"] == " " and step["start"] > 0
    return step["type"] in ("WordPiece", "Spaces")
