"""Recognize a model of Hugging Face's, without importing what reads it."""

import json
import os
from pathlib import Path

from mtnlg_jax.foreign import is_gguf
from mtnlg_jax.storage import is_remote


def is_adapter(path: str | os.PathLike) -> bool:
    """Return whether ``path`` is a folder that PEFT has saved."""
    return not is_remote(path) and os.path.isfile(os.path.join(path, "adapter_config.json"))


def is_model(path: str | os.PathLike) -> bool:
    """Return whether ``path`` is a folder of Hugging Face's or a GGUF file. Runs have a config.json
    as well, but no model_type in it."""
    if is_remote(path):
        return False
    if is_gguf(path):
        return os.path.isfile(path)
    if os.path.isdir(os.path.join(path, "checkpoints")):
        return False
    try:
        found = json.loads(Path(path, "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "model_type" in found
