"""The tensors of a run in a family's names, for `shards.write_shards`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.interop.families import FAMILIES
from mtnlg_jax.interop.interchange import Interchange, stored_names
from mtnlg_jax.model.params import names_of

# In the folder of originals: tensors that the run's parameters do not give back bit for bit.
KEPT = "kept.safetensors"
TYPES = 2  # rows of BERT's table of token types where a run has none of its own


class Written:
    """The tensors of ``params`` as ``family`` stores them, by name.

    ``origin`` is what `source.Source.origin` returned when the run was converted; without one the
    run was trained here. ``kept`` are the tensors of `source.Source.inexact`.
    """

    def __init__(
        self,
        model: ModelConfig,
        family: str,
        params: Any,
        origin: dict | None = None,
        kept: Mapping[str, np.ndarray] | None = None,
    ):
        self.family = FAMILIES[family]
        self.interchange = Interchange(model, self.family)
        self._arrays = names_of(params)
        self._kept = kept or {}
        origin = origin or {}
        stored = origin.get("dtypes", {})
        # Runs of before there were families have names without the prefix.
        names = stored_names(self.family, stored)
        self.origin_dtypes = {name: stored[full] for name, full in names.items()}
        self._prefix = origin.get("prefix", self.family.prefix)
        self.names = list(self.interchange.table)
        self.added = {
            entry.tensor.add for entry in self.interchange.table.values() if entry.tensor.add
        }
        self.names += sorted(self.added)
        copies = [name for name in self.origin_dtypes if self.interchange.copied(name)]
        self.names += copies
        if self.family.head in copies and self.family.embedding not in self.origin_dtypes:
            self.names.remove(self.family.embedding)  # only the output embedding was stored

    def stored_name(self, name: str) -> str:
        """Return the name in the files: without the prefix if the original had none."""
        if self.interchange.model.parallel_residual == "two_norms":
            for pattern, replacement in self.family.two_norms:
                name = re.sub(pattern, replacement, name)
        return name if self._prefix else name.removeprefix(self.family.prefix)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.added:
            return self._added(name).shape
        return self.interchange.table[self.interchange.copied(name) or name].shape

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a tensor, float32, with the original's bits where training left them."""
        name = self.interchange.copied(name) or name
        if name in self.added:
            return self._added(name)
        values = self._with_rest(name, self.interchange.tensor(name, self._arrays))
        if name in self._kept:
            original = self._kept[name]
            parts = self.interchange.parts(name, self._kept.__getitem__)
            again = self._with_rest(name, self.interchange.joined(name, parts))
            values = np.where(values == again, original.astype(np.float32), values)
        return values

    def _with_rest(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Subtract what was added, and put back rows that are never used."""
        tensor = self.interchange.table[name].tensor
        if tensor.add is not None:
            rows = rows - self._added(tensor.add)[:1]
        if tensor.skip:
            unused = np.zeros((tensor.skip, *rows.shape[1:]), np.float32)
            if name in self._kept:
                unused = self._kept[name][: tensor.skip].astype(np.float32)
            rows = np.concatenate([unused, rows])
        return rows

    def _added(self, name: str) -> np.ndarray:
        if name in self._kept:
            return self._kept[name].astype(np.float32)
        return np.zeros((TYPES, self.interchange.model.hidden_size), np.float32)


def read_kept(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors in KEPT of ``folder``; none if there is no such file."""
    path = folder / KEPT
    return load_file(path) if path.is_file() else {}
