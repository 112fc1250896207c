"""The tokenizer files of a Hugging Face folder, read into one tokenizer.json.

``tokenizer.json`` counts if it is there, as in transformers. Older folders get the one that
transformers makes of them: from ``vocab.json`` and ``merges.txt`` (byte-level BPE), or from
``vocab.txt`` (WordPiece as in BERT). The tokens that ``tokenizer_config.json``,
``special_tokens_map.json`` and ``added_tokens.json`` add are put on top.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from mtnlg_jax.data.tokenizer.base import COMPANIONS
from mtnlg_jax.data.tokenizer.byte_level import (
    END_OF_TEXT,
    gpt2_pair,
    is_complete,
    parse_byte_level,
    parse_vocabulary,
)
from mtnlg_jax.storage import first_line

if TYPE_CHECKING:
    import tokenizers

Read = Callable[[str], bytes | None]  # the content of a file by name, or None if there is no file

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
    """The tokenizer of a folder.

    ``content``: its tokenizer.json, as bytes. ``fast``: what `parse_tokenizer` makes of it, since
    a large one takes seconds. ``settings``: tokenizer_config.json merged over
    special_tokens_map.json. ``plain``: vocab.json and merges.txt, if everything else equals GPT-2's
    own tokenizer. ``ends``: the eos tokens of generation_config.json.
    """

    content: bytes
    fast: "tokenizers.Tokenizer"
    settings: dict
    plain: tuple[bytes, bytes] | None
    ends: tuple[int, ...] = ()

    def role(self, role: str) -> str | None:
        """Return the token that the settings name for a role; for bos and eos also BERT's cls and
        sep."""
        keys = _SETTINGS.get(role, (f"{role}_token",))
        found = (token_name(self.settings.get(key)) for key in keys)
        return next(filter(None, found), None)


def read_tokenizer_files(read: Read) -> HubTokenizerFiles | None:
    """Return the tokenizer of the folder whose files ``read`` returns by name; None if it has none.

    Raises ValueError if a file is damaged or belongs to a tokenizer that cannot be reproduced here.
    """
    settings = _read_settings(read)
    kind = _class_name(settings, read)
    given = read("tokenizer.json")
    pair = _byte_level_files(read)
    words = read("vocab.txt")
    if given is not None:
        fast = parse_tokenizer(given)
    elif pair is not None:
        _refuse_class(kind, _BYTE_LEVEL, "vocab.json and merges.txt")
        fast = _byte_level(*pair)
        if END_OF_TEXT in parse_vocabulary(pair[0]):
            settings = {"unk_token": END_OF_TEXT} | settings
    elif words is not None:
        _refuse_class(kind, _WORD_PIECE, "vocab.txt")
        by_default = {
            f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")
        }
        settings = by_default | settings
        fast = _word_piece(words, settings)
    else:
        return None
    touched = _set_prefix_space(fast, settings)
    touched |= _add_tokens(fast, _stated_tokens(read, settings), settings)
    plain = _plain(fast, settings, pair)
    if given is not None and (not touched or fast.to_str() == parse_tokenizer(given).to_str()):
        content = given
    else:
        content = fast.to_str().encode()
        fast = parse_tokenizer(content)
    return HubTokenizerFiles(content, fast, settings, plain, _ends(read))


def companions_of(read: Read) -> dict[str, bytes]:
    """Return the `COMPANIONS` that a folder has, by name."""
    found = ((name, read(name)) for name in COMPANIONS)
    return {name: content for name, content in found if content is not None}


def _ends(read: Read) -> tuple[int, ...]:
    """Return the eos tokens that generation_config.json names."""
    return eos_of(_read_object(read, "generation_config.json"))


def eos_of(settings: dict) -> tuple[int, ...]:
    """Return ``eos_token_id`` of settings, which may be one id, a list of ids or missing."""
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return tuple(index for index in ids if type(index) is int)


def first_free_id(read: Read, size: int) -> int:
    """Return the first id after a SentencePiece model and the special tokens added beside it.

    ``size`` is the number of pieces of the model. Raises ValueError if the files beside it change
    the ids of texts.
    """
    settings = _read_settings(read)
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


def gpt2_files(read: Read) -> tuple[bytes, bytes] | None:
    """Return vocab.json and merges.txt of a folder without any other tokenizer file, else None."""
    others = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    )
    pair = _byte_level_files(read)
    if pair is None or any(read(name) is not None for name in others):
        return None
    _refuse_class(_class_name({}, read), _BYTE_LEVEL, "vocab.json and merges.txt")
    return pair if is_complete(parse_vocabulary(pair[0])) else None


def parse_tokenizer(content: bytes) -> "tokenizers.Tokenizer":
    """Return the tokenizer of a tokenizer.json; it never shortens or pads a text."""
    import tokenizers

    try:
        fast = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"tokenizer.json is not a tokenizer ({first_line(error)}); copy it again"
        ) from None
    fast.no_truncation()
    fast.no_padding()
    return fast


def _read_settings(read: Read) -> dict:
    special = _read_object(read, "special_tokens_map.json")
    return special | _read_object(read, "tokenizer_config.json")


def _read_object(read: Read, name: str) -> dict:
    """Return the JSON object in file ``name``; {} if there is no such file."""
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


def token_name(value: str | dict | None) -> str | None:
    """Return the spelling of a token, which the settings give as a string or as an object."""
    return value.get("content") if isinstance(value, dict) else value or None


# --- the older files ------------------------------------------------------------------------------


def _class_name(settings: dict, read: Read) -> str:
    """Return the tokenizer class that the folder names, without "Fast"; "" if it names none."""
    kind = settings.get("tokenizer_class")
    kind = kind or _read_object(read, "config.json").get("tokenizer_class") or ""
    return kind.removesuffix("Fast")


def _byte_level_files(read: Read) -> tuple[bytes, bytes] | None:
    for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        vocabulary, merges = map(read, names)
        if vocabulary is not None and merges is not None:
            return vocabulary, merges
    return None


def _refuse_class(kind: str, known: tuple[str, ...], files: str) -> None:
    if kind not in known:
        raise ValueError(
            f"{files} of a {kind} cannot be reproduced here, and there is no tokenizer.json; "
            f"{_WAY_OUT}"
        )


def _byte_level(vocabulary: bytes, merges: bytes) -> "tokenizers.Tokenizer":
    import tokenizers

    fast = tokenizers.Tokenizer(parse_byte_level(vocabulary, merges)[2])
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    return fast


def _word_piece(words: bytes, settings: dict) -> "tokenizers.Tokenizer":
    """Return BERT's tokenizer of a vocab.txt; removes missing special tokens from ``settings``."""
    import tokenizers

    try:
        text = words.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"vocab.txt is not UTF-8 ({error}); copy it again") from None
    lines = text.splitlines() if "\r" in text else text.removesuffix("\n").split("\n")
    ids = {line: index for index, line in enumerate(lines)}
    unknown = token_name(settings["unk_token"])
    if unknown not in ids:
        raise ValueError(
            f"vocab.txt has no {unknown}, so words outside it have no token; name its unk_token in "
            "tokenizer_config.json"
        )
    fast = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token=unknown))
    fast.normalizer = tokenizers.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    fast.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    fast.decoder = tokenizers.decoders.WordPiece(prefix="##")
    first = token_name(settings["cls_token"])
    last = token_name(settings["sep_token"])
    if first in ids and last in ids:
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A {last}",
            special_tokens=[(first, ids[first]), (last, ids[last])],
        )
    for key in ("sep_token", "pad_token", "cls_token", "mask_token"):
        if token_name(settings[key]) not in ids:
            settings.pop(key)
    return fast


