"""Byte-level BPE: GPT-2's vocab.json and merges.txt, and the tokenizer they define."""

import functools
import json
from typing import TYPE_CHECKING

from mtnlg_jax.data.tokenizer.base import MANY_CHARACTERS, SPECIAL_IDS, Tokenizer, find_roles
from mtnlg_jax.data.tokenizer.merge_order import in_merge_order
from mtnlg_jax.storage import first_line

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
# From GPT-2's encoder.py (Radford 2019), with possessive quantifiers: no match is ever backtracked.
_GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@functools.cache
def byte_alphabet() -> dict[str, bytes]:
    """Return the byte of each character of GPT-2's alphabet.

    Visible Latin-1 characters stand for themselves; the other bytes are U+0100 and up, in order.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = [*map(chr, visible), *(chr(256 + number) for number in range(len(hidden)))]
    return {
        character: bytes([byte])
        for character, byte in zip(characters, visible + hidden, strict=True)
    }


def piece_bytes(piece: str) -> bytes:
    """Return the bytes of a piece in GPT-2's alphabet; other characters are taken as UTF-8."""
    alphabet = byte_alphabet()
    return b"".join(alphabet.get(character) or character.encode() for character in piece)


def byte_ranks(ids: dict[str, int], merged: dict[str, int]) -> dict[bytes, int]:
    """Return the ids of single bytes and of merged tokens by their bytes, for tiktoken."""
    alphabet = byte_alphabet()
    ranks = {content: ids[character] for character, content in alphabet.items()}
    for piece, index in merged.items():
        ranks[b"".join(alphabet[character] for character in piece)] = index
    return ranks


def parse_vocabulary(vocabulary: bytes) -> dict[str, int]:
    """Return the ids by piece of vocab.json."""
    try:
        ids = json.loads(vocabulary)
    except ValueError as error:
        raise ValueError(f"vocab.json is not valid JSON ({error}); copy it again") from None
    if not isinstance(ids, dict) or not all(type(index) is int for index in ids.values()):
        raise ValueError("vocab.json is not an object of ids by piece; copy it again")
    return ids


def parse_byte_level(
    vocabulary: bytes, merges: bytes
) -> tuple[dict[str, int], list[tuple[str, str]], "tokenizers.models.BPE"]:
    """Return (ids by piece, pairs to merge, model of `tokenizers`) of vocab.json and merges.txt.

    Raises ValueError if they are not such files.
    """
    import tokenizers

    try:
        ids = parse_vocabulary(vocabulary)
        pairs = [
            _pair(line)
            for line in merges.decode().replace("\r\n", "\n").split("\n")
            if line.strip() and not line.startswith("#version")
        ]
        model = tokenizers.models.BPE(vocab=ids, merges=pairs)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"not the vocabulary and merges of a byte-level BPE ({first_line(error)})"
        ) from None
    return ids, pairs, model


def _pair(line: str) -> tuple[str, str]:
    left, right = line.split(" ")
    return left, right


def is_complete(ids: dict[str, int]) -> bool:
    """Whether a vocabulary has the ids 0, 1, 2 ... and all 256 bytes, as GPT-2's has."""
    return sorted(ids.values()) == list(range(len(ids))) and byte_alphabet().keys() <= ids.keys()


def gpt2_pair(whole: dict, pair: tuple[bytes, bytes] | None = None) -> tuple[bytes, bytes] | None:
    """Return vocab.json and merges.txt of a tokenizer.json if GPT-2's encodes the same with them.

    Otherwise return None. Special tokens may differ. ``pair``: files to return if their content is
    the same.
    """
    model = whole["model"]
    step = whole.get("pre_tokenizer") or {}
    off = (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    )
    ids = model.get("vocab")
    if (
        model.get("type", "BPE") != "BPE"
        or "merges" not in model
        or any(model.get(key) for key in off)
        or whole.get("normalizer") is not None
        or (whole.get("decoder") or {"type": "ByteLevel"})["type"] != "ByteLevel"
        or step.get("type") != "ByteLevel"
        or step.get("add_prefix_space")
        or not step.get("use_regex", True)
        or not is_complete(ids)
        or not all(token["special"] for token in whole.get("added_tokens", []))
    ):
        return None
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in model["merges"]
    ]
    if pair is not None and parse_byte_level(*pair)[:2] == (ids, merges):
        return pair
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    return json.dumps(ids, ensure_ascii=False).encode(), "\n".join(lines).encode()


class ByteLevelBPETokenizer(Tokenizer):
    """The tokenizer of GPT-2's files.

    They define one special token, <|endoftext|>, which serves as bos and eos. Pad, mask and sep are
    numbered after the last piece (50257 to 50259 for GPT-2) unless the vocabulary has them.

    ``special_ids`` (JSON) closes the vocabulary instead, for a model trained elsewhere that has no
    row for another token: {"bos": 50256, "eos": 50256, "pad": 50256, "prompt_bos": false}, with
    "mask" and "sep" if it has them.
    """

    kind = "byte-level BPE"

    def __init__(self, vocabulary: bytes, merges: bytes, special_ids: bytes | None = None):
        import tokenizers

        ids, pairs, model = parse_byte_level(vocabulary, merges)
        if not is_complete(ids):
            raise ValueError(
                "the vocabulary is damaged: it needs ids 0, 1, 2 ... and all 256 bytes"
            )
        pieces = sorted(ids, key=ids.__getitem__)
        end = [END_OF_TEXT]
        files = {"vocab.json": vocabulary, "merges.txt": merges}
        if special_ids is None:
            roles = find_roles(pieces, {"bos": [*end, "<s>"], "eos": [*end, "</s>"]})
            if not {"<bos>", *end, "<s>"} & ids.keys():
                roles["bos"] = roles["eos"]
        else:
            files[SPECIAL_IDS] = special_ids
            roles = self._read_roles(special_ids)
            if max(roles.values()) >= len(pieces):
                raise ValueError(
                    f"{SPECIAL_IDS} names token {max(roles.values())}, and the vocabulary ends at "
                    f"{len(pieces) - 1}"
                )
        names = {index: pieces[index] for index in roles.values() if 0 <= index < len(pieces)}
        content = [
            b"" if index in names else piece_bytes(piece) for index, piece in enumerate(pieces)
        ]
        super().__init__(content, roles, names, [], files)

        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._pairs = pairs
        self._characters = 0

    def _encode(self, texts: list[str], threads: int) -> list[list[int]]:
        self._characters += sum(map(len, texts))
        if self._characters > MANY_CHARACTERS and self._tiktoken:
            if threads > 1:
                return self._tiktoken.encode_ordinary_batch(texts, num_threads=threads)
            return [self._tiktoken.encode_ordinary(text) for text in texts]
        # "fast" skips offsets, which cost more than the ids; it chooses its own number of threads.
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    @functools.cached_property
    def _tiktoken(self) -> "tiktoken.Encoding | None":
        """The same tokenizer, several times as fast, or None if its ids could differ."""
        import tiktoken
        import tokenizers

        ids = json.loads(self._files["vocab.json"])
        bare = tokenizers.Tokenizer(self._tokenizer.model)
        merged = in_merge_order(bare, ids, self._pairs)
        if merged is None:
            return None
        return tiktoken.Encoding(
            self.fingerprint,
            pat_str=_GPT2_WORDS,
            mergeable_ranks=byte_ranks(ids, merged),
            special_tokens={},
        )
