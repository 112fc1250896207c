"""Recognize a model of Hugging Face's, without importing what reads it."""

import json
import os
from pathlib import Path

from mtnlg_jax.storage import is_remote


def is_gguf(path: str | os.PathLike) -> bool:
    return os.fspath(path).endswith(".gguf")


def folder_of(path: str | os.PathLike) -> str:
    """Return the folder of a model that is named by its config.json or by one of its weights; other
    paths as they are."""
    path = os.fspath(path)
    folder, name = os.path.split(path)
    named = name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json"))
    return (folder or os.curdir) if named and os.path.isfile(path) else path


def is_model(path: str | os.PathLike) -> bool:
    """Return whether ``path`` is a folder of Hugging Face's, its config.json or weights, or a GGUF
    file. Runs have a config.json as well, but no model_type in it."""
    if is_remote(path):
        return False
    if is_gguf(path):
        return os.path.isfile(path)
    path = folder_of(path)
    if os.path.isdir(os.path.join(path, "checkpoints")):
        return False
    try:
        found = json.loads(Path(path, "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "model_type" in found
