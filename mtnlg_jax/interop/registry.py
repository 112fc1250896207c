"""Let Hugging Face's folders, GGUF files, PEFT's adapters, and checkpoints of Megatron-LM and
MaxText take the place of a run.

After `register`, `train.checkpoint.load_run`, `decode.load.load_decoder`, `config.load_config` and
train.init read them without conversion. The commands call it; programs call it themselves.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtnlg_jax import foreign
from mtnlg_jax.interop import recognize

if TYPE_CHECKING:
    from mtnlg_jax.config import Config
    from mtnlg_jax.interop.adapters import Merged
    from mtnlg_jax.interop.source import Source
    from mtnlg_jax.train.adapted_arrays import WithAdapter
    from mtnlg_jax.train.checkpoint import Run


class _Reader:
    """The `foreign.Reader` of all these formats. Imports wait until a model is read."""

    def __init__(self) -> None:
        # {folder of a base: (adapter to merge when it is read, checkpoint of a run)}
        self.adapted: dict[str, tuple[str, str]] = {}

    def _adapter(self, path: str | os.PathLike) -> tuple[str | None, str]:
        return self.adapted.get(os.path.abspath(path), (None, "best"))

    def is_model(self, path: str | os.PathLike) -> bool:
        adapted = self._adapter(path)[0] is not None
        return adapted or recognize.is_adapter(path) or recognize.is_model(path)

    def config(self, path: str | os.PathLike) -> "Config":
        from mtnlg_jax.interop.source import read_run

        if self._adapter(path)[0] is None and not recognize.is_adapter(path):
            return read_run(path)
        return self.settings(path)[0]

    def settings(self, path: str | os.PathLike) -> tuple["Config", tuple]:
        from mtnlg_jax.data.tokenizer import load_tokenizer
        from mtnlg_jax.interop.source import Source

        adapter, which = self._adapter(path)
        if adapter is not None or recognize.is_adapter(path):
            from mtnlg_jax.interop.adapter_runs import open_merged, tokenizers_of

            _, merged = open_merged(adapter or path, path if adapter else None, which)
            return tokenizers_of(merged.base)
        source = Source(path)
        settings = source.settings()
        # The first one has the roles that the model gives its tokens. Both encode a text alike.
        return settings.config, (settings.tokenizer, load_tokenizer(source.tokenizer_path))

    def tokenizer(self, path: str | os.PathLike) -> Any:
        from mtnlg_jax.interop.loading import tokenizer_for_data

        return tokenizer_for_data(path)

    def open(self, path: str | os.PathLike) -> tuple["Run", "Source | Merged | WithAdapter"]:
        from mtnlg_jax.interop.loading import open_model

        return open_model(path, *self._adapter(path))

    def keep(self, path: str | os.PathLike, folder: str | os.PathLike) -> None:
        from mtnlg_jax.interop.run_folder import keep_originals

        opened: Any = self.open(path)[1]
        keep_originals(getattr(opened, "base", opened), Path(folder))

    def load(self, path: str | os.PathLike, mesh: Any, zero: int, vocab_padding: int) -> "Run":
        from mtnlg_jax.interop.loading import load_model

        return load_model(path, mesh, zero, vocab_padding, *self._adapter(path))


_READER = _Reader()


def register() -> None:
    """Let such models take the place of runs."""
    foreign.register(_READER)


def adapt(workdir: str | None, adapter: str | None, which: str = "best") -> None:
    """Merge ``adapter`` into the model at ``workdir`` whenever that is read; None: do nothing.

    It is the name of one of the run, its file, or a folder of PEFT's. ``which`` is the checkpoint
    to read if ``workdir`` is a run. Raises what `adapter_file.find` and `open_merged` raise, before
    the model is loaded.
    """
    if adapter is None:
        return
    if workdir is None:
        raise ValueError(f"--adapter={adapter} needs its base; give --workdir=BASE")
    from mtnlg_jax.interop.adapter_runs import open_merged
    from mtnlg_jax.train.adapter_file import find

    adapter = find(workdir, adapter)
    open_merged(adapter, workdir, which)
    _READER.adapted[os.path.abspath(workdir)] = (adapter, which)
