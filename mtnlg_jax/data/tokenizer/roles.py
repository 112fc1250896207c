"""Which tokens of a tokenizer.json are pad, bos, eos, mask and sep."""

import dataclasses
import json
from typing import TYPE_CHECKING

from mtnlg_jax.data.tokenizer.base import NO_TOKEN, ROLES
from mtnlg_jax.data.tokenizer.byte_level import END_OF_TEXT
from mtnlg_jax.data.tokenizer.files import HubTokenizerFiles, eos_of, parse_tokenizer

if TYPE_CHECKING:
    import tokenizers

# Spellings of roles in vocabularies whose folder does not name them.
_SPELLINGS = {
    "pad": ("<pad>", "[PAD]"),
    "bos": ("<bos>", END_OF_TEXT, "<s>", "<|begin_of_text|>", "[BOS]", "[CLS]"),
    "eos": ("<eos>", END_OF_TEXT, "</s>", "<|end_of_text|>", "[EOS]", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
    "sep": ("<sep>", "[SEP]"),
}


def open_roles(files: HubTokenizerFiles) -> dict:
    """Return special_ids.json for a model to be trained here.

    Roles are as the folder names them, else as they are usually spelled. Missing ones are numbered
    after the last id in use.
    """
    vocabulary = Vocabulary(files.fast)
    roles: dict[str, int | None] = {}
    for role in ROLES:
        names = [files.role(role), *_SPELLINGS[role]]
        found = (vocabulary.ids[name] for name in names if name in vocabulary.ids)
        roles[role] = next((index for index in found if not vocabulary.is_text(index)), None)
    if roles["bos"] is None:
        roles["bos"] = roles["eos"]
    end = 1 + max(vocabulary.ids.values())
    for role in ROLES:
        if roles[role] is None:
            roles[role] = end
            end += 1
    eos = roles["eos"]
    more = [index for index in files.ends if vocabulary.can_end(index)]
    return roles | _several([eos, *more]) | {"prompt_bos": True}


def closed_roles(files: HubTokenizerFiles, config: dict, generation: dict, rows: int) -> dict:
    """Return special_ids.json for a model of ``rows`` tokens that was trained elsewhere.

    A role without a token is NO_TOKEN (eos) or left out (mask). ``config`` and ``generation`` are
    config.json and generation_config.json.

    A token that ordinary text yields is never eos, because a text would end at it. Raises
    ValueError if the tokenizer puts tokens other than bos before a text.
    """
    vocabulary = Vocabulary(files.fast)
    ids = vocabulary.ids

    def find(role: str) -> int | None:
        for source in (generation, config):
            value = source.get(f"{role}_token_id")
            for index in value if isinstance(value, list) else [value]:
                if type(index) is not int or index not in vocabulary.pieces or index >= rows:
                    continue
                if role != "eos" or not vocabulary.is_text(index):
                    return index
        names = filter(None, (files.role(role), *_SPELLINGS[role]))
        found = (ids.get(name, rows) for name in names)
        return next(
            (index for index in found if index < rows and not vocabulary.is_text(index)), None
        )

    prefix = vocabulary.prefix()
    if files.settings.get("add_bos_token") and not prefix:
        named = files.role("bos")
        prefix = [NO_TOKEN if named is None else ids.get(named, NO_TOKEN)]
    eos = find("eos")
    bos = find("bos")
    if bos is None:
        bos = eos if eos is not None else vocabulary.first_token()
    if prefix not in ([], [bos]):
        raise ValueError(
            f"it puts the tokens {prefix} before each text; only bos ({bos}) is supported there"
        )
    roles = {"bos": bos, "eos": NO_TOKEN if eos is None else eos}
    pad = find("pad")
    if pad is None:
        pad = bos if eos is None else eos
    roles["pad"] = pad
    for role in ("mask", "sep"):
        if (index := find(role)) is not None:
            roles[role] = index
    stated = (*eos_of(generation), *eos_of(config)) if eos is not None else ()
    more = [index for index in stated if vocabulary.can_end(index) and index < rows]
    return roles | _several([roles["eos"], *more]) | {"prompt_bos": bool(prefix)}


def _several(ends: list) -> dict[str, list[int]]:
    """Return the entry of special_ids.json for several tokens that end a text."""
    different = list(dict.fromkeys(ends))
    return {"ends": different} if len(different) > 1 else {}


class Vocabulary:
    """Ids and pieces of a tokenizer.json, and which of them text can yield."""

    def __init__(self, fast: "tokenizers.Tokenizer"):
        self._fast = fast
        self.ids = self._fast.get_vocab(with_added_tokens=True)
        self.pieces = {index: piece for piece, index in self.ids.items()}
        self._special = {
            index for index, token in self._fast.get_added_tokens_decoder().items() if token.special
        }
        self._fast.encode_special_tokens = True

    def is_text(self, index: int) -> bool:
        """Whether a text with this token's spelling yields it even if cut inside the spelling."""
        piece = self.pieces[index]
        if index in self._special and len(piece) > 1:
            return False
        return index in self._fast.encode(piece, add_special_tokens=False).ids

    def can_end(self, index: int) -> bool:
        """Whether the id exists and no text yields it, so that it can end a text."""
        return index in self.pieces and not self.is_text(index)

    def first_token(self) -> int:
        """Return the token to put before a text if there are no special tokens: a line end, or the
        token of the lowest id."""
        ids = self._fast.encode("\n", add_special_tokens=False).ids
        return ids[0] if len(ids) == 1 else min(self.pieces)

    def prefix(self) -> list[int]:
        """Return the tokens that the post-processor puts before a text."""
        found = self._fast.encode("a")
        mask = [*found.special_tokens_mask, 0]
        return found.ids[: mask.index(0)]


def without_rows(files: HubTokenizerFiles, rows: int) -> tuple[HubTokenizerFiles, list[str]]:
    """Return (files without special tokens from id ``rows`` on, the spellings of these).

    Raises ValueError if a text could yield a token beyond ``rows``.
    """
    size = 1 + max(files.fast.get_vocab(with_added_tokens=True).values())
    if size <= rows:
        return files, []
    outside = {
        index: token
        for index, token in files.fast.get_added_tokens_decoder().items()
        if index >= rows
    }
    words = [token.content for token in outside.values() if not token.special]
    if words or max(files.fast.get_vocab(with_added_tokens=False).values()) >= rows:
        named = f", and text yields {', '.join(map(repr, words[:3]))}" if words else ""
        raise ValueError(
            f"it has {size} tokens and the model vocab_size={rows}{named}; give --tokenizer=FOLDER "
            "of the one that it was trained with"
        )
    whole = json.loads(files.content)
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < rows]
    names = [outside[index].content for index in sorted(outside)]
    content = json.dumps(whole, ensure_ascii=False).encode()
    return dataclasses.replace(files, content=content, fast=parse_tokenizer(content)), names
