"""Use a model of another project as a run, without conversion."""

import os

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mtnlg_jax.decode.load import names_of
from mtnlg_jax.interop.source import Source, meta_of
from mtnlg_jax.parallel.mesh import shardings_of
from mtnlg_jax.train.checkpoint import Run


def open_model(path: str | os.PathLike) -> tuple[Run, Source]:
    """Return the model at ``path`` as a run without parameters, and where those are read."""
    source = Source(path)
    settings = source.settings()
    return Run(settings.config, None, settings.tokenizer, 0, meta_of(settings, source)), source


def load_model(path: str | os.PathLike, mesh: Mesh | None = None, zero: int = 0) -> Run:
    """Return the model at ``path`` as `train.checkpoint.load_run` returns a run."""
    run, source = open_model(path)
    if mesh is None:
        params = source.interchange.parameters(source.tensor)
    else:
        params = _on_mesh(source, mesh, zero)
    return Run(run.config, params, run.tokenizer, run.step, run.meta)


def _on_mesh(source: Source, mesh: Mesh, zero: int) -> nnx.State:
    """Return the parameters on ``mesh``; the host holds one of them at a time."""
    abstract = source.interchange.abstract
    shardings = jax.tree.leaves(shardings_of(abstract, mesh, zero))
    leaves = []
    for (name, leaf), sharding in zip(names_of(abstract).items(), shardings, strict=True):
        if name.startswith("blocks."):
            array = np.empty(leaf.shape, np.float32)
            for layer in range(leaf.shape[0]):
                array[layer] = source.read(name, layer)
        else:
            array = source.read(name)
        leaves.append(jax.make_array_from_callback(leaf.shape, sharding, array.__getitem__))
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
