"""Tokenizers: SentencePiece (trained here or brought), the byte-level BPE of GPT-2's files, and
whatever a tokenizer.json of Hugging Face describes.

Our own models and GPT-2's are lossless: every text comes back unchanged. Of others,
`Tokenizer.losses` names what does not. A text does not become a special token by spelling its
name, so a document cannot end itself, unless ``parse_special`` is set. Pieces are bytes, put one
after another, so a text can be decoded while it is generated.
"""

import copy
import functools
import hashlib
import heapq
import io
import json
import os
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from mtnlg_jax import storage
from mtnlg_jax.data.tokenizer_files import (
    END_OF_TEXT,
    NO_TOKEN,
    ROLES,
    HubTokenizerFiles,
    byte_alphabet,
    first_free_id,
    gpt2_files,
    gpt2_pair,
    is_whole,
    parse_byte_level,
    parse_tokenizer,
    pieces_of,
    read_tokenizer_files,
    roles_of,
)

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_SPACE = "\u2581"  # how SentencePiece writes a space; texts may hold it themselves
# characters handed to SentencePiece at once, at most 4 KB; its BPE slows down on long texts
_UNIT = 1024
_META = "tokenizer_meta.json"
_SPECIAL_IDS = "special_ids.json"
# Of GPT-2's encoder.py (Radford 2019); possessive, since what they take is never given back.
_GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_MANY_CHARACTERS = 1 << 17  # from here on a faster encoder pays for half a second of making it
# Scripts that put no space between words: each piece that begins with one of their characters is a
# word.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# (what a text can lose, a text that has it, a pattern that matches what comes back where it was
# lost)
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
    """What every tokenizer can do; `SentencePieceTokenizer`, `ByteLevelBPETokenizer` and
    `HubTokenizer` say how.

    ``pad_id bos_id eos_id mask_id sep_id``; ``vocab_size``, what a model must hold before any
    padding of its own; ``starts_word`` and ``is_special``, boolean arrays of that length: the
    piece begins a word (with a space, a punctuation mark or a character of an unspaced script),
    the piece is no text. ``fingerprint`` is a sha256 over the content: equal fingerprints mean
    equal ids. ``special_names``: special tokens, id to spelling. ``prompt_bos``: a text to
    continue stands behind bos, as documents did in training. ``parse_special``: a text's special
    tokens are read as such; meant for prompts, and off for documents. ``eos_id`` is -1 where a
    model that was trained elsewhere has no token that ends a text.
    """

    kind: str
    prompt_bos = True
    parse_special = False

    def __init__(
        self,
        pieces: list[bytes],
        roles: dict[str, int],
        names: dict[int, str],
        continues: Iterable[int],
        files: dict[str, bytes],
    ):
        """``names``: the special tokens; ``continues``: pieces that begin no word whatever they
        look like."""
        self.pad_id, self.bos_id, self.eos_id, self.sep_id = (
            roles[role] for role in ("pad", "bos", "eos", "sep")
        )
        self._mask_id = roles.get("mask")
        self.vocab_size = max(len(pieces), 1 + max(roles.values()))
        beyond = {index: f"<{role}>" for role, index in roles.items() if index >= len(pieces)}
        self.special_names = beyond | names
        self._bytes = pieces + [b""] * (self.vocab_size - len(pieces))
        self.is_special = np.zeros(self.vocab_size, bool)
        self.is_special[list(self.special_names)] = True
        self.starts_word = (
            np.array([_starts_word(piece) for piece in self._bytes]) & ~self.is_special
        )
        self.starts_word[list(continues)] = False
        self._files = files
        digest = hashlib.sha256(self.kind.encode())
        for name in sorted(files):
            digest.update(hashlib.sha256(files[name]).digest())
        self.fingerprint = digest.hexdigest()

    def _read_roles(self, special_ids: bytes) -> dict[str, int]:
        """The roles in the bytes of special_ids.json; sets ``prompt_bos``."""
        roles = json.loads(special_ids)
        self.prompt_bos = roles.pop("prompt_bos")
        return {"sep": roles["bos"] if roles["eos"] == NO_TOKEN else roles["eos"]} | roles

    @property
    def mask_id(self) -> int:
        """Raises ValueError where the vocabulary is closed and has none."""
        if self._mask_id is None:
            raise ValueError(
                "this tokenizer has no mask token, so its model neither learns masked text nor fills "
                "masks; take a tokenizer of launch/prepare_data.py for that"
            )
        return self._mask_id

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens; with ``parse_special`` those that the text
        spells.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """The ids of several texts; the number of threads never changes them."""
        texts = [_valid(text) for text in texts]
        if self.parse_special:
            return [self._encode_special(text) for text in texts]
        return self._encode(texts, threads)

    def _encode(self, texts: list[str], threads: int) -> list[list[int]]:
        """The ids of texts that are valid Unicode, of which none becomes a special token."""
        raise NotImplementedError

    def _encode_special(self, text: str) -> list[int]:
        """The ids of a text whose special tokens are read as such, the longest spelling first."""
        numbers = {name: index for index, name in self.special_names.items()}
        return self._split_at(text, numbers, lambda part: self._encode([part], 1)[0])

    def _split_at(
        self, text: str, numbers: dict[str, int], encode: Callable[[str], list[int]]
    ) -> list[int]:
        """The ids of a text: of the spellings in ``numbers`` theirs, of the rest what ``encode``
        gives.
        """
        if not numbers:
            return encode(text)
        spellings = "|".join(map(re.escape, sorted(numbers, key=len, reverse=True)))
        ids = []
        for part in re.split(f"({spellings})", text):
            ids += [numbers[part]] if part in numbers else encode(part) if part else []
        return ids

    def check_end(self) -> None:
        """Raises ValueError where no document can end: the vocabulary is closed and has no end
        token.
        """
        if self.eos_id == NO_TOKEN:
            raise ValueError(
                "this tokenizer is of a model that was trained without an end token, so "
                "documents cannot be told apart; name one of its tokens as eos_token "
                "in the tokenizer_config.json of the folder that was converted, and "
                "convert again"
            )

    def losses(self) -> list[str]:
        """What a text can lose when it is encoded and decoded, in words, found by trying; empty:
        nothing.
        """
        plain = copy.copy(self)
        plain.parse_special = False

        def back(text: str) -> str:
            return plain.decode(plain.encode(text))

        found = [what for what, text, pattern in _PROBES if re.search(pattern, back(text))]
        unknown = [
            character
            for character in _CHARACTERS
            if character.lower() not in back(character).lower()
        ]
        if unknown:
            found.append(f"unknown characters such as {unknown[0]}")
        return list(dict.fromkeys(found))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8, as of a character cut in two, become U+FFFD."""
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
        """The UTF-8 bytes that a token adds to a text; none for a special token."""
        return self._bytes[index]

    def files(self) -> dict[str, bytes]:
        """All that `load_tokenizer` needs, by file name."""
        meta = {"kind": self.kind, "fingerprint": self.fingerprint, "vocab_size": self.vocab_size}
        if not self.prompt_bos:
            meta["prompt_bos"] = False
        return {**self._files, _META: json.dumps(meta, indent=1).encode()}

    def save(self, folder: str | os.PathLike) -> None:
        """Write `files` into a folder, or below a TensorStore URL."""
        for name, content in self.files().items():
            storage.write_file(folder, name, content)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. One from elsewhere keeps its own normalisation, so it may not be
    lossless, and its own special pieces; those that it lacks are numbered after its last piece."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, special_ids: bytes | None = None):
        """``special_ids``: as of `ByteLevelBPETokenizer`, where the files beside the model say
        more than its pieces.
        """
        from sentencepiece import SentencePieceProcessor

        try:
            sp = SentencePieceProcessor(model_proto=model)
        except Exception:  # its message names a line of C++
            raise ValueError("not a SentencePiece model, or a damaged one") from None
        pieces = [sp.id_to_piece(index) for index in range(sp.vocab_size())]
        files = {"tokenizer.model": model}
        if special_ids is None:
            roles = _find_roles(pieces, {"bos": ["<s>"], "eos": ["</s>"]})
        else:
            files[_SPECIAL_IDS] = special_ids
            roles = self._read_roles(special_ids)
        names = {
            index: piece
            for index, piece in enumerate(pieces)
            if sp.is_control(index)
            or sp.is_unused(index)
            or sp.is_unknown(index)
            or index in roles.values()
        }
        content = [piece.replace(_SPACE, " ").encode() for piece in pieces]
        byte_ids = [index for index in range(len(pieces)) if sp.is_byte(index)]
        for index in byte_ids:
            content[index] = bytes([int(pieces[index][1:-1], 16)])  # spelled <0x41>
        for index in names:
            content[index] = b"\xef\xbf\xbd" if sp.is_unknown(index) else b""
        super().__init__(content, roles, names, byte_ids, files)

        self._sp = sp
        self.pieces = len(pieces)
        # Models of others may put a space before each text: decoding drops it, and nothing may be
        # cut up.
        self._prefixed = sp.encode("a", out_type=str)[0].startswith(_SPACE)
        self.lossless = not self._prefixed and sp.encode("\n\n\t", out_type=str) == [
            "\n",
            "\n",
            "\t",
        ]
        self._space_ids = (
            [byte_ids[byte] for byte in _SPACE.encode()] if len(byte_ids) == 256 else []
        )
        # A special that this model would find inside a text is cut after its first character.
        found = [
            pieces[index]
            for index in roles.values()
            if index < len(pieces) and index in sp.encode(pieces[index])
        ]
        self._cuts = re.compile(
            "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in found)
        )

    def _encode(self, texts: list[str], threads: int) -> list[list[int]]:
        units = [self._units(text) for text in texts]
        encoded = iter(self._sp.encode(list(chain.from_iterable(units)), num_threads=threads))
        return [
            list(
                chain.from_iterable(
                    self._space_ids if unit == _SPACE and self.lossless else next_ids
                    for unit, next_ids in zip(part, encoded, strict=False)
                )
            )
            for part in units
        ]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        text = super().decode(ids, skip_special)
        return text.removeprefix(" ") if self._prefixed else text

    def _units(self, text: str) -> list[str]:
        """The parts to encode one by one; of a model of ours, at places over which no piece
        reaches."""
        if not self.lossless:
            return self._cuts.split(text) if self._cuts.pattern else [text]
        lines = re.findall(f"{_SPACE}|[^\n{_SPACE}]*\n|[^\n{_SPACE}]+", text)
        return [unit for line in lines for unit in ([line] if len(line) <= _UNIT else _split(line))]


class ByteLevelBPETokenizer(Tokenizer):
    """GPT-2's files. They know one special token, <|endoftext|>, which serves as bos and eos; pad,
    mask and sep are numbered after the last piece (50257 to 50259 for GPT-2) unless the vocabulary
    has them.

    ``special_ids`` (JSON) closes the vocabulary instead, for a model that was trained elsewhere and
    has no row for
    another token: {"bos": 50256, "eos": 50256, "pad": 50256, "prompt_bos": false}, with "mask" and
    "sep" if it has them."""

    kind = "byte-level BPE"

    def __init__(self, vocabulary: bytes, merges: bytes, special_ids: bytes | None = None):
        import tokenizers

        numbers, pairs, model = parse_byte_level(vocabulary, merges)
        if not is_whole(numbers):
            raise ValueError(
                "the vocabulary is damaged: it needs ids 0, 1, 2 ... and all 256 bytes"
            )
        pieces = sorted(numbers, key=numbers.get)
        alphabet = byte_alphabet()
        end = [END_OF_TEXT]
        files = {"vocab.json": vocabulary, "merges.txt": merges}
        if special_ids is None:
            roles = _find_roles(pieces, {"bos": [*end, "<s>"], "eos": [*end, "</s>"]})
            if not {"<bos>", *end, "<s>"} & numbers.keys():
                roles["bos"] = roles["eos"]
        else:
            files[_SPECIAL_IDS] = special_ids
            roles = self._read_roles(special_ids)
            if max(roles.values()) >= len(pieces):
                raise ValueError(
                    f"{_SPECIAL_IDS} names token {max(roles.values())}, and the vocabulary ends at "
                    f"{len(pieces) - 1}"
                )
        names = {index: pieces[index] for index in roles.values() if 0 <= index < len(pieces)}
        content = [
            b"" if index in names else b"".join(alphabet.get(c) or c.encode() for c in piece)
            for index, piece in enumerate(pieces)
        ]
        super().__init__(content, roles, names, [], files)

        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._merged = {numbers[left + right]: left + right for left, right in pairs}
        self._in_order = list(self._merged) == sorted(self._merged) and len(self._merged) == len(
            pairs
        )
        self._characters = 0

    def _encode(self, texts: list[str], threads: int) -> list[list[int]]:
        self._characters += sum(map(len, texts))
        if self._characters > _MANY_CHARACTERS and self._tiktoken:
            if threads > 1:
                return self._tiktoken.encode_ordinary_batch(texts, num_threads=threads)
            return [self._tiktoken.encode_ordinary(text) for text in texts]
        # "fast" leaves out offsets, which cost more than the ids; it starts threads as it sees fit.
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    @functools.cached_property
    def _tiktoken(self):
        """The same tokenizer several times as fast, or None where its ids could differ.

        tiktoken joins what spells a token, in the order of ids; `tokenizers` joins the pairs of the
        list, in its order. Where ids stand in the list's order and each token, encoded alone, is
        itself, the two are one: what lies between the ends of a token just before it is joined was
        made by earlier merges that crossed neither end, as in the token alone, so it is the pair of
        the list.
        """
        import tiktoken
        import tokenizers

        bare = tokenizers.Tokenizer(self._tokenizer.model)  # without cutting into words
        encoded = bare.encode_batch_fast(list(self._merged.values()))
        if not self._in_order or any(
            found.ids != [index] for found, index in zip(encoded, self._merged, strict=True)
        ):
            return None
        alphabet = byte_alphabet()
        numbers = json.loads(self._files["vocab.json"])
        ranks = {content: numbers[character] for character, content in alphabet.items()}
        ranks |= {
            b"".join(alphabet[c] for c in piece): index for index, piece in self._merged.items()
        }
        return tiktoken.Encoding(
            self.fingerprint, pat_str=_GPT2_WORDS, mergeable_ranks=ranks, special_tokens={}
        )


class HubTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face: its normalizer, pre-tokenizer, model, added tokens,
    decoder.

    Its ids are those of transformers without special tokens around the text. A text gives tokens
    that were added as words; one that was added as special only with ``parse_special``.
    ``special_ids`` (JSON) has the roles, as of `ByteLevelBPETokenizer`:
    `tokenizer_files.roles_of` and `closed_roles` make it.
    """

    kind = "tokenizer.json"

    def __init__(self, content: bytes, special_ids: bytes):
        """Raises ValueError where a token's text depends on the tokens around it, or an id comes
        twice."""
        roles = self._read_roles(special_ids)
        self._fast = parse_tokenizer(content)
        self._fast.encode_special_tokens = True  # as text
        numbers = self._fast.get_vocab(with_added_tokens=True)
        spelled = {index: piece for piece, index in numbers.items()}
        if len(spelled) < len(numbers):
            raise ValueError("the vocabulary is damaged: an id comes twice")
        whole = json.loads(content)
        pieces = pieces_of(whole, self._fast)
        self._prefixed = pieces.prefixed
        self._characters = 0
        names = self._special_pieces(roles, spelled)
        names |= {
            index: f"<unused {index}>"
            for index in range(len(pieces.content))
            if index not in spelled
        }
        for index in names:
            pieces.content[index] = b""
        unknown = _unknown_id(whole["model"], numbers)
        # One character that also stands for what is unknown is a character.
        if unknown is not None and unknown not in roles.values() and len(spelled[unknown]) > 1:
            names.setdefault(unknown, spelled[unknown])
            pieces.content[unknown] = b"\xef\xbf\xbd"
        files = {"tokenizer.json": content, _SPECIAL_IDS: special_ids}
        super().__init__(pieces.content, roles, names, pieces.parts, files)

    def _special_pieces(self, roles: dict[str, int], spelled: dict[int, str]) -> dict[int, str]:
        """The spellings of tokens that are no text, by id; sets where texts are cut to keep them
        so.
        """
        added = self._fast.get_added_tokens_decoder().items()
        names = {index: token.content for index, token in added if token.special}
        self._parsed = set(names)
        for index in spelled.keys() & roles.values() - names.keys():
            if index not in self._read([spelled[index]])[0]:
                names[index] = spelled[index]
        # What the model itself reads is cut after its first character; a single one stays text.
        read = {index for index, name in names.items() if index in self._read([name])[0]}
        names = {index: name for index, name in names.items() if index not in read or len(name) > 1}
        cuts = [
            f"(?<={re.escape(names[index][0])})(?={re.escape(names[index][1:])})"
            for index in read & names.keys()
        ]
        self._cuts = re.compile("|".join(cuts)) if cuts else None
        return names

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        text = super().decode(ids, skip_special)
        return text.removeprefix(" ") if self._prefixed else text

    def losses(self) -> list[str]:
        strips = [
            token.content
            for token in self._fast.get_added_tokens_decoder().values()
            if not token.special and (token.lstrip or token.rstrip)
        ]
        return super().losses() + [f"spaces around {name}" for name in strips[:1]]

    def _read(self, texts: list[str]) -> list[list[int]]:
        # "fast" leaves out offsets, which cost more than the ids; it starts threads as it sees fit.
        encoded = self._fast.encode_batch_fast(texts, add_special_tokens=False)
        return [found.ids for found in encoded]

    def _encode(self, texts: list[str], threads: int) -> list[list[int]]:
        self._characters += sum(map(len, texts))
        if self._characters > _MANY_CHARACTERS and self._gpt2 is not None:
            return self._gpt2.encode_batch(texts, threads)
        if self._cuts is None:
            return self._read(texts)
        return [list(chain.from_iterable(self._read(self._cuts.split(text)))) for text in texts]

    @functools.cached_property
    def _gpt2(self) -> ByteLevelBPETokenizer | None:
        """The faster tokenizer of the same ids where only special tokens tell this one from
        GPT-2's."""
        pair = (
            None if self._cuts is not None else gpt2_pair(json.loads(self._files["tokenizer.json"]))
        )
        if pair is None:
            return None
        found = ByteLevelBPETokenizer(*pair)
        found._characters = self._characters
        return found

    def _encode_special(self, text: str) -> list[int]:
        roles = {self.bos_id, self.eos_id, self.pad_id, self._mask_id, self.sep_id}
        others = {
            self.special_names[index]: index
            for index in roles & self.special_names.keys() - self._parsed
        }
        return self._split_at(text, others, self._read_special)

    def _read_special(self, text: str) -> list[int]:
        """As transformers reads a text, which may strip the spaces around a token that was added
        so.
        """
        self._fast.encode_special_tokens = False
        try:
            return self._read([text])[0]
        finally:
            self._fast.encode_special_tokens = True


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a folder (path or URL) or of a file.

    A folder is one that `Tokenizer.save` wrote, or holds Hugging Face's files (tokenizer.json; or
    vocab.json and merges.txt, or vocab.txt; with what tokenizer_config.json,
    special_tokens_map.json and added_tokens.json add to them), GPT-2's encoder.json and vocab.bpe,
    or a SentencePiece model. A file is a tokenizer.json or a SentencePiece model.

    Raises FileNotFoundError where there is none, ValueError where one is damaged or cannot be
    read the same here.
    """
    if not storage.is_remote(path) and not Path(path).exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a tokenizer's folder, a tokenizer.json "
            "or a SentencePiece .model"
        )
    try:
        if os.fspath(path).endswith(".json") and not Path(path).is_dir():
            return _load_json(path)
        if not storage.is_remote(path) and Path(path).is_file():
            return SentencePieceTokenizer(Path(path).read_bytes())
        return _load_folder(path)
    except (ValueError, KeyError) as error:
        raise ValueError(f"tokenizer {path}: {error}") from None


def _load_json(path: str | os.PathLike) -> Tokenizer:
    """A tokenizer.json, with the settings beside it if that is its name."""
    folder, name = os.path.split(os.fspath(path))
    if name != "tokenizer.json":
        content = storage.read_file(folder, name)
        whole = json.loads(content or b"{}")
        if not isinstance(whole, dict) or "model" not in whole:
            raise ValueError(
                "not a tokenizer.json, which has a 'model'; give the folder that holds it"
            )
        return _of_hub_files(read_tokenizer_files({"tokenizer.json": content}.get))
    return _of_hub_files(read_tokenizer_files(lambda name: storage.read_file(folder, name)))


def _load_folder(path: str | os.PathLike) -> Tokenizer:
    files = functools.cache(lambda name: storage.read_file(path, name))
    if meta := files(_META):
        return _load_saved(files, json.loads(meta))
    if files("tokenizer.json") is None:
        for name in SENTENCEPIECE_FILES:
            if model := files(name):
                return _of_sentencepiece(model, files)
    if pair := gpt2_files(files):
        return ByteLevelBPETokenizer(*pair)
    found = read_tokenizer_files(files)
    if found is None:
        raise FileNotFoundError(
            f"{path} holds no tokenizer: neither tokenizer.json, nor "
            "tokenizer.model, nor vocab.json and merges.txt, nor encoder.json "
            "and vocab.bpe, nor vocab.txt"
        )
    return _of_hub_files(found)


def _load_saved(files: Callable[[str], bytes | None], meta: dict) -> Tokenizer:
    """What `Tokenizer.save` wrote."""
    makers = {
        SentencePieceTokenizer.kind: (SentencePieceTokenizer, ("tokenizer.model",)),
        ByteLevelBPETokenizer.kind: (ByteLevelBPETokenizer, ("vocab.json", "merges.txt")),
        HubTokenizer.kind: (HubTokenizer, ("tokenizer.json",)),
    }
    if meta["kind"] not in makers:
        raise ValueError(
            f"{_META} names the kind {meta['kind']!r}; this version reads {', '.join(makers)}"
        )
    kind, names = makers[meta["kind"]]
    contents = [files(name) for name in names]
    if None in contents:
        raise ValueError(
            f"{' and '.join(names)} should lie beside {_META}; copy the whole folder again"
        )
    tokenizer = kind(*contents, files(_SPECIAL_IDS))
    tokenizer.prompt_bos = meta.get("prompt_bos", tokenizer.prompt_bos)
    if meta["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"its files do not have the fingerprint in {_META}; copy or make them again"
        )
    return tokenizer


def _of_hub_files(files: HubTokenizerFiles) -> Tokenizer:
    """A tokenizer for a model to be trained here."""
    if files.plain is not None:
        return ByteLevelBPETokenizer(*files.plain)
    return HubTokenizer(files.content, json.dumps(roles_of(files)).encode())


def _of_sentencepiece(model: bytes, files: Callable[[str], bytes | None]) -> SentencePieceTokenizer:
    """A SentencePiece model with the settings beside it: new roles are numbered after the tokens
    that they add.
    """
    tokenizer = SentencePieceTokenizer(model)
    size = tokenizer.pieces
    end = first_free_id(files, size)
    if end <= size:
        return tokenizer
    roles = {role: getattr(tokenizer, f"{role}_id") for role in ROLES}
    moved = {role: index + end - size for role, index in roles.items() if index >= size}
    special = json.dumps({**roles, **moved, "prompt_bos": True})
    return SentencePieceTokenizer(model, special.encode())


def _unknown_id(model: dict, numbers: dict[str, int]) -> int | None:
    """The id of the token for what a model of `tokenizers` has no token for."""
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return numbers.get(model.get("unk_token"))


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str = "bpe",
    seed: int = 0,
    max_train_bytes: int = 20_000_000,
    num_threads: int = 4,
) -> SentencePieceTokenizer:
    """Train SentencePiece, ``"bpe"`` or ``"unigram"``, with byte fallback and no normalisation.

    Of a larger corpus ``max_train_bytes`` (UTF-8) are drawn with ``seed``, evenly over the texts.
    The result depends on the texts, their order and the arguments; for unigram also on
    ``num_threads`` (its sums are rounded in another order), which is why the default is not the
    number of cores.

    Raises ValueError when ``vocab_size`` is more than the texts support, or less than their
    characters need.
    """
    from sentencepiece import SentencePieceTrainer

    if model_type not in ("bpe", "unigram"):
        raise ValueError(f"model_type={model_type!r} is not known; use 'bpe' or 'unigram'")
    sentences = _sample(chain.from_iterable(map(_sentences, texts)), max_train_bytes, seed)
    if not sentences:
        raise ValueError(
            "there is no text to train a tokenizer on; give a corpus that is not empty"
        )
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # With a space put before each text, a continuation would not be the text's own next
            # pieces.
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=4 * _UNIT,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece="<pad>",
            bos_piece="<bos>",
            eos_piece="<eos>",
            control_symbols=["<mask>", "<sep>"],
            user_defined_symbols=["\n", "\t"],
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        message = str(error)
        if most := re.search(r"too high.*<= (\d+)", message):
            raise ValueError(
                f"vocab_size={vocab_size} is more than this text supports; the largest possible "
                f"is {most[1]}: ask for that or less, or give more text"
            ) from None
        if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
            raise ValueError(
                f"vocab_size={vocab_size} is less than the characters of this text need; the "
                f"smallest possible is {least[1]}"
            ) from None
        raise ValueError(f"SentencePiece cannot train on this text ({message})") from None
    return SentencePieceTokenizer(model.getvalue())


def _sentences(text: str) -> Iterator[str]:
    """What SentencePiece learns from: lines, without the characters that it keeps for itself."""
    for line in re.split(f"[\n\t\0\u2047\u2585{_SPACE}]+", _valid(text)):
        if line:
            yield from _split(line)


def _split(line: str) -> Iterator[str]:
    """Parts of at most _UNIT characters, cut before a space if there is one: no piece reaches over
    that."""
    start = 0
    while len(line) - start > _UNIT:
        cut = line.rfind(" ", start + 1, start + _UNIT + 1)
        while cut > start and line[cut - 1] == " ":
            cut -= 1
        cut = cut if cut > start else start + _UNIT
        yield line[start:cut]
        start = cut
    yield line[start:]


def _sample(sentences: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """All sentences, or of too many those with the smallest random numbers, in their order."""
    rng = random.Random(seed)
    kept = []
    size = 0
    for number, sentence in enumerate(sentences):
        heapq.heappush(kept, (-rng.random(), number, sentence))
        size += len(sentence.encode())
        while size > max_bytes and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2].encode())
    return [sentence for _, _, sentence in sorted(kept, key=lambda item: item[1])]


def _find_roles(pieces: list[str], others: dict[str, list[str]]) -> dict[str, int]:
    """The ids of the five special tokens; those that a vocabulary lacks are numbered after its
    end."""
    numbers = {piece: index for index, piece in enumerate(pieces)}
    roles = {}
    end = len(pieces)
    for role in ROLES:
        spellings = [f"<{role}>", *others.get(role, []), f"[{role.upper()}]"]
        found = [numbers[spelling] for spelling in spellings if spelling in numbers]
        roles[role] = found[0] if found else end
        end += not found
    return roles


def _starts_word(piece: bytes) -> bool:
    first = piece.decode("utf-8", "ignore")[:1]
    if (
        not first
    ):  # part of a character: its first byte may begin one of three bytes or more, as of Chinese
        return piece[:1] >= b"\xe3"
    if piece[0] & 0xC0 == 0x80 or unicodedata.category(first).startswith("M"):
        return False
    return not first.isalnum() or bool(_UNSPACED.match(first))


def _valid(text: str) -> str:
    """Text that can be UTF-8: Python strings may hold lone surrogates."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
