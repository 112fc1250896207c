"""The folder of a run that is a converted model, or that started from one."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mtnlg_jax.config import Config, to_json
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.foreign import ORIGINALS
from mtnlg_jax.interop import vocabulary
from mtnlg_jax.interop.adapter_runs import RunBase
from mtnlg_jax.interop.adapters import Base
from mtnlg_jax.interop.shards import write_tensors
from mtnlg_jax.interop.source import Source
from mtnlg_jax.interop.written import KEPT
from mtnlg_jax.train.checkpoint import Checkpoints

# Placed in a converted run.
_CONFIG = '''"""The settings of this run, to train it further (WORKDIR is this folder):

    python launch/prepare_data.py --input=TEXT --output=OUT --tokenizer=WORKDIR/tokenizer
    python launch/pretrain.py --config=WORKDIR/config.py --set=data.path=OUT --workdir=WORKDIR
"""

from pathlib import Path

from mtnlg_jax.config import Config, from_json


def get_config() -> Config:
    return from_json(Path(__file__).with_name("config.json").read_text())
'''


def write_run(
    folder: Path,
    config: Config,
    tokenizer: Tokenizer,
    shapes: dict[str, tuple[int, ...]],
    parts: Iterable[tuple[str, int | None, np.ndarray]],
    meta: dict,
) -> None:
    """Write a run of parameters alone; ``shapes`` and ``parts`` are those of
    `train.checkpoint.Checkpoints.save_parameters`."""
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        checkpoints.save_parameters(0, shapes, parts, meta)
    finally:
        checkpoints.close()
    tokenizer.save(folder / "tokenizer")
    (folder / "config.json").write_text(to_json(config))
    (folder / "config.py").write_text(_CONFIG)


def keep_originals(base: Base, folder: Path, own_tokenizer: bool = True) -> None:
    """Write into ``folder``, ORIGINALS of a run, what the way back needs: config.json, the
    tokenizer unless another one was given, and tensors that parameters do not give back bit for
    bit. A run that is the ``base`` of an adapter may have them itself."""
    if not isinstance(base, Source):
        if isinstance(base, RunBase) and (base.path / ORIGINALS).is_dir():
            shutil.copytree(base.path / ORIGINALS, folder)
        return
    folder.mkdir()
    for name in base.files():
        if own_tokenizer or name not in vocabulary.FILES:
            shutil.copyfile(base.folder / name, folder / name)
    if base.original and not base.returns:
        content = json.dumps(base.original, indent=2) + "\n"
        (folder / "config.json").write_text(content)
    kept = base.inexact() if base.returns else {}
    if kept:
        write_tensors(folder / KEPT, kept)
