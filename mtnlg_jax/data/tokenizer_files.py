"""The tokenizer files of a Hugging Face folder, read into one tokenizer.json and the roles of its
tokens.

``tokenizer.json`` counts where it is there, as transformers has it. Older folders get the one
that transformers makes of them: ``vocab.json`` and ``merges.txt`` (byte-level BPE), or
``vocab.txt`` (WordPiece as of BERT). On top come the tokens that ``tokenizer_config.json``,
``special_tokens_map.json`` and ``added_tokens.json`` add.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator

from mtnlg_jax.storage import first_line

ROLES = ("pad", "bos", "eos", "mask", "sep")
NO_TOKEN = -1  # the id of a role that a closed vocabulary does not have
END_OF_TEXT = "<|endoftext|>"
# Spellings of roles in vocabularies whose folder does not name them.
_SPELLINGS = {
    "pad": ("<pad>", "[PAD]"),
    "bos": ("<bos>", END_OF_TEXT, "<s>", "<|begin_of_text|>", "[BOS]", "[CLS]"),
    "eos": ("<eos>", END_OF_TEXT, "</s>", "<|end_of_text|>", "[EOS]", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
    "sep": ("<sep>", "[SEP]"),
}
# BERT's tokenizers begin a text with cls and end it with sep.
_SETTINGS = {"bos": ("bos_token", "cls_token"), "eos": ("eos_token", "sep_token")}
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
# Classes that read the older files as they are read here.
_BYTE_LEVEL = (
    "",
    "GPT2Tokenizer",
    "CodeGenTokenizer",
    "RobertaTokenizer",
    "BartTokenizer",
    "LongformerTokenizer",
    "PreTrainedTokenizer",
    "TokenizersBackend",
)
_WORD_PIECE = (
    "",
    "BertTokenizer",
    "DistilBertTokenizer",
    "ElectraTokenizer",
    "MobileBertTokenizer",
    "PreTrainedTokenizer",
    "TokenizersBackend",
)
# Classes whose ids are not those of their SentencePiece model.
_OFFSET = (
    "XLMRobertaTokenizer",
    "CamembertTokenizer",
    "BarthezTokenizer",
    "MBartTokenizer",
    "MBart50Tokenizer",
    "NllbTokenizer",
    "XGLMTokenizer",
    "M2M100Tokenizer",
    "PegasusTokenizer",
    "MarianTokenizer",
)
_WAY_OUT = (
    "load it with transformers' AutoTokenizer and write it with save_pretrained, which makes a "
    "tokenizer.json"
)


@dataclasses.dataclass(frozen=True)
class HubTokenizerFiles:
    """A folder's tokenizer. ``content``: its tokenizer.json, as bytes. ``settings``:
    tokenizer_config.json over special_tokens_map.json. ``plain``: vocab.json and merges.txt
    where all else is as in GPT-2's own tokenizer.
    """

    content: bytes
    settings: dict
    plain: tuple[bytes, bytes] | None

    def role(self, role: str) -> str | None:
        """The token that the settings name for a role; for bos and eos also BERT's cls and sep."""
        found = (
            token_name(self.settings.get(key)) for key in _SETTINGS.get(role, (f"{role}_token",))
        )
        return next(filter(None, found), None)


def read_tokenizer_files(read: Callable[[str], bytes | None]) -> HubTokenizerFiles | None:
    """The tokenizer of the folder whose files ``read`` gives by name (None: not there); None where
    none is there.

    Raises ValueError where a file is damaged or of a tokenizer that cannot be read the same
    here.
    """
    settings = read_object(read, "special_tokens_map.json") | read_object(
        read, "tokenizer_config.json"
    )
    kind = _class(settings, read)
    given = read("tokenizer.json")
    pair = _byte_level_files(read)
    words = read("vocab.txt")
    if given is not None:
        fast = parse_tokenizer(given)
    elif pair is not None:
        _refuse_class(kind, _BYTE_LEVEL, "vocab.json and merges.txt")
        fast = _byte_level(*pair)
        if END_OF_TEXT in parse_numbers(pair[0]):
            settings = {"unk_token": END_OF_TEXT} | settings
    elif words is not None:
        _refuse_class(kind, _WORD_PIECE, "vocab.txt")
        settings = {
            f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")
        } | settings
        fast = _word_piece(words, settings)
    else:
        return None
    before = fast.to_str()
    _set_prefix_space(fast, settings)
    _add_tokens(fast, _stated_tokens(read, settings), settings)
    after = fast.to_str()
    plain = _plain(json.loads(after), settings, pair)
    return HubTokenizerFiles(
        given if given is not None and after == before else after.encode(), settings, plain
    )


