"""Convert tokenizers from and to Hugging Face's files.

Three differences remain. Here, the name of a special token in a text becomes that token only on
request (``parse_special``). A U+2581 in a text is not a space to our SentencePiece models, but it
is to Hugging Face's form of them. And of two segmentations that are equally likely under a unigram
model (4 of 5,488 lines of code and prose), Hugging Face may choose the other one.
"""

import json
import os
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from mtnlg_jax.data.tokenizer import (
    SENTENCEPIECE_FILES,
    ByteLevelBPETokenizer,
    HubTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from mtnlg_jax.data.tokenizer.byte_level import END_OF_TEXT
from mtnlg_jax.data.tokenizer.files import (
    companions_of,
    first_free_id,
    parse_tokenizer,
    read_tokenizer_files,
    token_name,
)
from mtnlg_jax.data.tokenizer.gguf_tokenizer import (
    gguf_tokenizer_files,
    sentencepiece_merges,
)
from mtnlg_jax.data.tokenizer.roles import closed_roles, without_rows
from mtnlg_jax.foreign import is_gguf

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "encoder.json",
    "vocab.bpe",
    *SENTENCEPIECE_FILES,
)
_GENERATION = "generation_config.json"
# Texts in which similar tokenizers differ: case, spaces, digits, marks, scripts, line breaks, and
# characters of zero width.
_PROBES = (
    "Hello world",
    " Hello  world's 2,024 tokens",
    "line\nline\n\n\ttab  ",
    "naïve café",
    "天地玄黄,宇宙洪荒。",
    "don't they'll WE'VE",
    "12345 3.14 a1b2",
    "🙂👩‍👩‍👧 …–“x”",
    "\u00a0\u3000x\u200b",
    "x" * 40,
    "",
)
_OTHER = "give --tokenizer=FOLDER with the one that it was trained with"


def read_tokenizer(
    path: str | os.PathLike, config: dict, generation: dict, rows: int
) -> tuple[Tokenizer, list[str]]:
    """Read the tokenizer of a model that was trained elsewhere.

    Args:
      path: a folder of Hugging Face's or one written by `Tokenizer.save`, a tokenizer.json, a
        SentencePiece model, or a GGUF file with a tokenizer inside.
      config: the object in config.json; like ``generation``, it names bos, eos and pad.
      generation: the object in generation_config.json.
      rows: the model's vocabulary size. Special tokens without a row are left out, because no text
        has them.

    Returns:
      The tokenizer, and the special tokens that were left out.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: a text could contain a token without a row, or the tokenizer cannot be reproduced.
    """
    path = Path(path)
    folder = path.parent if path.name == "tokenizer.json" and path.is_file() else path
    if not folder.exists() or (folder / "tokenizer_meta.json").is_file():
        saved = load_tokenizer(path)
        if saved.vocab_size > rows:
            raise ValueError(
                f"the tokenizer of {path} has {saved.vocab_size} tokens and the "
                f"model vocab_size={rows}; {_OTHER}"
            )
        return saved, []

    inside = gguf_tokenizer_files(path) if is_gguf(path) and path.is_file() else None

    def read(name: str) -> bytes | None:
        if inside is not None:
            return inside(name)
        if folder.is_file():
            alone = "tokenizer.json" if folder.suffix == ".json" else SENTENCEPIECE_FILES[0]
            return folder.read_bytes() if name == alone else None
        return (folder / name).read_bytes() if (folder / name).is_file() else None

    try:
        model = next(filter(None, map(read, SENTENCEPIECE_FILES)), None)
        if model is not None and read("tokenizer.json") is None:
            closed = _closed_sentencepiece(model, read, config, generation, rows)
            closed.companions = companions_of(read)
            return closed, []
        files = read_tokenizer_files(read)
        if files is None:
            raise FileNotFoundError(
                f"{folder} holds no tokenizer (tokenizer.json; vocab.json and merges.txt; "
                "vocab.txt; or tokenizer.model); copy one there, or convert with --tokenizer=FOLDER"
            )
        files, outside = without_rows(files, rows)
        roles = closed_roles(files, config, generation, rows)
        special = json.dumps(roles).encode()
        named = {index for role, index in roles.items() if role not in ("prompt_bos", "ends")}
        named |= set(roles.get("ends", ()))
        tokenizer: Tokenizer
        if files.plain is not None and named == {json.loads(files.plain[0]).get(END_OF_TEXT)}:
            tokenizer = ByteLevelBPETokenizer(*files.plain, special)
        else:
            tokenizer = HubTokenizer(files.content, special, files.fast)
        tokenizer.companions = companions_of(read)
        return tokenizer, outside
    except ValueError as error:
        raise ValueError(f"the tokenizer of {folder}: {error}") from None


def _closed_sentencepiece(
    model: bytes, read, config: dict, generation: dict, rows: int
) -> SentencePieceTokenizer:
    """Return a SentencePiece tokenizer whose roles (bos, eos, ...) are pieces of the model."""
    tokenizer = SentencePieceTokenizer(model)
    first_free_id(read, tokenizer.pieces)
    if tokenizer.pieces > rows:
        raise ValueError(
            f"it has {tokenizer.pieces} tokens and the model vocab_size={rows}; {_OTHER}"
        )
    roles: dict[str, int | None] = {}
    for role in ("eos", "bos", "pad", "mask", "sep"):
        stated = [source.get(f"{role}_token_id") for source in (generation, config)]
        own = getattr(tokenizer, "_mask_id" if role == "mask" else f"{role}_id")
        found = [
            index
            for index in (*stated, own)
            if type(index) is int and 0 <= index < tokenizer.pieces
        ]
        if found or role not in ("mask", "sep"):
            roles[role] = next(iter(found), roles.get("eos"))
    if roles["eos"] is None:
        raise ValueError("it has no end token; name one in config.json as eos_token_id")
    special = json.dumps({**roles, "prompt_bos": tokenizer.prompt_bos})
    return SentencePieceTokenizer(model, special.encode())


