"""The tokenizer inside a GGUF file, as the files of a Hugging Face folder.

llama.cpp keeps the vocabulary, and the name of the program that it belongs to: "llama" (pieces of
SentencePiece with scores), "gpt2" (byte-level BPE, split by a pattern that ``pre`` names) or "bert"
(WordPiece). The names and patterns are those of llama-vocab.cpp; what it leaves to the program is
written here as in the tokenizer.json that the models came with.
"""

import json
import os
from collections.abc import Callable
from typing import Any

from mtnlg_jax.data.tokenizer.byte_level import byte_alphabet
from mtnlg_jax.data.tokenizer.gguf_header import read_header
from mtnlg_jax.data.tokenizer.merge_order import GPT_4O, LLAMA_3, QWEN_2, TEKKEN

_SPACE = "\u2581"
# token_type of llama.cpp.
_UNKNOWN = 2
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5
_BYTE = 6

# ``pre`` -> (pattern, whether a word of the vocabulary is taken whole, whether texts are normalized
# to NFC). None: GPT-2's pattern; "digits": each digit apart before that.
_SPLITS: dict[str, tuple[str | None, bool, bool]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), (None, False, False)),
    **dict.fromkeys(("starcoder", "refact", "smollm", "codeshell"), ("digits", False, False)),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), (LLAMA_3, True, False)
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), (LLAMA_3, False, False)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (QWEN_2, False, True)),
    "stablelm2": (QWEN_2, False, False),
    "tekken": (TEKKEN, True, False),
    **dict.fromkeys(("gpt-4o", "llama4"), (GPT_4O, False, False)),
}
_BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe", "tekken")  # of llama.cpp, for older files
_WAY_OUT = (
    "put tokenizer.json of the model beside the file, or, to convert it, give --tokenizer=FOLDER"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def gguf_tokenizer_files(path: str | os.PathLike) -> Callable[[str], bytes | None]:
    """Return a function that returns tokenizer.json, tokenizer_config.json and
    generation_config.json of the GGUF file at ``path`` by name, and None for other names.

    Raises ValueError if the file is damaged, or has no tokenizer that is known here.
    """
    metadata = read_header(path).metadata
    return tokenizer_files(metadata, os.fspath(path)).get


def tokenizer_files(metadata: dict[str, Any], path: str) -> dict[str, bytes]:
    """Do the same for the metadata of a file. ``path`` is for messages."""
    given = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    makers = {"llama": _sentence_piece, "gpt2": _byte_level, "bert": _word_piece}
    kind = given.get("model")
    if kind not in makers or not given.get("tokens"):
        raise ValueError(
            f"{path} holds no tokenizer that is known here: tokenizer.ggml.model is {kind!r}, "
            f"known are {', '.join(makers)}; {_WAY_OUT}"
        )
    tokens = given["tokens"]
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise ValueError(f"the vocabulary of {path} has {twice!r} twice; {_WAY_OUT}")
    types = given.get("token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(
            f"{path} has {len(tokens)} tokens and {len(types)} entries of "
            "tokenizer.ggml.token_type; copy it again"
        )
    architecture = metadata.get("general.architecture", "")
    whole = makers[kind](tokens, types, given, architecture, path)
    roles = _roles(given, kind)
    whole["added_tokens"] = _added(whole["model"]["vocab"], tokens, types, roles)
    bos = roles.get("bos")
    by_default = kind != "gpt2" or given.get("pre") in _BOS_BY_DEFAULT
    if given.get("add_bos_token", by_default) and bos is not None:
        last = [roles["sep"]] if kind == "bert" and "sep" in roles else []
        whole["post_processor"] = _around(tokens, bos, last)
    settings: dict[str, Any] = {f"{role}_token": tokens[at] for role, at in roles.items()}
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = template
    ends = [given.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = [at for at in dict.fromkeys(ends) if at is not None]
    generation = {"eos_token_id": ends} if len(ends) > 1 else {}
    files = {"tokenizer.json": whole, "tokenizer_config.json": settings}
    if generation:
        files["generation_config.json"] = generation
    return {
        name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()
    }


def _roles(given: dict[str, Any], kind: str) -> dict[str, int]:
    """Return {role: id}. llama.cpp writes "seperator" in its key."""
    names: dict[str, tuple[str, ...]] = {
        "unk": ("unknown",),
        "pad": ("padding",),
        "mask": ("mask",),
    }
    names |= {"sep": ("seperator", "separator")} if kind == "bert" else {}
    names |= {"bos": ("bos", "cls"), "eos": ("eos",)}
    found = {}
    for role, keys in names.items():
        index = next((given[f"{k}_token_id"] for k in keys if f"{k}_token_id" in given), None)
        if index is not None and 0 <= index < len(given["tokens"]):
            found[role] = index
    if kind == "bert":
        found.setdefault("sep", found.get("eos", -1))
        found.setdefault("eos", found["sep"])
        found = {role: index for role, index in found.items() if index >= 0}
    return found


def _added(
    vocabulary: dict[str, int], tokens: list[str], types: list[int], roles: dict[str, int]
) -> list[dict[str, Any]]:
    """Return the tokens that are looked for in a text before it is split: special ones, and those
    of the user that are spelled as in a text."""
    special = {index for index, kind in enumerate(types) if kind == _CONTROL} | set(roles.values())
    others = {index for index, kind in enumerate(types) if kind == _USER_DEFINED}
    return [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": index in special,
        }
        for index in sorted(special | others)
        if tokens[index] in vocabulary
    ]


def _around(tokens: list[str], first: int, last: list[int]) -> dict[str, Any]:
    """Return a post-processor that puts special tokens around a text."""
    sides = [{"SpecialToken": {"id": tokens[at], "type_id": 0}} for at in (first, *last)]
    text = [{"Sequence": {"id": which, "type_id": 0}} for which in "AB"]
    named = {
        tokens[at]: {"id": tokens[at], "ids": [at], "tokens": [tokens[at]]} for at in (first, *last)
    }
    return {
        "type": "TemplateProcessing",
        "single": [sides[0], text[0], *sides[1:]],
        "pair": [sides[0], text[0], *sides[1:], text[1], *sides[1:]],
        "special_tokens": named,
    }


def _whole(model: dict, normalizer: Any, pre_tokenizer: Any, decoder: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _sequence(kind: str, steps: list[dict]) -> dict[str, Any] | None:
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", kind: steps}


# --- SentencePiece


def _sentence_piece(
    tokens: list[str], types: list[int], given: dict, architecture: str, path: str
) -> dict[str, Any]:
    # Runs of spaces are user-defined tokens with spaces of their own.
    pieces = [_SPACE * len(t) if t and not t.strip(" ") else t for t in tokens]
    numbers = {piece: index for index, piece in enumerate(pieces)}
    scores = given.get("scores") or []
    if len(scores) != len(tokens) or len(numbers) < len(tokens):
        raise ValueError(
            f"{path} has {len(tokens)} tokens of SentencePiece and {len(scores)} scores; copy it "
            "again"
        )
    if architecture.startswith("gemma"):  # its scores do not follow the order of its merges
        scores = [-float(index) for index in range(len(pieces))]
    made = {
        piece: score
        for piece, score, kind in zip(pieces, scores, types, strict=True)
        if kind not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    unknown = given.get("unknown_token_id")
    unknown = types.index(_UNKNOWN) if unknown is None and _UNKNOWN in types else unknown
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else tokens[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": _BYTE in types,
        "ignore_merges": False,
        "vocab": numbers,
        "merges": sentencepiece_merges(list(made.items()), numbers),
    }
    prefixed = given.get("add_space_prefix", True)
    first: list[dict] = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
    spaces: dict = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back: dict = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip: list[dict] = (
        [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    )
    decoders: list[dict] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return _whole(
        model,
        _sequence("normalizers", [*first, spaces]),
        None,
        _sequence("decoders", decoders),
    )


def sentencepiece_merges(
    scores: list[tuple[str, float]], numbers: dict[str, int]
) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece BPE model, in order.

    SentencePiece merges the two adjacent pieces whose union has the highest score.
    """
    merges = []
    for piece, score in scores:
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [
            (-score, left, right) for left, right in splits if left in numbers and right in numbers
        ]
    merges.sort(key=lambda merge: (merge[0], numbers[merge[1]], numbers[merge[2]]))
    return [(left, right) for _, left, right in merges]


# --- byte-level BPE


def _byte_level(
    tokens: list[str], types: list[int], given: dict, architecture: str, path: str
) -> dict[str, Any]:
    pre = given.get("pre")
    if pre not in _SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre of {path} is {pre!r}, and how that splits a text is not known "
            f"here; known are {', '.join(_SPLITS)}; {_WAY_OUT}"
        )
    pattern, ignore_merges, composed = _SPLITS[pre]
    if pattern is None or pattern == "digits":
        digits: list[dict] = [{"type": "Digits", "individual_digits": True}] if pattern else []
        steps: list[dict] = [*digits, _BYTES]
    else:
        split = {"type": "Split", "pattern": {"Regex": pattern}}
        steps = [
            split | {"behavior": "Isolated", "invert": False},
            _BYTES | {"use_regex": False},
        ]
    alphabet = byte_alphabet()
    # Rows that only fill the vocabulary are not tokens.
    named = {value for key, value in given.items() if key.endswith("_token_id")}
    numbers = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != _UNUSED or index in named
    }
    missing = [character for character in alphabet if character not in numbers]
    merges = [tuple(merge.split(" ")) for merge in given.get("merges") or []]
    wrong = next((m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= numbers.keys()), None)
    if missing or wrong is not None or not merges:
        what = f"the merge {' '.join(wrong)!r} is not of its tokens" if wrong else ""
        what = what or (f"the bytes {missing[:3]} have no token" if missing else "it has no merges")
        raise ValueError(f"the byte-level BPE of {path} is damaged: {what}; copy it again")
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": numbers,
        "merges": merges,
    }
    normalizer = {"type": "NFC"} if composed else None
    return _whole(model, normalizer, _sequence("pretokenizers", steps), _BYTES)


# --- WordPiece


def _word_piece(
    tokens: list[str], types: list[int], given: dict, architecture: str, path: str
) -> dict[str, Any]:
    """Undo the converter of llama.cpp, which marks the starts of words instead of their rest."""

    def spelled(token: str, kind: int) -> str:
        if token.startswith(_SPACE):
            return token.removeprefix(_SPACE)
        bare = kind in (_CONTROL, _UNKNOWN, _UNUSED) or token[:1] + token[-1:] == "[]"
        return token if bare else f"##{token}"

    numbers: dict[str, int] = {}
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        numbers[spelled(token, kind)] = index
    unknown = given.get("unknown_token_id")
    name = "[UNK]" if unknown is None else spelled(tokens[unknown], types[unknown])
    if name not in numbers:
        raise ValueError(f"the vocabulary of {path} has no {name} for unknown words; {_WAY_OUT}")
    model = {
        "type": "WordPiece",
        "unk_token": name,
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": numbers,
    }
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    return _whole(model, normalizer, {"type": "BertPreTokenizer"}, decoder)