def first_free_id(read: Callable[[str], bytes | None], size: int) -> int:
    """The first id that is free behind a SentencePiece model of ``size`` pieces and the special
    tokens that the files beside it add. Raises ValueError where they change the ids of texts.
    """
    settings = read_object(read, "special_tokens_map.json") | read_object(
        read, "tokenizer_config.json"
    )
    kind = (settings.get("tokenizer_class") or "").removesuffix("Fast")
    if kind in _OFFSET:
        raise ValueError(
            f"the ids of a {kind} are not those of its SentencePiece model, and there is no "
            f"tokenizer.json; {_WAY_OUT}"
        )
    stated = _stated_tokens(read, settings)
    words = [token["content"] for token in stated if not token["special"] and token["id"] >= size]
    if words:
        raise ValueError(
            f"{', '.join(map(repr, words[:3]))} were added to this SentencePiece model, and "
            f"there is no tokenizer.json; {_WAY_OUT}"
        )
    return max([size, *(token["id"] + 1 for token in stated)])


def parse_tokenizer(content: bytes):
    """A `tokenizers.Tokenizer` of the bytes of a tokenizer.json, which never shortens or pads a
    text.
    """
    import tokenizers

    try:
        fast = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizer.json is not a tokenizer ({first_line(error)})") from None
    fast.no_truncation()
    fast.no_padding()
    return fast


def read_object(read: Callable[[str], bytes | None], name: str) -> dict:
    """The JSON object in file ``name``; empty where there is no such file."""
    content = read(name)
    if content is None:
        return {}
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON ({error}); copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{name} holds a {type(found).__name__} of JSON, not an object; copy it again"
        )
    return found


def token_name(value) -> str | None:
    """The spelling of a token that the settings give as a string or as an object."""
    return value.get("content") if isinstance(value, dict) else value or None


@functools.cache
def byte_alphabet() -> dict[str, bytes]:
    """GPT-2 writes bytes that are no visible Latin-1 character as those from U+0100 on, in
    order.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = [*map(chr, visible), *(chr(256 + number) for number in range(len(hidden)))]
    return {
        character: bytes([byte])
        for character, byte in zip(characters, visible + hidden, strict=True)
    }


def parse_numbers(vocabulary: bytes) -> dict[str, int]:
    """vocab.json: ids by piece."""
    try:
        numbers = json.loads(vocabulary)
    except ValueError as error:
        raise ValueError(f"vocab.json is not valid JSON ({error}); copy it again") from None
    if not isinstance(numbers, dict) or not all(type(index) is int for index in numbers.values()):
        raise ValueError("vocab.json is not an object of ids by piece; copy it again")
    return numbers


def parse_byte_level(vocabulary: bytes, merges: bytes):
    """(ids by piece, pairs to merge, model of `tokenizers`) of vocab.json and merges.txt.

    Raises ValueError where they are neither.
    """
    import tokenizers

    try:
        numbers = parse_numbers(vocabulary)
        pairs = [
            tuple(line.split(" "))
            for line in merges.decode().replace("\r\n", "\n").split("\n")
            if line.strip() and not line.startswith("#version")
        ]
        model = tokenizers.models.BPE(vocab=numbers, merges=pairs)
    except Exception as error:
        raise ValueError(
            f"not the vocabulary and merges of a byte-level BPE ({first_line(error)})"
        ) from None
    return numbers, pairs, model


def is_whole(numbers: dict[str, int]) -> bool:
    """Whether a vocabulary has the ids 0, 1, 2 ... and all 256 bytes, as GPT-2's has."""
    return (
        sorted(numbers.values()) == list(range(len(numbers)))
        and byte_alphabet().keys() <= numbers.keys()
    )


