"""The interface that all tokenizers share."""

import copy
import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from mtnlg_jax import storage

ROLES = ("pad", "bos", "eos", "mask", "sep")
# A noncharacter of Unicode, which no text should have; inside a spelling it keeps that text.
HIDE = "\ufdd0"
NO_TOKEN = -1  # id of a role that a closed vocabulary lacks
META = "tokenizer_meta.json"
SPECIAL_IDS = "special_ids.json"
# Files of a Hugging Face folder that do not change the ids of texts: kept byte for byte beside the
# tokenizer, for its chat template and for export.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Number of characters from which a faster encoder repays the half second it takes to build.
MANY_CHARACTERS = 1 << 17

# Scripts without spaces between words: each piece that begins with one of their characters begins a
# word.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# (what a text can lose, a text that contains it, a pattern of the decoded text if it was lost)
_PROBES = (
    ("line ends", "a\nb", r"\A[^\n]*\Z"),
    ("line ends", "a\n\nb", r"\A[^\n]*\n?[^\n]*\Z"),
    ("carriage returns", "a\r\nb", r"\A[^\r]*\Z"),
    ("tabs", "a\tb", r"\A[^\t]*\Z"),
    ("spaces", "a b", r"\A\S*\Z"),
    ("runs of spaces", "a  b", r"\A\S* ?\S*\Z"),
    ("spaces at the start of a text", " a", r"\A(?! )"),
    ("a start without a space", "a", r"\A "),
    ("spaces at the end of a text", "a ", r"(?<! )\Z"),
    ("case", "aB", "b"),
    ("accents", "é", "e(?!\u0301)"),
    ("combining marks", "e\u0301", "é|e(?!\u0301)"),
    ("full-width forms", "\uff11", "1"),
    ("compatibility forms such as ligatures", "\ufb01", "fi"),
    ("control characters", "a\x01b", r"\Aa ?b\Z"),
    ("characters without spaces between them", "天地", r"\A. .\Z"),
)
_CHARACTERS = "龘กب🙂€#~zQ7"  # of several scripts and kinds


