"""Models of other projects that take the place of a run.

The package that knows a format registers its reader, so that the packages below need not import
it: `interop.registry` for Hugging Face's folders, GGUF files, PEFT's adapters, and checkpoints of
Megatron-LM and MaxText.
"""

import os
from typing import Any, Protocol

# Folder in a run that came from such a model: the original config.json, tokenizer and settings of
# generation, from which export writes a model of the same form.
ORIGINALS = "huggingface"


def is_gguf(path: str | os.PathLike) -> bool:
    return os.fspath(path).endswith(".gguf")


def folder_of(path: str | os.PathLike) -> str:
    """Return the folder of a model that is named by its config.json or by one of its weights; other
    paths as they are."""
    path = os.fspath(path)
    folder, name = os.path.split(path)
    named = name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json"))
    return (folder or os.curdir) if named and os.path.isfile(path) else path


class Reader(Protocol):
    """A reader of models of other formats."""

    def is_model(self, path: str | os.PathLike) -> bool:
        """Return whether ``path`` is a model that this reader reads."""

    def config(self, path: str | os.PathLike) -> Any:
        """Return the Config of a run with the model, without reading its parameters."""

    def settings(self, path: str | os.PathLike) -> tuple[Any, tuple]:
        """Return (Config, the tokenizers with which data for the model may be prepared)."""

    def tokenizer(self, path: str | os.PathLike) -> Any:
        """Return the model's own tokenizer if data for the model needs it, else None.

        That is so if the model has no rows for the roles that preparing data adds to a tokenizer.
        """

    def open(self, path: str | os.PathLike) -> tuple[Any, Any]:
        """Return (the Run without parameters, its parameters as `train.arrays.StoredArrays`)."""

    def keep(self, path: str | os.PathLike, folder: str | os.PathLike) -> None:
        """Write the content of ORIGINALS into the empty ``folder``."""

    def load(self, path: str | os.PathLike, mesh: Any, zero: int, vocab_padding: int) -> Any:
        """Return the Run, with its parameters on one device or on ``mesh``, and with
        ``vocab_padding`` rows of padding behind the vocabulary."""


_READERS: list[Reader] = []


def register(reader: Reader) -> None:
    """Let ``reader`` read the models that it recognizes. A second call changes nothing."""
    if reader not in _READERS:
        _READERS.append(reader)


def reader_of(path: str | os.PathLike) -> Reader | None:
    """Return the reader of the model at ``path``; None for a run, or if none is registered."""
    return next((reader for reader in _READERS if reader.is_model(path)), None)
