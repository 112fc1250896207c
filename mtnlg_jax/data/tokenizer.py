"""Tokenizers: SentencePiece (trained here or brought) and the byte-level BPE of GPT-2's files.

Our own models and GPT-2's are lossless: every text comes back unchanged. A text never becomes a special token
by spelling its name. Pieces are bytes, put one after another, so a text can be decoded while it is generated.
"""

import functools
import hashlib
import heapq
import io
import json
import os
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from mtnlg_jax.data import storage

_SPACE = "\u2581"  # how SentencePiece writes a space; texts may hold it themselves
_UNIT = 1024  # characters handed to SentencePiece at once, at most 4 KB; its BPE slows down on long texts
_META = "tokenizer_meta.json"
_SPECIAL_IDS = "special_ids.json"
# Of GPT-2's encoder.py (Radford 2019); possessive, since what they take is never given back.
_GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_MANY_CHARACTERS = 1 << 17  # from here on a faster encoder pays for half a second of making it
_ROLES = ("pad", "bos", "eos", "mask", "sep")
# Scripts that put no space between words: each piece that begins with one of their characters is a word.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3040-\u30ff\u31f0-\u31ff"
                       "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


class Tokenizer:
    """What every tokenizer can do; `SentencePieceTokenizer` and `ByteLevelBPETokenizer` say how.

    ``pad_id bos_id eos_id mask_id sep_id``; ``vocab_size``, what a model must hold before any padding of its
    own; ``starts_word`` and ``is_special``, boolean arrays of that length: the piece begins a word (with a
    space, a punctuation mark or a character of an unspaced script), the piece is no text. ``fingerprint`` is
    a sha256 over the content: equal fingerprints mean equal ids. ``special_names``: special tokens, id to spelling.
    ``prompt_bos``: a text to continue stands behind bos, as documents did in training.
    """

    kind: str
    prompt_bos = True

    def __init__(self, pieces: list[bytes], roles: dict[str, int], names: dict[int, str],
                 continues: Iterable[int], files: dict[str, bytes]):
        """``names``: the special tokens; ``continues``: pieces that begin no word whatever they look like."""
        self.pad_id, self.bos_id, self.eos_id, self.sep_id = (roles[role] for role in ("pad", "bos", "eos", "sep"))
        self._mask_id = roles.get("mask")
        self.vocab_size = max(len(pieces), 1 + max(roles.values()))
        self.special_names = {index: f"<{role}>" for role, index in roles.items()} | names
        self._bytes = pieces + [b""] * (self.vocab_size - len(pieces))
        self.is_special = np.zeros(self.vocab_size, bool)
        self.is_special[list(self.special_names)] = True
        self.starts_word = np.array([_starts_word(piece) for piece in self._bytes]) & ~self.is_special
        self.starts_word[list(continues)] = False
        self._files = files
        digest = hashlib.sha256(self.kind.encode())
        for name in sorted(files):
            digest.update(hashlib.sha256(files[name]).digest())
        self.fingerprint = digest.hexdigest()

    @property
    def mask_id(self) -> int:
        """Raises ValueError where the vocabulary is closed and has none."""
        if self._mask_id is None:
            raise ValueError("this tokenizer has no mask token, so its model neither learns masked text nor fills "
                             "masks; take a tokenizer of launch/prepare_data.py for that")
        return self._mask_id

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """The ids of several texts; the number of threads never changes them."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8, as of a character cut in two, become U+FFFD."""
        parts = []
        for index in map(int, ids):
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"token {index} is unknown; this vocabulary ends at {self.vocab_size - 1}")
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
    """A SentencePiece model. One from elsewhere keeps its own normalisation, so it may not be lossless, and
    its own special pieces; those that it lacks are numbered after its last piece."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        from sentencepiece import SentencePieceProcessor

        try:
            sp = SentencePieceProcessor(model_proto=model)
        except Exception:  # its message names a line of C++
            raise ValueError("not a SentencePiece model, or a damaged one") from None
        pieces = [sp.id_to_piece(index) for index in range(sp.vocab_size())]
        roles = _find_roles(pieces, {"bos": ["<s>"], "eos": ["</s>"]})
        names = {index: piece for index, piece in enumerate(pieces)
                 if sp.is_control(index) or sp.is_unused(index) or sp.is_unknown(index)
                 or index in roles.values()}
        content = [piece.replace(_SPACE, " ").encode() for piece in pieces]
        byte_ids = [index for index in range(len(pieces)) if sp.is_byte(index)]
        for index in byte_ids:
            content[index] = bytes([int(pieces[index][1:-1], 16)])  # spelled <0x41>
        for index in names:
            content[index] = b"\xef\xbf\xbd" if sp.is_unknown(index) else b""
        super().__init__(content, roles, names, byte_ids, {"tokenizer.model": model})

        self._sp = sp
        # Models of others may put a space before each text: decoding drops it, and nothing may be cut up.
        self._prefixed = sp.encode("a", out_type=str)[0].startswith(_SPACE)
        self.lossless = not self._prefixed and sp.encode("\n\n\t", out_type=str) == ["\n", "\n", "\t"]
        self._space_ids = [byte_ids[byte] for byte in _SPACE.encode()] if len(byte_ids) == 256 else []
        # A special that this model would find inside a text is cut after its first character.
        found = [pieces[index] for index in roles.values()
                 if index < len(pieces) and index in sp.encode(pieces[index])]
        self._cuts = re.compile("|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})"
                                         for name in found))

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        units = [self._units(_valid(text)) for text in texts]
        encoded = iter(self._sp.encode(list(chain.from_iterable(units)), num_threads=threads))
        return [list(chain.from_iterable(self._space_ids if unit == _SPACE and self.lossless else next_ids
                                         for unit, next_ids in zip(part, encoded, strict=False)))
                for part in units]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        text = super().decode(ids, skip_special)
        return text.removeprefix(" ") if self._prefixed else text

    def _units(self, text: str) -> list[str]:
        """The parts to encode one by one; of a model of ours, at places over which no piece reaches."""
        if not self.lossless:
            return self._cuts.split(text) if self._cuts.pattern else [text]
        lines = re.findall(f"{_SPACE}|[^\n{_SPACE}]*\n|[^\n{_SPACE}]+", text)
        return [unit for line in lines for unit in ([line] if len(line) <= _UNIT else _split(line))]


class ByteLevelBPETokenizer(Tokenizer):
    """GPT-2's files. They know one special token, <|endoftext|>, which serves as bos and eos; pad, mask and
    sep are numbered after the last piece (50257 to 50259 for GPT-2) unless the vocabulary has them.

    ``special_ids`` (JSON) closes the vocabulary instead, for a model that was trained elsewhere and has no row for
    another token: {"bos": 50256, "eos": 50256, "pad": 50256, "prompt_bos": false}, with "mask" and "sep" if it has
    them."""

    kind = "byte-level BPE"

    def __init__(self, vocabulary: bytes, merges: bytes, special_ids: bytes | None = None):
        import tokenizers

        try:
            numbers = json.loads(vocabulary)
            pairs = [tuple(line.split(" ")) for line in merges.decode().split("\n")
                     if line.strip() and not line.startswith("#version")]
            model = tokenizers.models.BPE(vocab=numbers, merges=pairs)
        except Exception as error:
            reason = storage.first_line(error)
            raise ValueError(f"not the vocabulary and merges of a byte-level BPE ({reason})") from None
        pieces, alphabet = sorted(numbers, key=numbers.get), _byte_alphabet()
        ordered = [numbers[piece] for piece in pieces] == list(range(len(pieces)))
        if not ordered or not alphabet.keys() <= numbers.keys():
            raise ValueError("the vocabulary is damaged: it needs ids 0, 1, 2 ... and all 256 bytes")
        end = ["<|endoftext|>"]
        files = {"vocab.json": vocabulary, "merges.txt": merges}
        if special_ids is None:
            roles = _find_roles(pieces, {"bos": [*end, "<s>"], "eos": [*end, "</s>"]})
            if not {"<bos>", *end, "<s>"} & numbers.keys():
                roles["bos"] = roles["eos"]
        else:
            files[_SPECIAL_IDS] = special_ids
            roles = json.loads(special_ids)
            self.prompt_bos = roles.pop("prompt_bos")
            roles = {"sep": roles["eos"]} | roles
            if max(roles.values()) >= len(pieces):
                raise ValueError(f"{_SPECIAL_IDS} names token {max(roles.values())}, and the vocabulary ends at "
                                 f"{len(pieces) - 1}")
        names = {index: pieces[index] for index in roles.values() if index < len(pieces)}
        content = [b"" if index in names else b"".join(alphabet.get(c) or c.encode() for c in piece)
                   for index, piece in enumerate(pieces)]
        super().__init__(content, roles, names, [], files)

        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._merged = {numbers[left + right]: left + right for left, right in pairs}
        self._in_order = list(self._merged) == sorted(self._merged) and len(self._merged) == len(pairs)
        self._characters = 0

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        texts = [_valid(text) for text in texts]
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

        tiktoken joins what spells a token, in the order of ids; `tokenizers` joins the pairs of the list, in its order.
        Where ids stand in the list's order and each token, encoded alone, is itself, the two are one: what lies
        between the ends of a token just before it is joined was made by earlier merges that crossed neither end, as
        in the token alone, so it is the pair of the list.
        """
        import tiktoken
        import tokenizers

        bare = tokenizers.Tokenizer(self._tokenizer.model)  # without cutting into words
        encoded = bare.encode_batch_fast(list(self._merged.values()))
        if not self._in_order or any(found.ids != [index] for found, index in zip(encoded, self._merged, strict=True)):
            return None
        alphabet, numbers = _byte_alphabet(), json.loads(self._files["vocab.json"])
        ranks = {content: numbers[character] for character, content in alphabet.items()}
        ranks |= {b"".join(alphabet[c] for c in piece): index for index, piece in self._merged.items()}
        return tiktoken.Encoding(self.fingerprint, pat_str=_GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a folder (path or URL) that `Tokenizer.save` wrote, of a SentencePiece .model file, or
    of a folder with GPT-2's encoder.json and vocab.bpe, or vocab.json and merges.txt.

    Raises FileNotFoundError where there is none, ValueError where one is damaged.
    """
    if not storage.is_remote(path) and not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist; give a tokenizer's folder or a SentencePiece .model")
    try:
        if not storage.is_remote(path) and Path(path).is_file():
            return SentencePieceTokenizer(Path(path).read_bytes())
        tokenizer = _load_folder(path)
        if meta := storage.read_file(path, _META):
            meta = json.loads(meta)
            tokenizer.prompt_bos = meta.get("prompt_bos", tokenizer.prompt_bos)
            if meta["fingerprint"] != tokenizer.fingerprint:
                raise ValueError(f"its files do not have the fingerprint in {_META}; copy or make them anew")
    except (ValueError, KeyError) as error:
        raise ValueError(f"tokenizer {path}: {error}") from None
    return tokenizer


def _load_folder(path: str | os.PathLike) -> Tokenizer:
    for name in ("tokenizer.model", "spiece.model"):
        if model := storage.read_file(path, name):
            return SentencePieceTokenizer(model)
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        files = storage.read_file(path, vocabulary), storage.read_file(path, merges)
        if all(files):
            return ByteLevelBPETokenizer(*files, storage.read_file(path, _SPECIAL_IDS))
    raise FileNotFoundError(f"{path} holds no tokenizer: neither tokenizer.model, nor vocab.json and "
                            "merges.txt, nor encoder.json and vocab.bpe")


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_type: str = "bpe", seed: int = 0,
                    max_train_bytes: int = 20_000_000, num_threads: int = 4) -> SentencePieceTokenizer:
    """Train SentencePiece, ``"bpe"`` or ``"unigram"``, with byte fallback and no normalisation.

    Of a larger corpus ``max_train_bytes`` (UTF-8) are drawn with ``seed``, evenly over the texts. The result
    depends on the texts, their order and the arguments; for unigram also on ``num_threads`` (its sums are
    rounded in another order), which is why the default is not the number of cores.

    Raises ValueError when ``vocab_size`` is more than the texts support, or less than their characters need.
    """
    from sentencepiece import SentencePieceTrainer

    if model_type not in ("bpe", "unigram"):
        raise ValueError(f"model_type={model_type!r} is not known; use 'bpe' or 'unigram'")
    sentences = _sample(chain.from_iterable(map(_sentences, texts)), max_train_bytes, seed)
    if not sentences:
        raise ValueError("there is no text to train a tokenizer on; give a corpus that is not empty")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, model_type=model_type,
            vocab_size=vocab_size, byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # With a space put before each text, a continuation would not be the text's own next pieces.
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True, character_coverage=0.9995, max_sentence_length=4 * _UNIT,
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, pad_piece="<pad>", bos_piece="<bos>", eos_piece="<eos>",
            control_symbols=["<mask>", "<sep>"], user_defined_symbols=["\n", "\t"],
            num_threads=num_threads, minloglevel=2)
    except RuntimeError as error:
        message = str(error)
        if most := re.search(r"too high.*<= (\d+)", message):
            raise ValueError(f"vocab_size={vocab_size} is more than this text supports; the largest possible "
                             f"is {most[1]}: ask for that or less, or give more text") from None
        if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
            raise ValueError(f"vocab_size={vocab_size} is less than the characters of this text need; the "
                             f"smallest possible is {least[1]}") from None
        raise ValueError(f"SentencePiece cannot train on this text ({message})") from None
    return SentencePieceTokenizer(model.getvalue())


def _sentences(text: str) -> Iterator[str]:
    """What SentencePiece learns from: lines, without the characters that it keeps for itself."""
    for line in re.split(f"[\n\t\0\u2047\u2585{_SPACE}]+", _valid(text)):
        if line:
            yield from _split(line)


def _split(line: str) -> Iterator[str]:
    """Parts of at most _UNIT characters, cut before a space if there is one: no piece reaches over that."""
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
    rng, kept, size = random.Random(seed), [], 0
    for number, sentence in enumerate(sentences):
        heapq.heappush(kept, (-rng.random(), number, sentence))
        size += len(sentence.encode())
        while size > max_bytes and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2].encode())
    return [sentence for _, _, sentence in sorted(kept, key=lambda item: item[1])]


def _find_roles(pieces: list[str], others: dict[str, list[str]]) -> dict[str, int]:
    """The ids of the five special tokens; those that a vocabulary lacks are numbered after its end."""
    numbers = {piece: index for index, piece in enumerate(pieces)}
    roles, end = {}, len(pieces)
    for role in _ROLES:
        spellings = [f"<{role}>", *others.get(role, []), f"[{role.upper()}]"]
        found = [numbers[spelling] for spelling in spellings if spelling in numbers]
        roles[role] = found[0] if found else end
        end += not found
    return roles


def _starts_word(piece: bytes) -> bool:
    first = piece.decode("utf-8", "ignore")[:1]
    if not first:  # part of a character: its first byte may begin one of three bytes or more, as of Chinese
        return piece[:1] >= b"\xe3"
    if piece[0] & 0xC0 == 0x80 or unicodedata.category(first).startswith("M"):
        return False
    return not first.isalnum() or bool(_UNSPACED.match(first))


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2 writes bytes that are no visible Latin-1 character as those from U+0100 on, in order."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = [*map(chr, visible), *(chr(256 + number) for number in range(len(hidden)))]
    return {character: bytes([byte]) for character, byte in zip(characters, visible + hidden, strict=True)}


def _valid(text: str) -> str:
    """Text that can be UTF-8: Python strings may hold lone surrogates."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
