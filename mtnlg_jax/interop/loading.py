"""Use a model of another project as a run, without conversion."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from mtnlg_jax.data.tokenizer import Tokenizer, load_tokenizer
from mtnlg_jax.decode.cache import TABLES
from mtnlg_jax.foreign import folder_of
from mtnlg_jax.interop import vocabulary
from mtnlg_jax.interop.adapter_runs import open_merged
from mtnlg_jax.interop.adapters import Merged
from mtnlg_jax.interop.families import family_of, model_of
from mtnlg_jax.interop.recognize import is_adapter
from mtnlg_jax.interop.source import Source, meta_of, read_config
from mtnlg_jax.model.params import names_of
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel import host
from mtnlg_jax.parallel.mesh import shardings_of
from mtnlg_jax.train.adapted_arrays import WithAdapter
from mtnlg_jax.train.checkpoint import Run


def tokenizer_for_data(path: str | os.PathLike) -> Tokenizer | None:
    """Return the tokenizer of the model at ``path`` if the one that `load_tokenizer` returns has
    more tokens than the model has rows, else None. Tensors are not read."""
    folder = Path(folder_of(path))
    # GGUF files, adapters and checkpoints of other trainers have none.
    if not (folder / "config.json").is_file():
        return None
    original = read_config(folder)
    try:
        rows = model_of(original).vocabulary
    except ValueError:  # data may be prepared for a model that does not run here
        return None
    if load_tokenizer(folder).vocab_size <= rows:
        return None
    inner = family_of(original)[1]
    texts = original | {key: each for key, each in inner.items() if each is not None}
    generation = vocabulary.read_json(folder / "generation_config.json") or {}
    return vocabulary.read_tokenizer(folder, texts, generation, rows)[0]


def open_model(
    path: str | os.PathLike, adapter: str | os.PathLike | None = None, which: str = "best"
) -> tuple[Run, Source | Merged | WithAdapter]:
    """Return the model at ``path`` as a run without parameters, and where those are read.

    With an ``adapter`` it is merged; then ``path`` may also be a run, with its checkpoint
    ``which``. A ``path`` that is an adapter is merged into the base that it names.
    """
    if adapter is not None:
        return open_merged(adapter, path, which)
    if is_adapter(path):
        return open_merged(path)
    source = Source(path)
    settings = source.settings()
    return Run(settings.config, None, settings.tokenizer, 0, meta_of(settings, source)), source


def load_model(
    path: str | os.PathLike,
    mesh: Mesh | None = None,
    zero: int = 0,
    vocab_padding: int = 0,
    adapter: str | os.PathLike | None = None,
    which: str = "best",
) -> Run:
    """Return the model at ``path``, with its parameters, as `train.checkpoint.load_run` returns a
    run. The arguments ``adapter`` and ``which`` are those of `open_model`."""
    run, source = open_model(path, adapter, which)
    model = dataclasses.replace(run.config.model, vocab_padding=vocab_padding)
    abstract = abstract_model(model)[1]
    leaves = names_of(abstract)
    if mesh is None:
        places = dict.fromkeys(leaves, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        places = names_of(shardings_of(abstract, mesh, zero))
    targets = {
        name: host.Filling(leaf.shape, np.float32, places[name]) for name, leaf in leaves.items()
    }
    # Layer by layer, or as the files have them: each tensor is read once.
    wanted: list[tuple[str, int | None]] = [
        (name, None) for name in targets if not name.startswith("blocks.")
    ]
    wanted += [
        (name, layer)
        for layer in range(model.num_layers)
        for name, target in targets.items()
        if name.startswith("blocks.") and target.holds(layer)
    ]

    def read() -> Iterator[tuple[str, int, np.ndarray]]:
        for name, layer in source.in_file_order(wanted):
            if layer is not None:
                yield name, layer, source.read(name, layer)[None]
                continue
            for start, rows in source.blocks(name) if name in TABLES else [(0, source.read(name))]:
                yield name, start, rows

    for name, start, rows in host.one_ahead(read()):
        targets[name].write(start, rows)
    arrays = [target.array() for target in targets.values()]
    params = jax.tree.unflatten(jax.tree.structure(abstract), arrays)
    config = dataclasses.replace(run.config, model=model)
    return dataclasses.replace(run, config=config, params=params)