# --- roles ----------------------------------------------------------------------------------------


def roles_of(files: HubTokenizerFiles) -> dict:
    """The five roles of a model to be trained here, for special_ids.json: as the folder names
    them, else as they are usually spelled; those that are missing are numbered after the last id
    that is taken.
    """
    vocabulary = Vocabulary(files.content)
    roles = {}
    for role in ROLES:
        names = [files.role(role), *_SPELLINGS[role]]
        found = (vocabulary.numbers[name] for name in names if name in vocabulary.numbers)
        roles[role] = next((index for index in found if not vocabulary.is_text(index)), None)
    if roles["bos"] is None:
        roles["bos"] = roles["eos"]
    end = 1 + max(vocabulary.numbers.values())
    for role in ROLES:
        if roles[role] is None:
            roles[role] = end
            end += 1
    return roles | {"prompt_bos": True}


def closed_roles(files: HubTokenizerFiles, config: dict, generation: dict, rows: int) -> dict:
    """The roles of a model of ``rows`` tokens that was trained elsewhere, for special_ids.json:
    what it has no token for is NO_TOKEN (eos) or left out (mask). ``config`` and ``generation`` are
    config.json and generation_config.json.

    A token that ordinary text gives is no eos: a text would end at it. Raises ValueError where
    the tokenizer puts other tokens than bos before a text.
    """
    vocabulary = Vocabulary(files.content)
    numbers = vocabulary.numbers

    def find(role: str) -> int | None:
        for source in (generation, config):
            value = source.get(f"{role}_token_id")
            for index in value if isinstance(value, list) else [value]:
                if type(index) is int and index in vocabulary.pieces and index < rows:
                    if role != "eos" or not vocabulary.is_text(index):
                        return index
        found = (numbers.get(name, rows) for name in (files.role(role), *_SPELLINGS[role]))
        return next(
            (index for index in found if index < rows and not vocabulary.is_text(index)), None
        )

    prefix = vocabulary.prefix()
    if files.settings.get("add_bos_token") and not prefix:
        prefix = [numbers.get(files.role("bos"), NO_TOKEN)]
    eos = find("eos")
    bos = find("bos")
    if bos is None:
        bos = eos if eos is not None else vocabulary.beginning()
    if prefix not in ([], [bos]):
        raise ValueError(
            f"it puts the tokens {prefix} before each text; only bos ({bos}) can be put there"
        )
    roles = {"bos": bos, "eos": NO_TOKEN if eos is None else eos}
    pad = find("pad")
    roles["pad"] = pad if pad is not None else bos if eos is None else eos
    for role in ("mask", "sep"):
        if (index := find(role)) is not None:
            roles[role] = index
    return roles | {"prompt_bos": bool(prefix)}


class Vocabulary:
    """Ids and pieces of a tokenizer.json, and which of them text can give."""

    def __init__(self, content: bytes):
        self._fast = parse_tokenizer(content)
        self.numbers = self._fast.get_vocab(with_added_tokens=True)
        self.pieces = {index: piece for piece, index in self.numbers.items()}
        self._special = {
            index for index, token in self._fast.get_added_tokens_decoder().items() if token.special
        }
        self._fast.encode_special_tokens = True

    def is_text(self, index: int) -> bool:
        """Whether a text gives this token by its spelling, and cannot be kept from it by a cut
        inside.
        """
        piece = self.pieces[index]
        if index in self._special and len(piece) > 1:
            return False
        return index in self._fast.encode(piece, add_special_tokens=False).ids

    def beginning(self) -> int:
        """What stands before a text of a vocabulary without special tokens: a line end, or the
        first token.
        """
        ids = self._fast.encode("\n", add_special_tokens=False).ids
        return ids[0] if len(ids) == 1 else min(self.pieces)

    def prefix(self) -> list[int]:
        """The tokens that the post-processor puts before a text."""
        found = self._fast.encode("a")
        text = next(at for at, special in enumerate([*found.special_tokens_mask, 0]) if not special)
        return found.ids[:text]