# --- added tokens ---------------------------------------------------------------------------------


def _stated_tokens(read: Read, settings: dict) -> list[dict]:
    """Return tokens to which files beside the vocabulary give ids, in the order of ids."""
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
            for content, index in _read_object(read, "added_tokens.json").items()
        ]
    return sorted(tokens, key=lambda token: token["id"])


def _special_names(settings: dict) -> list[str]:
    names = [token_name(settings.get(key)) for key in _NAMED]
    for key in _EXTRA:
        extra = settings.get(key) or []
        names += map(token_name, extra.values() if isinstance(extra, dict) else extra)
    return list(dict.fromkeys(filter(None, names)))


def _add_tokens(fast: "tokenizers.Tokenizer", stated: list[dict], settings: dict) -> bool:
    """Add missing tokens as transformers does: those with stated ids, then the special ones.

    Returns whether any were missing.
    """
    from tokenizers import AddedToken

    present = {token.content for token in fast.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    touched = False
    for token in stated:
        if token["content"] not in present:
            given = {flag: token[flag] for flag in flags if flag in token}
            add = fast.add_special_tokens if token["special"] else fast.add_tokens
            add([AddedToken(token["content"], **given)])
            touched = True
        found = fast.token_to_id(token["content"])
        if found != token["id"]:
            raise ValueError(
                f"the added token {token['content']!r} has id {token['id']}, and transformers "
                f"reads it as {found}; number added tokens on from the last id of the vocabulary"
            )
    for name in _special_names(settings):
        added = fast.get_added_tokens_decoder().values()
        if not any(token.special and token.content == name for token in added):
            fast.add_special_tokens([AddedToken(name, special=True, normalized=False)])
            touched = True
    return touched


def _set_prefix_space(fast: "tokenizers.Tokenizer", settings: dict) -> bool:
    """Apply add_prefix_space of tokenizer_config.json to a byte-level pre-tokenizer.

    Returns whether it differed.
    """
    import tokenizers

    add_prefix_space = settings.get("add_prefix_space")
    step = fast.pre_tokenizer
    if not isinstance(step, tokenizers.pre_tokenizers.ByteLevel):
        return False
    if not isinstance(add_prefix_space, bool) or step.add_prefix_space == add_prefix_space:
        return False
    step.add_prefix_space = add_prefix_space
    fast.pre_tokenizer = step
    return True


def _plain(
    fast: "tokenizers.Tokenizer", settings: dict, pair: tuple[bytes, bytes] | None
) -> tuple[bytes, bytes] | None:
    """Return vocab.json and merges.txt if only they distinguish this tokenizer from GPT-2's."""
    added = {token.content for token in fast.get_added_tokens_decoder().values()}
    if not added | set(_special_names(settings)) <= {END_OF_TEXT}:
        return None
    whole = json.loads(fast.to_str())
    found = gpt2_pair(whole, pair)
    return found if not added or END_OF_TEXT in whole["model"]["vocab"] else None