def write_tokenizer(tokenizer: Tokenizer, context: int) -> tuple[dict[str, bytes], str]:
    """Return files for transformers' AutoTokenizer, by name, and a line that describes them.

    Raises ValueError if tokenizer.json would encode some text differently.
    """
    if isinstance(tokenizer, ByteLevelBPETokenizer):
        fast = _fast_of_bytes(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.as_trained_here:
        fast = _fast_of_sentencepiece(tokenizer)
    elif isinstance(tokenizer, HubTokenizer):
        fast = parse_tokenizer(tokenizer.files()["tokenizer.json"])
        if _is_as_it_came(tokenizer, fast):
            came = {"tokenizer.json": tokenizer.files()["tokenizer.json"], **_templates(tokenizer)}
            return came, "as they came"
    else:
        return (
            {name: data for name, data in tokenizer.files().items() if name != _GENERATION},
            "as tokenizer.model only, because its settings differ; load it with its own class",
        )
    names = {
        index: name
        for index, name in tokenizer.special_names.items()
        if not name.startswith("<unused ")
    }
    there = {token.content for token in fast.get_added_tokens_decoder().values() if token.special}
    fast.add_special_tokens(
        [
            AddedToken(names[index], special=True, normalized=False)
            for index in sorted(names)
            if names[index] not in there
        ]
    )
    wrong = [name for index, name in names.items() if fast.token_to_id(name) != index]
    if wrong:
        raise ValueError(
            f"tokenizer.json cannot hold the special tokens {', '.join(wrong)} at their ids"
        )
    bos = fast.id_to_token(tokenizer.bos_id)
    if tokenizer.prompt_bos:
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    elif isinstance(tokenizer, HubTokenizer):
        fast.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    _compare("the run", tokenizer, fast)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "bos_token": bos,
        "pad_token": fast.id_to_token(tokenizer.pad_id),
    }
    if tokenizer.eos_id >= 0:
        settings["eos_token"] = fast.id_to_token(tokenizer.eos_id)
    came = _templates(tokenizer)
    config = json.loads(came.get("tokenizer_config.json", b"{}"))
    if "chat_template" in config:
        settings["chat_template"] = config["chat_template"]
    template = {name: data for name, data in came.items() if name.endswith(".jinja")}
    return template | {
        "tokenizer.json": fast.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }, "as tokenizer.json"


def _templates(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files that came with a tokenizer, except for settings of generation."""
    return {name: data for name, data in tokenizer.companions.items() if name != _GENERATION}


def _is_as_it_came(tokenizer: HubTokenizer, fast: tokenizers.Tokenizer) -> bool:
    """Whether the files that came with a tokenizer say everything that is known of it."""
    if "tokenizer_config.json" not in tokenizer.companions:
        return False
    config = json.loads(tokenizer.companions["tokenizer_config.json"])
    for role in ("bos", "eos", "pad"):
        named = token_name(config.get(f"{role}_token"))
        index = getattr(tokenizer, f"{role}_id")
        if named is not None and fast.token_to_id(named) != index:
            return False
    try:
        _compare("the run", tokenizer, fast)
    except ValueError:  # such as a token behind each text
        return False
    added = fast.get_added_tokens_decoder()
    # Special tokens without a row in the model were left out; transformers would add them again.
    stated = config.get("added_tokens_decoder") or {}
    return all(int(index) in added for index in stated) and all(
        index in added or name.startswith("<unused ")
        for index, name in tokenizer.special_names.items()
    )


def read_json(path: Path) -> dict | None:
    """Return the object in a file of a model's folder, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a JSON {type(found).__name__}, not an object; copy it again"
        )
    return found


def _compare(folder, ours: Tokenizer, fast: tokenizers.Tokenizer) -> None:
    prefix = [ours.bos_id] if ours.prompt_bos else []
    for text in _PROBES:
        here = prefix + ours.encode(text)
        there = fast.encode(text).ids
        if here != there:
            raise ValueError(
                f"the tokenizer of {folder} is not GPT-2's byte-level BPE, or differs from it: "
                f"it encodes {text!r} as {there[:8]}, this one as {here[:8]}"
            )


def _fast_of_bytes(tokenizer: ByteLevelBPETokenizer) -> tokenizers.Tokenizer:
    files = tokenizer.files()
    lines = [
        line.partition(" ")
        for line in files["merges.txt"].decode().split("\n")
        if line.strip() and not line.startswith("#version")
    ]
    pairs = [(left, right) for left, _, right in lines]
    fast = tokenizers.Tokenizer(models.BPE(vocab=json.loads(files["vocab.json"]), merges=pairs))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return fast


def _fast_of_sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    from sentencepiece import sentencepiece_model_pb2

    # protobuf defines its classes as the module is imported, where mypy sees none.
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.files()["tokenizer.model"])
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = proto.trainer_spec.unk_id
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        model: models.Model = models.Unigram(scores, unk_id=unknown, byte_fallback=True)
    else:
        numbers = {piece: index for index, (piece, _) in enumerate(scores)}
        model = models.BPE(
            vocab=numbers,
            merges=sentencepiece_merges(scores, numbers),
            unk_token=scores[unknown][0],
            fuse_unk=True,
            byte_fallback=True,
        )
    fast = tokenizers.Tokenizer(model)
    fast.normalizer = normalizers.Replace(" ", "\u2581")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return fast