def without_rows(content: bytes, rows: int) -> tuple[bytes, list[str]]:
    """(tokenizer.json without the special tokens from id ``rows`` on, their spellings).

    Raises ValueError where a text could give a token that lies there.
    """
    vocabulary = parse_tokenizer(content)
    outside = {
        index: token
        for index, token in vocabulary.get_added_tokens_decoder().items()
        if index >= rows
    }
    size = 1 + max(vocabulary.get_vocab(with_added_tokens=True).values())
    words = [token.content for token in outside.values() if not token.special]
    if words or max(vocabulary.get_vocab(with_added_tokens=False).values()) >= rows:
        named = f", and text gives {', '.join(map(repr, words[:3]))}" if words else ""
        raise ValueError(
            f"it has {size} tokens and the model vocab_size={rows}{named}; give --tokenizer=FOLDER "
            "of the one that it was trained with"
        )
    if not outside:
        return content, []
    whole = json.loads(content)
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < rows]
    return json.dumps(whole, ensure_ascii=False).encode(), [
        outside[index].content for index in sorted(outside)
    ]


# --- from tokens back to text ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pieces:
    """``content``: the bytes that each id adds to a text. ``parts``: ids of single bytes.
    ``prefixed``: the first piece of a text begins with a space that the text does not have.
    """

    content: list[bytes]
    parts: list[int]
    prefixed: bool


def pieces_of(whole: dict, fast) -> Pieces:
    """What the decoder of a tokenizer.json makes of each token, in the middle of a text; ``whole``
    is its object, ``fast`` its `tokenizers.Tokenizer`.

    Raises ValueError for a decoder whose text of a token depends on the tokens around it.
    Without a decoder, transformers writes a space between tokens; here it is the inverse of the
    pre-tokenizer.
    """
    numbers = fast.get_vocab(with_added_tokens=True)
    added = {index: token.content for index, token in fast.get_added_tokens_decoder().items()}
    steps = list(_flat(whole.get("decoder"), "decoders")) or [_inverse(whole, numbers)]
    made = [b""] * (1 + max(numbers.values()))
    with_bytes = any(step["type"] == "ByteFallback" for step in steps)
    parts = []
    for piece, index in numbers.items():
        if index in added:
            made[index] = added[index].encode()
            continue
        made[index] = _decode(piece, steps)
        if with_bytes and _BYTE.fullmatch(piece):
            parts.append(index)
    return Pieces(made, parts, any(_drops_first_space(steps, at) for at in range(len(steps))))


_BYTE = re.compile("<0x([0-9A-F]{2})>")
# What WordPiece's decoder takes back of the spaces that it put between tokens, in its order.
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


