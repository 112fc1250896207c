"""Read the parameters of a checkpoint one at a time, by layer where they are stored by layer.

This is for decoding, where the memory of a second copy matters, and so does the time to import the
training code.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from mtnlg_jax.model.params import names_of
from mtnlg_jax.storage import is_remote


class StoredArrays:
    """The arrays below ``path``, written by Orbax, as numpy arrays by name."""

    def __init__(self, path: epath.Path) -> None:
        # Imported where it is used, to keep the import of this module fast.
        import tensorstore as ts

        self._path = path
        base = f"{path}/" if is_remote(path) else {"driver": "file", "path": os.path.join(path, "")}
        # No cache: the caller keeps each array, or drops it for good.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._store = {"driver": "ocdbt", "base": base}
        self._whole: tuple[str, np.ndarray] | None = None

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """Return the array ``name``, or entry ``index`` along its first dim (a layer).

        An array that is stored in one piece is kept until another one is read. Raise ValueError
        naming the array and its layer where an element is not finite.
        """
        array = self._open(name)
        if index is None:
            found = array.read().result()
        # Stored by layer: one layer can be read without the others.
        elif array.chunk_layout.read_chunk.shape[0] == 1:
            found = array[index].read().result()
        else:
            if self._whole is None or self._whole[0] != name:
                self._whole = None  # free it before the next one is read
                self._whole = name, array.read().result()
            found = self._whole[1][index]
        label = name if index is None else f"{name} of layer {index}"
        check_finite(found, label, f"checkpoint {self._path.parent}")
        return found

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) of a table, one stored piece at a time."""
        array = self._open(name)
        # A read that is not aligned to the stored pieces would read some of them twice.
        rows = array.chunk_layout.read_chunk.shape[0]
        for start in range(0, array.shape[0], rows):
            found = array[start : start + rows].read().result()
            check_finite(found, name, f"checkpoint {self._path.parent}")
            yield start, found

    def _open(self, name: str) -> Any:
        import tensorstore as ts

        spec = {"driver": "zarr", "kvstore": self._store | {"path": f"{name}/"}}
        return ts.open(spec, open=True, read=True, context=self._context).result()


class Held:
    """Parameters in memory, by the interface of `StoredArrays`."""

    def __init__(self, params: Any) -> None:
        self._arrays = names_of(params)

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        array = np.asarray(self._arrays[name])
        return array if index is None else array[index]

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        yield 0, self.read(name)


def check_finite(array: np.ndarray, name: str, source: str) -> None:
    """Raise ValueError where an element of ``array``, parameter ``name`` of ``source``, is NaN or
    infinite."""
    # A sum is faster than a test of each element, and is finite only if all of them are.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum(dtype=np.float32)):
            return
    # A sum of finite numbers may overflow as well, so each element decides.
    nonfinite = ~np.isfinite(array)
    if nonfinite.any():
        raise ValueError(
            f"parameter {name} of {source} has {int(nonfinite.sum()):,} of {nonfinite.size:,} "
            f"numbers that are not finite, the first of them {array[nonfinite][0]}; use another "
            "checkpoint (--checkpoint), or convert or train the model again"
        )
