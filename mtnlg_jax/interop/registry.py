"""Let Hugging Face's folders and GGUF files take the place of a run.

After `register`, `train.checkpoint.load_run`, `decode.load.load_decoder`, `config.load_config` and
train.init read them without conversion. The commands call it; programs call it themselves.
"""

import os
from typing import TYPE_CHECKING, Any

from mtnlg_jax import foreign
from mtnlg_jax.interop import recognize

if TYPE_CHECKING:
    from mtnlg_jax.config import Config
    from mtnlg_jax.interop.source import Source
    from mtnlg_jax.train.checkpoint import Run


class HuggingFace:
    """A `foreign.Reader`. Imports wait until a model is read."""

    def is_model(self, path: str | os.PathLike) -> bool:
        return recognize.is_model(path)

    def config(self, path: str | os.PathLike) -> "Config":
        from mtnlg_jax.interop.source import read_run

        return read_run(path)

    def settings(self, path: str | os.PathLike) -> tuple["Config", tuple]:
        from mtnlg_jax.data.tokenizer import load_tokenizer
        from mtnlg_jax.interop.source import Source

        source = Source(path)
        settings = source.settings()
        # Text has the same ids with the files alone and with the roles that the model gives them.
        return settings.config, (settings.tokenizer, load_tokenizer(source.folder))

    def tokenizer(self, path: str | os.PathLike) -> Any:
        from mtnlg_jax.interop.loading import tokenizer_for_data

        return tokenizer_for_data(path)

    def open(self, path: str | os.PathLike) -> tuple["Run", "Source"]:
        from mtnlg_jax.interop.loading import open_model

        return open_model(path)

    def load(self, path: str | os.PathLike, mesh: Any, zero: int, vocab_padding: int) -> "Run":
        from mtnlg_jax.interop.loading import load_model

        return load_model(path, mesh, zero, vocab_padding)


_READER = HuggingFace()


def register() -> None:
    """Let runs be such models."""
    foreign.register(_READER)