def _flat(part: dict | None, key: str) -> Iterator[dict]:
    """The steps of a decoder or pre-tokenizer, which may be a sequence of sequences."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
    for inner in part.get(key, []) if part["type"] == "Sequence" else []:
        yield from _flat(inner, key)


def _inverse(whole: dict, numbers: dict[str, int]) -> dict:
    """A decoder for a tokenizer without one."""
    found = {step["type"]: step for step in _flat(whole.get("pre_tokenizer"), "pretokenizers")}
    for kind in ("ByteLevel", "Metaspace"):
        if kind in found:
            return found[kind]
    prefix = whole["model"].get("continuing_subword_prefix")
    if prefix:
        return {"type": "WordPiece", "prefix": prefix, "cleanup": False}
    return {"type": "Fuse"} if " " in numbers else {"type": "Spaces"}


def _decode(piece: str, steps: list[dict]) -> bytes:
    text = piece
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            alphabet = byte_alphabet()
            return b"".join(alphabet.get(character) or character.encode() for character in text)
        if kind == "ByteFallback":
            if byte := _BYTE.fullmatch(text):
                return bytes([int(byte[1], 16)])
        elif kind == "Replace":
            pattern = step["pattern"]
            if "String" in pattern:
                text = text.replace(pattern["String"], step["content"])
            else:
                text = re.sub(pattern["Regex"], lambda _, step=step: step["content"], text)
        elif kind == "Metaspace":
            text = text.replace(step["replacement"], " ")
        elif kind == "WordPiece":
            text = text[len(step["prefix"]) :] if text.startswith(step["prefix"]) else " " + text
            for before, after in _CLEANUP if step.get("cleanup", True) else ():
                text = text.replace(before, after)
        elif kind == "Spaces":
            text = " " + text
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and not fused:
            for _ in range(step["start"]):
                text = text.removeprefix(step["content"])
            for _ in range(step["stop"]):
                text = text.removesuffix(step["content"])
        elif kind != "Strip" or step["stop"]:
            raise ValueError(
                f"its decoder {kind} makes a token's text depend on the tokens around it, "
                "and a text is shown while it is written; use a tokenizer with another decoder"
            )
    return text.encode()


def _drops_first_space(steps: list[dict], at: int) -> bool:
    step = steps[at]
    if step["type"] == "Metaspace":
        return (
            step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            != "never"
        )
    if step["type"] == "Strip":
        fused = any(before["type"] == "Fuse" for before in steps[:at])
        return fused and step["content"] == " " and step["start"] > 0
    return step["type"] in ("WordPiece", "Spaces")


# --- the older files ------------------------------------------------------------------------------


def gpt2_files(read: Callable[[str], bytes | None]) -> tuple[bytes, bytes] | None:
    """vocab.json and merges.txt of a folder that has nothing else to say of its tokenizer; None
    of another.
    """
    others = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    )
    pair = _byte_level_files(read)
    if pair is None or any(read(name) is not None for name in others):
        return None
    _refuse_class(_class({}, read), _BYTE_LEVEL, "vocab.json and merges.txt")
    return pair if is_whole(parse_numbers(pair[0])) else None


def _class(settings: dict, read: Callable[[str], bytes | None]) -> str:
    kind = (
        settings.get("tokenizer_class")
        or read_object(read, "config.json").get("tokenizer_class")
        or ""
    )
    return kind.removesuffix("Fast")


def _byte_level_files(read: Callable[[str], bytes | None]) -> tuple[bytes, bytes] | None:
    for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        files = [read(name) for name in names]
        if all(file is not None for file in files):
            return tuple(files)
    return None


def _refuse_class(kind: str, known: tuple[str, ...], files: str) -> None:
    if kind not in known:
        raise ValueError(
            f"{files} of a {kind} cannot be read the same here, and there is no tokenizer.json; "
            f"{_WAY_OUT}"
        )


def _byte_level(vocabulary: bytes, merges: bytes):
    import tokenizers

    fast = tokenizers.Tokenizer(parse_byte_level(vocabulary, merges)[2])
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    return fast


def _word_piece(words: bytes, settings: dict):
    import tokenizers

    try:
        lines = (
            words.decode().splitlines()
            if b"\r" in words
            else words.decode().removesuffix("\n").split("\n")
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"vocab.txt is not UTF-8 ({error}); copy it again") from None
    numbers = {line: index for index, line in enumerate(lines)}
    unknown = token_name(settings["unk_token"])
    if unknown not in numbers:
        raise ValueError(
            f"vocab.txt has no {unknown}, so words outside it have no token; name its unk_token in "
            "tokenizer_config.json"
        )
    fast = tokenizers.Tokenizer(tokenizers.models.WordPiece(numbers, unk_token=unknown))
    fast.normalizer = tokenizers.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    fast.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    fast.decoder = tokenizers.decoders.WordPiece(prefix="##")
    first, last = (token_name(settings[key]) for key in ("cls_token", "sep_token"))
    if first in numbers and last in numbers:
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A {last}",
            special_tokens=[(first, numbers[first]), (last, numbers[last])],
        )
    for key in ("sep_token", "pad_token", "cls_token", "mask_token"):
        if token_name(settings[key]) not in numbers:
            settings.pop(key)
    return fast


# --- tokens on top --------------------------------------------------------------------------------


def _stated_tokens(read: Callable[[str], bytes | None], settings: dict) -> list[dict]:
    """Tokens that files beside the vocabulary give ids to, in the order of ids."""
    stated = settings.get("added_tokens_decoder")
    if isinstance(stated, dict):
        tokens = [{"id": int(index), "special": False} | token for index, token in stated.items()]
    else:
        special = set(_special_names(settings))
        tokens = [
            {
                "id": index,
                "content": content,
                "special": content in special,
                "normalized": content not in special,
            }
            for content, index in read_object(read, "added_tokens.json").items()
        ]
    return sorted(tokens, key=lambda token: token["id"])


def _special_names(settings: dict) -> list[str]:
    names = [token_name(settings.get(key)) for key in _NAMED]
    for key in _EXTRA:
        extra = settings.get(key) or []
        names += map(token_name, extra.values() if isinstance(extra, dict) else extra)
    return list(dict.fromkeys(filter(None, names)))


def _add_tokens(fast, stated: list[dict], settings: dict) -> None:
    """Adds what is not there yet, as transformers does: tokens with stated ids, then the special
    ones.
    """
    from tokenizers import AddedToken

    there = {token.content for token in fast.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for token in stated:
        if token["content"] not in there:
            made = AddedToken(
                token["content"], **{flag: token[flag] for flag in flags if flag in token}
            )
            (fast.add_special_tokens if token["special"] else fast.add_tokens)([made])
        found = fast.token_to_id(token["content"])
        if found != token["id"]:
            raise ValueError(
                f"the added token {token['content']!r} has id {token['id']}, and transformers "
                f"reads it as {found}; number added tokens on from the last id of the vocabulary"
            )
    for name in _special_names(settings):
        if name not in {
            token.content for token in fast.get_added_tokens_decoder().values() if token.special
        }:
            fast.add_special_tokens([AddedToken(name, special=True, normalized=False)])


def _set_prefix_space(fast, settings: dict) -> None:
    """tokenizer_config.json's add_prefix_space counts for a byte-level pre-tokenizer."""
    import tokenizers

    wanted = settings.get("add_prefix_space")
    step = fast.pre_tokenizer
    if isinstance(wanted, bool) and isinstance(step, tokenizers.pre_tokenizers.ByteLevel):
        if step.add_prefix_space != wanted:
            step.add_prefix_space = wanted
            fast.pre_tokenizer = step


