"""Tokenizers from and to Hugging Face's files.

What stays different: here a text never becomes a special token by spelling its name; a text's own U+2581 is no space
to our SentencePiece models, as it is to Hugging Face's form of them; and of two segmentations that are equally likely
to a unigram model (4 of 5,488 lines of code and prose) Hugging Face's may take the other.
"""

import json
import os
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from mtnlg_jax.data.storage import first_line
from mtnlg_jax.data.tokenizer import ByteLevelBPETokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
         "added_tokens.json")
# Where tokenizers that look alike differ: case, spaces, digits, marks, scripts, breaks, what is no character.
_PROBES = ("Hello world", " Hello  world's 2,024 tokens", "line\nline\n\n\ttab  ", "naïve café", "天地玄黄,宇宙洪荒。",
           "don't they'll WE'VE", "12345 3.14 a1b2", "🙂👩‍👩‍👧 …–“x”", "\u00a0\u3000x\u200b", "x" * 40, "")


def read_tokenizer(folder: str | os.PathLike, config: dict, generation: dict) -> ByteLevelBPETokenizer:
    """The byte-level BPE of a GPT-2 folder: vocab.json and merges.txt, or tokenizer.json. ``config`` and
    ``generation`` are config.json and generation_config.json, which say what bos, eos and pad are.

    Raises FileNotFoundError where there is no tokenizer; ValueError where it is of another kind, or would read some
    text into other tokens here.
    """
    folder = Path(folder)
    whole = read_json(folder / "tokenizer.json")
    vocabulary, merges = _bpe_files(folder, whole)
    numbers = json.loads(vocabulary)
    added = _added(folder, whole)
    new = sorted((index, piece) for piece, index in added.items() if piece not in numbers)
    if new:
        numbers |= {piece: index for index, piece in new}
        vocabulary = json.dumps(numbers, ensure_ascii=False).encode()
    settings = read_json(folder / "tokenizer_config.json") or {}
    fast = None if whole is None else _fast(folder / "tokenizer.json")
    prefix = [] if fast is None else fast.encode("").ids
    special = _special_ids(numbers, config, generation)
    special["prompt_bos"] = prefix == [special["bos"]] or (fast is None and bool(settings.get("add_bos_token")))
    if prefix not in ([], [special["bos"]]):
        raise ValueError(f"{folder / 'tokenizer.json'} puts the tokens {prefix} before each text; only bos "
                         f"({special['bos']}) can be put there")
    tokenizer = ByteLevelBPETokenizer(vocabulary, merges, json.dumps(special).encode())
    if fast is not None:
        _compare(folder, tokenizer, fast)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, context: int) -> tuple[dict[str, bytes], str]:
    """(files by name, one line that says what they are) of a tokenizer of ours for transformers' AutoTokenizer.
    Raises ValueError where tokenizer.json would read some text into other tokens than ours."""
    if isinstance(tokenizer, ByteLevelBPETokenizer):
        fast = _fast_of_bytes(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.lossless:
        fast = _fast_of_sentencepiece(tokenizer)
    else:
        return tokenizer.files(), "as tokenizer.model alone: SentencePiece of another make, load it with its own class"
    names = tokenizer.special_names
    fast.add_special_tokens([AddedToken(names[index], special=True, normalized=False) for index in sorted(names)])
    wrong = [name for index, name in names.items() if fast.token_to_id(name) != index]
    if wrong:
        raise ValueError(f"tokenizer.json cannot hold the special tokens {', '.join(wrong)} at their ids")
    if tokenizer.prompt_bos:
        bos = names[tokenizer.bos_id]
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_id)])
    _compare("the run", tokenizer, fast)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
                "clean_up_tokenization_spaces": False, "bos_token": names[tokenizer.bos_id],
                "eos_token": names[tokenizer.eos_id], "pad_token": names[tokenizer.pad_id]}
    return {"tokenizer.json": fast.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(settings, indent=2).encode()}, "as tokenizer.json"


