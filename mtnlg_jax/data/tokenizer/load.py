"""Opening of a tokenizer, whatever its files."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from mtnlg_jax import foreign, storage
from mtnlg_jax.data.tokenizer.base import META, ROLES, SPECIAL_IDS, Tokenizer
from mtnlg_jax.data.tokenizer.byte_level import ByteLevelBPETokenizer
from mtnlg_jax.data.tokenizer.files import (
    HubTokenizerFiles,
    companions_of,
    first_free_id,
    gpt2_files,
    read_tokenizer_files,
)
from mtnlg_jax.data.tokenizer.gguf_tokenizer import gguf_tokenizer_files
from mtnlg_jax.data.tokenizer.hub import HubTokenizer
from mtnlg_jax.data.tokenizer.roles import open_roles
from mtnlg_jax.data.tokenizer.sentence_piece import SENTENCEPIECE_FILES, SentencePieceTokenizer
from mtnlg_jax.foreign import is_gguf


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Return the tokenizer of a folder (path or URL) or a file.

    A folder is one that `Tokenizer.save` wrote, or has Hugging Face's files (tokenizer.json; or
    vocab.json and merges.txt, or vocab.txt; with the additions of tokenizer_config.json,
    special_tokens_map.json and added_tokens.json), GPT-2's encoder.json and vocab.bpe, or a
    SentencePiece model. A file is a tokenizer.json, a SentencePiece model, or a GGUF file with a
    tokenizer inside.

    Raises FileNotFoundError if there is none, ValueError if one is damaged or cannot be reproduced
    here.
    """
    if not storage.is_remote(path) and not Path(path).exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a tokenizer's folder, a tokenizer.json "
            "or a SentencePiece .model"
        )
    try:
        if is_gguf(path):
            return _load_gguf(path)
        if os.fspath(path).endswith(".json") and not Path(path).is_dir():
            return _load_json(path)
        if not storage.is_remote(path) and Path(path).is_file():
            return SentencePieceTokenizer(Path(path).read_bytes())
        return _load_folder(path)
    except (ValueError, KeyError) as error:
        raise ValueError(f"tokenizer {path}: {error}") from None


def _load_gguf(path: str | os.PathLike) -> Tokenizer:
    """Open the tokenizer inside a GGUF file."""
    if storage.is_remote(path):
        raise ValueError(f"{path} is remote, and GGUF is read from a local disk; copy it")
    read = gguf_tokenizer_files(path)
    found = read_tokenizer_files(read)
    assert found is not None  # the files hold a tokenizer.json
    tokenizer = _of_hub_files(found)
    tokenizer.companions = companions_of(read)
    return tokenizer


def tokenizer_for_data(path: str | os.PathLike) -> Tokenizer:
    """Return the tokenizer at ``path`` to prepare data with.

    It is that of `load_tokenizer`, which adds the roles that a new model may need. If ``path`` is a
    model (`foreign`) without rows for them, it is the model's own.
    """
    reader = foreign.reader_of(path)
    found = None if reader is None else reader.tokenizer(path)
    return load_tokenizer(path) if found is None else found


def _load_json(path: str | os.PathLike) -> Tokenizer:
    """Open a tokenizer.json, with the settings beside it if it has that name."""
    folder, name = os.path.split(os.fspath(path))
    if name != "tokenizer.json":
        content = storage.read_file(folder, name)
        whole = json.loads(content or b"{}")
        if not isinstance(whole, dict) or "model" not in whole:
            raise ValueError(
                "not a tokenizer.json, which has a 'model'; give the folder that holds it"
            )
        found = read_tokenizer_files({"tokenizer.json": content}.get)
        companions = {}
    else:
        found = read_tokenizer_files(lambda name: storage.read_file(folder, name))
        companions = companions_of(lambda name: storage.read_file(folder, name))
    if found is None:
        raise FileNotFoundError(f"{path} does not exist; give a tokenizer.json")
    tokenizer = _of_hub_files(found)
    tokenizer.companions = companions
    return tokenizer


def _load_folder(path: str | os.PathLike) -> Tokenizer:
    files = functools.cache(lambda name: storage.read_file(path, name))
    if meta := files(META):
        return _load_saved(files, json.loads(meta))
    tokenizer = _load_foreign(path, files)
    tokenizer.companions = companions_of(files)
    return tokenizer


def _load_foreign(path: str | os.PathLike, files: Callable[[str], bytes | None]) -> Tokenizer:
    """Open a folder that `Tokenizer.save` did not write."""
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
    """Open a folder that `Tokenizer.save` wrote."""
    makers = {
        SentencePieceTokenizer.kind: (SentencePieceTokenizer, ("tokenizer.model",)),
        ByteLevelBPETokenizer.kind: (ByteLevelBPETokenizer, ("vocab.json", "merges.txt")),
        HubTokenizer.kind: (HubTokenizer, ("tokenizer.json",)),
    }
    if meta["kind"] not in makers:
        raise ValueError(
            f"{META} names the kind {meta['kind']!r}; this version reads {', '.join(makers)}"
        )
    kind, names = makers[meta["kind"]]
    contents = [files(name) for name in names]
    if None in contents:
        raise ValueError(
            f"{' and '.join(names)} should be beside {META}; copy the whole folder again"
        )
    tokenizer = kind(*contents, files(SPECIAL_IDS))
    tokenizer.prompt_bos = meta.get("prompt_bos", tokenizer.prompt_bos)
    if meta["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"its files do not have the fingerprint in {META}; copy or make them again"
        )
    tokenizer.companions = {
        name: _companion(name, files(name), digest)
        for name, digest in meta.get("companions", {}).items()
    }
    return tokenizer


def _companion(name: str, content: bytes | None, digest: str) -> bytes:
    if content is None or hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(
            f"{name} is missing or was changed since it was saved, as {META} shows; copy the whole "
            "folder again"
        )
    return content


def _of_hub_files(files: HubTokenizerFiles) -> Tokenizer:
    """Return a tokenizer for a model to be trained here."""
    if files.plain is not None:
        return ByteLevelBPETokenizer(*files.plain)
    return HubTokenizer(files.content, json.dumps(open_roles(files)).encode(), files.fast)


def _of_sentencepiece(model: bytes, files: Callable[[str], bytes | None]) -> SentencePieceTokenizer:
    """Return a SentencePiece model with the settings beside it.

    New roles are numbered after the tokens that the settings add.
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