def _plain(
    whole: dict, settings: dict, pair: tuple[bytes, bytes] | None
) -> tuple[bytes, bytes] | None:
    """vocab.json and merges.txt where this tokenizer is GPT-2's but for them; None where
    anything else differs.
    """
    added = {token["content"] for token in whole.get("added_tokens", [])}
    if not added | set(_special_names(settings)) <= {END_OF_TEXT}:
        return None
    found = gpt2_pair(whole, pair)
    return found if not added or END_OF_TEXT in whole["model"]["vocab"] else None


def gpt2_pair(whole: dict, pair: tuple[bytes, bytes] | None = None) -> tuple[bytes, bytes] | None:
    """vocab.json and merges.txt (``pair`` where it says the same) of a tokenizer.json that reads
    text without special tokens as GPT-2's does, with this vocabulary; None of another.
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
    numbers = model.get("vocab")
    if (
        model.get("type", "BPE") != "BPE"
        or "merges" not in model
        or any(model.get(key) for key in off)
        or whole.get("normalizer") is not None
        or (whole.get("decoder") or {"type": "ByteLevel"})["type"] != "ByteLevel"
        or step.get("type") != "ByteLevel"
        or step.get("add_prefix_space")
        or not step.get("use_regex", True)
        or not is_whole(numbers)
        or not all(token["special"] for token in whole.get("added_tokens", []))
    ):
        return None
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in model["merges"]
    ]
    if pair is not None and parse_byte_level(*pair)[:2] == (numbers, merges):
        return pair
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    return json.dumps(numbers, ensure_ascii=False).encode(), "\n".join(lines).encode()
