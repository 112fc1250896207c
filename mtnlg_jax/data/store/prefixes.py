"""Images or features beside the tokens of a part: each once, with the number of every document's.

    prefixes      the arrays one after another: uint8 of images, float32 of features
    prefix_of     int64 [documents]: which of them a document has

meta.json of the tokens has "prefix": the shape of one, the type, the count, and a hash of both
arrays.
"""

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from mtnlg_jax import storage
from mtnlg_jax.config import PrefixConfig
from mtnlg_jax.data.store.tokens import Tokens, damaged, open_stored, write_shard
from mtnlg_jax.data.store.zarr import SHARD, create_array, open_array


def write_prefixes(
    location: str | os.PathLike,
    index: np.ndarray,
    arrays: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> dict:
    """Write ``arrays`` of one ``shape`` and their ``index`` [documents] below ``location``, and
    return what meta.json says of them. Holds one shard in memory."""
    digest = hashlib.sha256()
    stored = create_array(storage.join(location, "prefixes"), dtype)
    waiting: list[np.ndarray] = []
    filled = 0
    shards = 0
    count = 0
    for array in arrays:
        digest.update(array.tobytes())
        waiting.append(array.reshape(-1))
        filled += array.size
        count += 1
        while filled >= SHARD:
            joined = np.concatenate(waiting)
            stored = write_shard(stored, shards, joined[:SHARD])
            waiting = [joined[SHARD:]]
            filled -= SHARD
            shards += 1
    if filled:
        write_shard(stored, shards, np.concatenate(waiting))
    numbers = create_array(storage.join(location, "prefix_of"), np.dtype("<i8"), len(index))
    if len(index):
        numbers.write(index).result()
    digest.update(index.astype("<i8").tobytes())
    return {
        "shape": list(shape),
        "dtype": dtype.name,
        "count": count,
        "sha256": digest.hexdigest(),
    }


class Prefixes:
    """The images or features of the documents of a part.

    ``shape`` and ``dtype``: of one. ``positions``: how many it takes ahead of the tokens, which
    the model decides; see `attach`.
    """

    def __init__(self, meta: dict, stored: Any, index: np.ndarray):
        self.shape = tuple(meta["shape"])
        self.dtype = np.dtype(meta["dtype"])
        self.positions = 0
        self._stored = stored
        self._index = index

    def of_documents(self, documents: np.ndarray) -> np.ndarray:
        """Return [n, *shape] of documents [n]."""
        size = int(np.prod(self.shape))
        starts = self._index[documents] * size
        reads = [self._stored[start : start + size].read() for start in starts.tolist()]
        found = np.empty((len(documents), *self.shape), self.dtype)
        for row, read in zip(found, reads, strict=True):
            row[...] = read.result().reshape(self.shape)
        return found


def open_with_prefixes(location: str | os.PathLike) -> Tokens:
    """Open tokens as `open_stored` does, with the images or features of their documents if they
    have some."""
    tokens = open_stored(location)
    meta = tokens.meta.get("prefix")
    if meta is None:
        return tokens
    try:
        stored = open_array(storage.join(location, "prefixes"))
        index = open_array(storage.join(location, "prefix_of")).read().result()
    except ValueError as error:
        raise damaged(location, storage.first_line(error)) from None
    if stored.shape != (meta["count"] * int(np.prod(meta["shape"])),):
        raise damaged(location, f"its prefixes are not {meta['count']} of {meta['shape']}")
    if index.shape != (tokens.documents,) or not ((0 <= index) & (index < meta["count"])).all():
        raise damaged(location, f"prefix_of does not fit {tokens.documents} documents")
    tokens.prefixes = Prefixes(meta, stored, index)
    return tokens


def attach(sources: Iterable[Tokens], prefix: PrefixConfig) -> None:
    """Tell the prefixes of ``sources`` how many positions a model with ``prefix`` gives them.

    Raises ValueError if the model takes others than a source has.
    """
    for tokens in sources:
        found = tokens.prefixes
        if found is None:
            continue
        if found.shape != prefix.shape or found.dtype != prefix.dtype:
            raise ValueError(
                f"{tokens.location} has {_described(found.shape)}, and the model takes "
                f"{_described(prefix.shape)} (model.prefix); {_way_out(found)}"
            )
        found.positions = prefix.positions


def _described(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return f"images of {shape[0]} x {shape[1]} pixels and {shape[2]} channels"
    return f"features of {shape[0]} positions and width {shape[1]}" if shape else "text alone"


def _way_out(found: Prefixes) -> str:
    if len(found.shape) == 3:
        return (
            f"set model.prefix.image_size={found.shape[0]}, "
            f"model.prefix.image_channels={found.shape[2]} and model.prefix.width"
        )
    return f"set model.prefix.length={found.shape[0]} and model.prefix.width={found.shape[1]}"
