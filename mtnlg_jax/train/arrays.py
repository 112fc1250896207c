"""Parameters of a checkpoint one at a time, by layer where they are stored so: for who decodes, the
memory of a second copy counts, and so does the time to import what trains."""

import os

import numpy as np
from etils import epath

from mtnlg_jax.storage import is_remote


class StoredArrays:
    """The arrays below ``path``, which Orbax wrote, by name, as numpy arrays."""

    def __init__(self, path: epath.Path):
        import tensorstore as ts

        self._path = path
        base = f"{path}/" if is_remote(path) else {"driver": "file", "path": os.path.join(path, "")}
        # No cache: what is read is kept elsewhere, or not at all.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._store = {"driver": "ocdbt", "base": base}
        self._whole: tuple[str, np.ndarray] | None = None

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """The array ``name``, or its entry ``index`` along its first dim (its layer). An array that
        is stored in one piece is kept until another one is asked for.

        Raises ValueError naming the array and its layer where a number of it is not finite.
        """
        array = self._open(name)
        if index is None:
            found = array.read().result()
        elif array.chunk_layout.read_chunk.shape[0] == 1:
            found = array[index].read().result()
        else:
            if self._whole is None or self._whole[0] != name:
                self._whole = None  # before the next one is read
                self._whole = name, array.read().result()
            found = self._whole[1][index]
        check_finite(
            found,
            name if index is None else f"{name} of layer {index}",
            f"checkpoint {self._path.parent}",
        )
        return found

    def blocks(self, name: str):
        """Yields (first row, rows) of a table, a stored piece at a time."""
        array = self._open(name)
        rows = array.chunk_layout.read_chunk.shape[0]
        for start in range(0, array.shape[0], rows):
            found = array[start : start + rows].read().result()
            check_finite(found, name, f"checkpoint {self._path.parent}")
            yield start, found

    def _open(self, name: str):
        import tensorstore as ts

        spec = {"driver": "zarr", "kvstore": self._store | {"path": f"{name}/"}}
        return ts.open(spec, open=True, read=True, context=self._context).result()


def check_finite(array: np.ndarray, name: str, where: str) -> None:
    """Raises ValueError where a number of ``array``, the parameter ``name`` of ``where``, is NaN or
    infinite."""
    # A sum is faster than a look at each number, and is finite only if all of them are.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum(dtype=np.float32)):
            return
    bad = ~np.isfinite(array)
    if bad.any():
        raise ValueError(
            f"parameter {name} of {where} has {int(bad.sum()):,} of {bad.size:,} numbers that are not "
            f"finite, the first of them {array[bad][0]}; take another checkpoint (--checkpoint), or "
            "convert or train the model again"
        )