class Tokenizer:
    """The methods of every tokenizer; subclasses implement `_encode`.

    ``pad_id bos_id eos_id mask_id sep_id``: ids of the special tokens. ``eos_id`` is -1 if a model
    trained elsewhere has no token that ends a text.
    ``eos_ids``: all tokens that end a text, ``eos_id`` first; models for chat have several.
    ``vocab_size``: rows a model needs, before any padding of its own.
    ``starts_word``: bool [vocab_size]; true if the piece begins a word, that is with a space, a
    punctuation mark or a character of a script without spaces.
    ``is_special``: bool [vocab_size]; true if the token is not text.
    ``special_names``: spelling of each special token by id.
    ``fingerprint``: SHA-256 of the content; equal fingerprints mean equal ids.
    ``companions``: the `COMPANIONS` of the folder it came from, by name. They are saved with it and
    are not part of the fingerprint, as they do not change ids.
    ``prompt_bos``: a text to continue follows bos, as documents did in training.
    ``parse_special``: special tokens spelled in a text are encoded as such. Meant for prompts; off
    for documents.
    """

    kind: str
    prompt_bos = True
    parse_special = False
    companions: Mapping[str, bytes] = MappingProxyType({})
    _more_ends: tuple[int, ...] = ()

    def __init__(
        self,
        pieces: list[bytes],
        roles: dict[str, int],
        names: dict[int, str],
        continues: Iterable[int],
        files: dict[str, bytes],
    ):
        """Set the fields of the class.

        ``pieces``: bytes of each token. ``names``: spellings of special tokens by id.
        ``continues``: ids that never begin a word, whatever their bytes.
        """
        self.pad_id = roles["pad"]
        self.bos_id = roles["bos"]
        self.eos_id = roles["eos"]
        self.sep_id = roles["sep"]
        self._mask_id = roles.get("mask")
        self.vocab_size = max(len(pieces), 1 + max(roles.values()))
        beyond = {index: f"<{role}>" for role, index in roles.items() if index >= len(pieces)}
        self.special_names = beyond | names
        self._bytes = pieces + [b""] * (self.vocab_size - len(pieces))
        self.is_special = np.zeros(self.vocab_size, bool)
        self.is_special[list(self.special_names)] = True
        begins = np.array([starts_word(piece) for piece in self._bytes])
        self.starts_word = begins & ~self.is_special
        self.starts_word[list(continues)] = False
        self._files = files
        digest = hashlib.sha256(self.kind.encode())
        for name in sorted(files):
            digest.update(hashlib.sha256(files[name]).digest())
        self.fingerprint = digest.hexdigest()

    def _read_roles(self, special_ids: bytes) -> dict[str, int]:
        """Return the roles of special_ids.json, and set ``prompt_bos`` and the further ends."""
        roles = json.loads(special_ids)
        self.prompt_bos = roles.pop("prompt_bos")
        self._more_ends = tuple(roles.pop("ends", ()))
        return {"sep": roles["bos"] if roles["eos"] == NO_TOKEN else roles["eos"]} | roles

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Return the ids that end a text, the one that ends documents first."""
        return tuple(dict.fromkeys((self.eos_id, *self._more_ends)))

    @property
    def mask_id(self) -> int:
        """Return the id of the mask token.

        Raises ValueError if the vocabulary is closed and has none.
        """
        if self._mask_id is None:
            raise ValueError(
                "this tokenizer has no mask token, so its model can neither learn masked text nor "
                "fill masks; use a tokenizer made by launch/prepare_data.py for that"
            )
        return self._mask_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens, except spelled ones if
        ``parse_special`` is set."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of several texts; they do not depend on the number of threads."""
        texts = [replace_surrogates(text) for text in texts]
        if self.parse_special:
            return [self._encode_special(text) for text in texts]
        return self._encode(texts, threads)

    def _encode(self, texts: list[str], threads: int) -> list[list[int]]:
        """Encode texts of valid Unicode; nothing in them becomes a special token."""
        raise NotImplementedError

    def _encode_special(self, text: str) -> list[int]:
        """Encode a text whose special tokens are parsed, the longest spelling first."""
        ids = {name: index for index, name in self.special_names.items()}
        return self._split_at(text, ids, lambda part: self._encode([part], 1)[0])

    def _split_spelled(self, text: str, names: Iterable[str]) -> list[str]:
        """Split a text at each of ``names``, which are parts as well; the longest wins."""
        spellings = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        return re.split(f"({spellings})", text) if spellings else [text]

    def _split_at(
        self, text: str, ids_of: dict[str, int], encode: Callable[[str], list[int]]
    ) -> list[int]:
        """Encode a text: spellings in ``ids_of`` to their ids, everything else by ``encode``."""
        ids: list[int] = []
        for part in self._split_spelled(text, ids_of):
            if part in ids_of:
                ids.append(ids_of[part])
            elif part:
                ids += encode(part)
        return ids

    def encode_rendering(self, text: str) -> tuple[list[int], list[tuple[int, int] | None]]:
        """Return the ids of a text in which special tokens are spelled, and the characters (start,
        stop) of ``text`` that each came from.

        `HIDE` is a character that is not part of the text: a spelling with it inside is text. The
         characters are None where the tokenizer loses some of the text.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int] | None] = []
        names = {name: index for index, name in self._spelled_names().items()}
        start = 0
        for part in self._split_spelled(replace_surrogates(text), names):
            if part in names:
                ids.append(names[part])
                offsets.append((start, start + len(part)))
            elif part:
                found, spans = self._encode_part(part)
                ids += found
                offsets += [span and (start + span[0], start + span[1]) for span in spans]
            start += len(part)
        return ids, offsets

    def _spelled_names(self) -> dict[int, str]:
        """Return the special tokens that `_encode_part` does not read itself."""
        return self.special_names

    def _encode_part(self, text: str) -> tuple[list[int], Sequence[tuple[int, int] | None]]:
        """Do the same as `encode_rendering` for a text without special tokens."""
        kept = [index for index, character in enumerate(text) if character != HIDE]
        plain = text.replace(HIDE, "")
        ids = self._encode([plain], 1)[0]
        data = plain.encode()
        pieces = [self._bytes[index] for index in ids]
        lead = 1 if b"".join(pieces) == b" " + data else 0
        if not lead and b"".join(pieces) != data:
            return ids, [None] * len(ids)
        characters = [
            at for at, character in zip(kept, plain, strict=True) for _ in character.encode()
        ]
        offsets = []
        stop = -lead
        for piece in pieces:
            start = max(stop, 0)
            stop += len(piece)
            inside = characters[start : max(stop, start)]
            at = inside[0] if inside else len(text)
            offsets.append((at, inside[-1] + 1 if inside else at))
        return ids, offsets

    def check_end(self) -> None:
        """Raise ValueError if the vocabulary is closed and has no token that ends a document."""
        if self.eos_id == NO_TOKEN:
            raise ValueError(
                "this tokenizer belongs to a model trained without an end token, so documents "
                "cannot be separated; name one of its tokens as eos_token in the "
                "tokenizer_config.json of the folder that was converted, and convert again"
            )

    @functools.cached_property
    def lossless(self) -> bool:
        """Whether each text survives encoding and decoding, as far as `losses` can find out.

        Where it is false, as with NFC, lower case or WordPiece, the decoded text, what streams
        show and bits per byte are those of the changed text.
        """
        return not self.losses()

    def losses(self) -> list[str]:
        """List what a text can lose by encoding and decoding, found by trial; [] for nothing."""
        plain = copy.copy(self)
        plain.parse_special = False

        def round_trip(text: str) -> str:
            return plain.decode(plain.encode(text))

        found = [what for what, text, pattern in _PROBES if re.search(pattern, round_trip(text))]
        unknown = [
            character
            for character in _CHARACTERS
            if character.lower() not in round_trip(character).lower()
        ]
        if unknown:
            found.append(f"unknown characters such as {unknown[0]}")
        return list(dict.fromkeys(found))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of ids. Bytes that are not UTF-8, such as half a character, become
        U+FFFD."""
        parts = []
        for index in map(int, ids):
            if not 0 <= index < self.vocab_size:
                raise ValueError(
                    f"token {index} is unknown; this vocabulary ends at {self.vocab_size - 1}"
                )
            shown = not skip_special and index in self.special_names
            parts.append(self.special_names[index].encode() if shown else self._bytes[index])
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self, index: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to a text; b"" for a special token."""
        return self._bytes[index]

    def files(self) -> dict[str, bytes]:
        """Return the files that `load_tokenizer` needs, by name."""
        meta = {"kind": self.kind, "fingerprint": self.fingerprint, "vocab_size": self.vocab_size}
        if not self.prompt_bos:
            meta["prompt_bos"] = False
        if self.companions:
            hashes = {name: hashlib.sha256(data).hexdigest() for name, data in self._companions()}
            meta["companions"] = hashes
        return {
            **dict(self._companions()),
            **self._files,
            META: json.dumps(meta, indent=1).encode(),
        }

    def _companions(self) -> list[tuple[str, bytes]]:
        return sorted(self.companions.items())

    def save(self, folder: str | os.PathLike) -> None:
        """Write `files` to a folder or below a TensorStore URL."""
        for name, content in self.files().items():
            storage.write_file(folder, name, content)


def find_roles(pieces: list[str], others: dict[str, list[str]]) -> dict[str, int]:
    """Return the ids of the five special tokens; missing ones are numbered after the vocabulary.

    ``others``: further spellings of a role, tried after "<role>" and before "[ROLE]".
    """
    ids = {piece: index for index, piece in enumerate(pieces)}
    roles = {}
    end = len(pieces)
    for role in ROLES:
        spellings = [f"<{role}>", *others.get(role, []), f"[{role.upper()}]"]
        found = [ids[spelling] for spelling in spellings if spelling in ids]
        roles[role] = found[0] if found else end
        end += not found
    return roles


def starts_word(piece: bytes) -> bool:
    """Whether a piece begins a word, judged by its first character."""
    first = piece.decode("utf-8", "ignore")[:1]
    if not first:
        # Part of a character: a first byte from 0xE3 on begins three or more bytes, as in Chinese.
        return piece[:1] >= b"\xe3"
    if piece[0] & 0xC0 == 0x80 or unicodedata.category(first).startswith("M"):
        return False
    return not first.isalnum() or bool(_UNSPACED.match(first))


def replace_surrogates(text: str) -> str:
    """Return a text that can be encoded as UTF-8; Python strings may hold lone surrogates."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
