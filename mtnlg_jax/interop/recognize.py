"""Recognize a model of another project, without importing what reads it."""

import json
import os
from pathlib import Path

from mtnlg_jax.foreign import folder_of, is_gguf
from mtnlg_jax.storage import is_remote


def is_adapter(path: str | os.PathLike) -> bool:
    """Return whether ``path`` is a folder that PEFT has saved."""
    return not is_remote(path) and os.path.isfile(os.path.join(path, "adapter_config.json"))


MEGATRON_LATEST = "latest_checkpointed_iteration.txt"


def megatron_format(folder: str | os.PathLike) -> str | None:
    """Return the format of one iteration of Megatron-LM's: torch, torch_dist, or None."""
    folder = Path(folder)
    if any(path.is_dir() for path in folder.glob("mp_rank_*")):
        return "torch"
    try:
        if b"sharded_backend" in (folder / "metadata.json").read_bytes():
            return "torch_dist"
    except OSError:
        pass
    return "torch_dist" if (folder / "common.pt").is_file() else None


def is_megatron(path: str | os.PathLike) -> bool:
    """Return whether ``path`` is a checkpoint of Megatron-LM, or the folder of several."""
    if is_remote(path) or not os.path.isdir(path):
        return False
    return os.path.isfile(os.path.join(path, MEGATRON_LATEST)) or megatron_format(path) is not None


def maxtext_items(path: str | os.PathLike) -> Path | None:
    """Return the folder of a MaxText checkpoint's arrays: ``path``, items/ in it, or that of the
    last step in it. None if it is not such a checkpoint."""
    if is_remote(path) or not os.path.isdir(path):
        return None
    folder = Path(path)
    last = max((int(each.name) for each in folder.iterdir() if each.name.isdigit()), default=None)
    for place in (folder, folder / "items", folder / str(last) / "items"):
        metadata = place / "_METADATA"
        if metadata.is_file() and b"token_embedder" in metadata.read_bytes():
            return place
    return None


def is_model(path: str | os.PathLike) -> bool:
    """Return whether ``path`` is a folder of Hugging Face's, its config.json or weights, a GGUF
    file, or a checkpoint of Megatron-LM or MaxText. Runs have a config.json as well, but no
    model_type in it."""
    if is_remote(path):
        return False
    if is_gguf(path):
        return os.path.isfile(path)
    path = folder_of(path)
    if os.path.isdir(os.path.join(path, "checkpoints")):
        return False
    if is_megatron(path) or maxtext_items(path) is not None:
        return True
    try:
        found = json.loads(Path(path, "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "model_type" in found
