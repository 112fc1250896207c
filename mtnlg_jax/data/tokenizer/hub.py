"""The tokenizer of a Hugging Face tokenizer.json."""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from mtnlg_jax.data.tokenizer.base import HIDE, MANY_CHARACTERS, SPECIAL_IDS, Tokenizer
from mtnlg_jax.data.tokenizer.byte_level import (
    ByteLevelBPETokenizer,
    byte_alphabet,
    byte_ranks,
    gpt2_pair,
)
from mtnlg_jax.data.tokenizer.files import parse_tokenizer
from mtnlg_jax.data.tokenizer.merge_order import COMPARED, encode_words, in_merge_order
from mtnlg_jax.data.tokenizer.pieces import pieces_of

if TYPE_CHECKING:
    import tiktoken
    import tokenizers


class HubTokenizer(Tokenizer):
    """A tokenizer.json: its normalizer, pre-tokenizer, model, added tokens and decoder.

    Its ids are those of transformers without special tokens around the text. A text yields tokens
    that were added as words; a token that was added as special, only with ``parse_special``.
    ``special_ids`` (JSON) has the roles, as in `ByteLevelBPETokenizer`; `roles.open_roles` and
    `roles.closed_roles` make it.
    """

    kind = "tokenizer.json"

    def __init__(
        self,
        content: bytes,
        special_ids: bytes,
        fast: "tokenizers.Tokenizer | None" = None,
    ):
        """``fast`` is what `parse_tokenizer` makes of ``content``, to be used by this object alone.

        Raises ValueError if a token's text depends on the tokens around it, or an id occurs
        twice."""
        roles = self._read_roles(special_ids)
        self._fast = parse_tokenizer(content) if fast is None else fast
        self._fast.encode_special_tokens = True  # special tokens in a text are read as text
        ids = self._fast.get_vocab(with_added_tokens=True)
        spelled = {index: piece for piece, index in ids.items()}
        if len(spelled) < len(ids):
            raise ValueError("the vocabulary is damaged: an id occurs twice")
        whole = json.loads(content)
        pieces = pieces_of(whole, self._fast, ids)
        self._prefixed = pieces.prefixed
        self._characters = 0
        self._words: dict[str, int] = {}  # words that were added, for tiktoken
        names = self._special_pieces(roles, spelled)
        for index in range(len(pieces.content)):
            if index not in spelled:
                names[index] = f"<unused {index}>"
        for index in names:
            pieces.content[index] = b""
        unknown = _unknown_id(whole["model"], ids)
        # A single character that also stands for unknown text is a character.
        if unknown is not None and unknown not in roles.values() and len(spelled[unknown]) > 1:
            names.setdefault(unknown, spelled[unknown])
            pieces.content[unknown] = b"\xef\xbf\xbd"
        files = {"tokenizer.json": content, SPECIAL_IDS: special_ids}
        super().__init__(pieces.content, roles, names, pieces.byte_ids, files)

    def _special_pieces(self, roles: dict[str, int], spelled: dict[int, str]) -> dict[int, str]:
        """Return the spellings of tokens that are not text, by id.

        Sets ``_cuts``, the positions at which texts are cut so that they do not yield these tokens.
        """
        added = self._fast.get_added_tokens_decoder().items()
        names = {index: token.content for index, token in added if token.special}
        self._parsed = set(names)
        used = {*roles.values(), *self._more_ends}
        for index in spelled.keys() & used - names.keys():
            if index not in self._read([spelled[index]])[0]:
                names[index] = spelled[index]
        # A name that the model itself reads is cut after its first character; a single character
        # stays text.
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
        # "fast" skips offsets, which cost more than the ids; it chooses its own number of threads.
        encoded = self._fast.encode_batch_fast(texts, add_special_tokens=False)
        return [found.ids for found in encoded]

    def _encode(self, texts: list[str], threads: int) -> list[list[int]]:
        self._characters += sum(map(len, texts))
        if self._characters > MANY_CHARACTERS and self._gpt2 is not None:
            return self._gpt2.encode_batch(texts, threads)
        if self._characters > MANY_CHARACTERS and self._tiktoken is not None:
            return self._encode_faster(self._tiktoken, texts, threads)
        cuts = self._cuts
        if cuts is None:
            return self._read(texts)
        return [list(chain.from_iterable(self._read(cuts.split(text)))) for text in texts]

    @functools.cached_property
    def _gpt2(self) -> ByteLevelBPETokenizer | None:
        """A faster tokenizer of the same ids, if only special tokens distinguish this one from
        GPT-2's."""
        if self._cuts is not None:
            return None
        pair = gpt2_pair(json.loads(self._files["tokenizer.json"]))
        if pair is None:
            return None
        found = ByteLevelBPETokenizer(*pair)
        found._characters = self._characters
        return found

    @functools.cached_property
    def _tiktoken(self) -> "tiktoken.Encoding | None":
        """The model in tiktoken, if it is a byte-level BPE in merge order that splits texts by one
        of the patterns that were compared."""
        import tiktoken
        import tokenizers

        whole = json.loads(self._files["tokenizer.json"])
        pattern = _pattern_of(whole)
        model = whole["model"]
        ids = model.get("vocab")
        words = [token for token in whole.get("added_tokens", []) if not token["special"]]
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        odd = any(token[flag] for token in words for flag in flags)
        if pattern is None or odd or self._cuts is not None or byte_alphabet().keys() - ids.keys():
            return None
        pairs: list[tuple[str, str]] = []
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            pairs.append((left, right))
        bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=pairs))
        merged = in_merge_order(bare, ids, pairs)
        added = {token["content"] for token in whole.get("added_tokens", [])}
        # A word that is a token without merges would be one by ignore_merges alone.
        if merged is None or ids.keys() - merged.keys() - byte_alphabet().keys() - added:
            return None
        self._words = {token["content"]: token["id"] for token in words}
        return tiktoken.Encoding(
            self.fingerprint,
            pat_str=pattern,
            mergeable_ranks=byte_ranks(ids, merged),
            special_tokens={},
        )

    def _encode_faster(
        self, encoding: "tiktoken.Encoding", texts: list[str], threads: int
    ) -> list[list[int]]:
        normalizer = self._fast.normalizer
        parts_of = [self._split_spelled(text, self._words) for text in texts]
        parts = [part for parts in parts_of for part in parts if part not in self._words]
        if normalizer is not None:
            parts = [normalizer.normalize_str(part) for part in parts]
        encoded = zip(parts, encode_words(encoding, parts, threads), strict=True)
        results = []
        for own in parts_of:
            ids: list[int] = []
            for part in own:
                if part in self._words:
                    ids.append(self._words[part])
                    continue
                plain, found = next(encoded)
                ids += self._read([plain])[0] if found is None else found
            results.append(ids)
        return results

    def _encode_special(self, text: str) -> list[int]:
        others = {name: index for index, name in self._spelled_names().items()}
        return self._split_at(text, others, self._read_special)

    def _spelled_names(self) -> dict[int, str]:
        roles = {*self.eos_ids, self.bos_id, self.pad_id, self._mask_id, self.sep_id}
        return {
            index: name
            for index, name in self.special_names.items()
            if index in roles and index not in self._parsed
        }

    def _encode_part(self, text: str) -> tuple[list[int], Sequence[tuple[int, int] | None]]:
        fast = self._hiding if HIDE in text else self._fast
        fast.encode_special_tokens = False
        try:
            found = fast.encode(text, add_special_tokens=False)
        finally:
            fast.encode_special_tokens = True
        return found.ids, found.offsets

    @functools.cached_property
    def _hiding(self) -> "tokenizers.Tokenizer":
        """A tokenizer that leaves `HIDE` out after it has looked for special tokens."""
        whole = json.loads(self._files["tokenizer.json"])
        first = {"type": "Replace", "pattern": {"String": HIDE}, "content": ""}
        after = [whole["normalizer"]] if whole.get("normalizer") else []
        whole["normalizer"] = {"type": "Sequence", "normalizers": [first, *after]}
        for token in whole.get("added_tokens", []):
            # A normalized spelling would be looked for after the character is gone.
            token["normalized"] = token["normalized"] and not token["special"]
        return parse_tokenizer(json.dumps(whole, ensure_ascii=False).encode())

    def _read_special(self, text: str) -> list[int]:
        """Encode as transformers does, which may strip the spaces around an added token."""
        self._fast.encode_special_tokens = False
        try:
            return self._read([text])[0]
        finally:
            self._fast.encode_special_tokens = True


def _pattern_of(whole: dict) -> str | None:
    """Return the pattern by which a byte-level BPE splits texts, if it is one of COMPARED and all
    else is as tiktoken has it."""
    model = whole["model"]
    steps = (whole.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    first = steps[0]
    last = steps[-1]
    pattern = (first.get("pattern") or {}).get("Regex")
    off = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in off)
        and (whole.get("normalizer") or {"type": "NFC"}) == {"type": "NFC"}
        and len(steps) == 2
        and first.get("type") == "Split"
        and (first.get("behavior"), first.get("invert")) == ("Isolated", False)
        and last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space")
        and not last.get("use_regex", True)
        and pattern in COMPARED
    ):
        return pattern
    return None


def _unknown_id(model: dict, ids: dict[str, int]) -> int | None:
    """Return the id that a model of `tokenizers` gives to text outside its vocabulary."""
    if model.get("unk_id") is not None:
        return model["unk_id"]
    unknown = model.get("unk_token")
    return None if unknown is None else ids.get(unknown)
