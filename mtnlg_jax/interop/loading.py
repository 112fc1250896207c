"""Use a model of another project as a run, without conversion."""

import os

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from mtnlg_jax.decode.load import names_of
from mtnlg_jax.interop.adapter_runs import open_merged
from mtnlg_jax.interop.adapters import Merged
from mtnlg_jax.interop.recognize import is_adapter
from mtnlg_jax.interop.source import Source, meta_of
from mtnlg_jax.parallel.mesh import shardings_of
from mtnlg_jax.train.checkpoint import Run


def open_model(
    path: str | os.PathLike, adapter: str | os.PathLike | None = None, which: str = "best"
) -> tuple[Run, Source | Merged]:
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
    adapter: str | os.PathLike | None = None,
    which: str = "best",
) -> Run:
    """Return the model at ``path``, as `open_model` reads it, as `train.checkpoint.load_run`
    returns a run."""
    run, source = open_model(path, adapter, which)
    if mesh is None and isinstance(source, Source):
        params = source.interchange.parameters(source.tensor)
    else:
        params = _on_mesh(source, mesh, zero)
    return Run(run.config, params, run.tokenizer, run.step, run.meta)


def _on_mesh(source: Source | Merged, mesh: Mesh | None, zero: int) -> nnx.State:
    """Return the parameters on ``mesh``, or on this process's first device; the host holds one of
    them at a time."""
    abstract = source.interchange.abstract
    shardings = jax.tree.leaves(
        jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), abstract)
        if mesh is None
        else shardings_of(abstract, mesh, zero)
    )
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