def read_json(path: Path) -> dict | None:
    """The object in a file of a model's folder; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy it anew") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} of JSON, not an object; copy it anew")
    return found


def _fast(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer ({first_line(error)})") from None


def _bpe_files(folder: Path, whole: dict | None) -> tuple[bytes, bytes]:
    for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if all((folder / name).is_file() for name in names):
            return tuple((folder / name).read_bytes() for name in names)
    if whole is None:
        raise FileNotFoundError(f"{folder} holds no tokenizer (vocab.json and merges.txt, or tokenizer.json); give "
                                "--tokenizer=FOLDER of one")
    model = whole.get("model") or {}
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise ValueError(f"{folder / 'tokenizer.json'} is of type {model.get('type')!r}; GPT-2's is a byte-level 'BPE'")
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    return (json.dumps(model["vocab"], ensure_ascii=False).encode(),
            "\n".join(["#version: 0.2", *pairs, ""]).encode())


def _added(folder: Path, whole: dict | None) -> dict[str, int]:
    """Tokens outside the BPE, by spelling."""
    added = dict(read_json(folder / "added_tokens.json") or {})
    added |= {token["content"]: token["id"] for token in (whole or {}).get("added_tokens", [])}
    decoder = (read_json(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder", {})
    return added | {token["content"]: int(index) for index, token in decoder.items()}


def _special_ids(numbers: dict[str, int], config: dict, generation: dict) -> dict[str, int]:
    """Ids of bos, eos and pad, as generation has them, where the vocabulary holds them."""
    spelled = numbers.get("<|endoftext|>")

    def find(role, default):
        for source in (generation, config):
            value = source.get(f"{role}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and 0 <= value < len(numbers):
                return value
        return default

    eos = find("eos", spelled)
    if eos is None:
        raise ValueError(f"eos_token_id={config.get('eos_token_id')} of config.json is not one of the {len(numbers)} "
                         "tokens, nor is <|endoftext|>; set it to the token that ends a text")
    special = {"bos": find("bos", eos), "eos": eos, "pad": find("pad", eos)}
    return special | {role: numbers[f"<{role}>"] for role in ("mask", "sep") if f"<{role}>" in numbers}


def _compare(folder, ours: Tokenizer, fast: tokenizers.Tokenizer) -> None:
    prefix = [ours.bos_id] if ours.prompt_bos else []
    for text in _PROBES:
        here, there = prefix + ours.encode(text), fast.encode(text).ids
        if here != there:
            raise ValueError(f"the tokenizer of {folder} is not GPT-2's byte-level BPE, or not as it is here: it reads "
                             f"{text!r} as {there[:8]}, this one as {here[:8]}")


def _fast_of_bytes(tokenizer: ByteLevelBPETokenizer) -> tokenizers.Tokenizer:
    files = tokenizer.files()
    pairs = [tuple(line.split(" ")) for line in files["merges.txt"].decode().split("\n")
             if line.strip() and not line.startswith("#version")]
    fast = tokenizers.Tokenizer(models.BPE(vocab=json.loads(files["vocab.json"]), merges=pairs))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return fast


def _fast_of_sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.files()["tokenizer.model"])
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = proto.trainer_spec.unk_id
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        model = models.Unigram(scores, unk_id=unknown, byte_fallback=True)
    else:
        numbers = {piece: index for index, (piece, _) in enumerate(scores)}
        model = models.BPE(vocab=numbers, merges=_merges(scores, numbers), unk_token=scores[unknown][0],
                           fuse_unk=True, byte_fallback=True)
    fast = tokenizers.Tokenizer(model)
    fast.normalizer = normalizers.Replace(" ", "\u2581")
    fast.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast


def _merges(scores: list[tuple[str, float]], numbers: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose union has the highest score; merges are that order, written out."""
    merges = []
    for piece, score in scores:
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [(-score, left, right) for left, right in splits if left in numbers and right in numbers]
    merges.sort(key=lambda merge: (merge[0], numbers[merge[1]], numbers[merge[2]]))
    return [(left, right) for _, left, right in merges]


def tokenizer_of(path: str | os.PathLike, config: dict, generation: dict) -> Tokenizer:
    """The tokenizer that ``path`` holds, as of Hugging Face where it is a folder of GPT-2's files."""
    path = Path(path)
    if path.is_dir() and not (path / "tokenizer_meta.json").is_file() and not list(path.glob("*.model")):
        return read_tokenizer(path, config, generation)
    return load_tokenizer(path)
