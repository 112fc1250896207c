"""Rows with an image or features: what is ahead of the text goes to a file of its own.

In the spool of texts each prompt begins with a key, the hash of what is ahead of it. So equal
images are stored once, and all rows of one image are held out together.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np

from mtnlg_jax.data.prefix.arrays import features_of, image_of
from mtnlg_jax.data.read.open_files import Damaged
from mtnlg_jax.data.read.pairs import Pair, pair_maker, template_keys

KEY_BYTES = 16  # of the hash, in hexadecimal digits


class PrefixInput(NamedTuple):
    """Where rows have what is ahead of their text."""

    key: str  # of a row, or the column
    image_size: int = 0  # to which images are resized; 0: features
    image_channels: int = 3


class PrefixRows:
    """Makes a `Pair` of each row, for `read_documents`, and keeps its image or features.

    ``shape`` is that of all of them; () before the first. Memory: about 100 bytes for each that
    is different.
    """

    def __init__(self, given: PrefixInput, prompt: str, answer: str, folder: str):
        self._given = given
        self._folder = folder
        self._make_pair = pair_maker(prompt, answer)
        self._columns = (*sorted(template_keys(prompt, answer)), given.key)
        self._numbers: dict[bytes, int] = {}
        self._file: IO[bytes] | None = None
        size = given.image_size
        self.shape: tuple[int, ...] = (size, size, given.image_channels) if size else ()

    @contextlib.contextmanager
    def keeping_in(self, folder: str) -> Iterator[None]:
        """Write what is read to a file in ``folder``, until the block ends."""
        with tempfile.TemporaryFile(dir=folder) as self._file:
            yield

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self._given.image_size else "<f4")

    def columns(self, names: list[str]) -> list[str] | Damaged:
        """Return the columns of a Parquet file to read."""
        missing = [name for name in self._columns if name not in names]
        if missing:
            return Damaged(f"no column {missing[0]!r} among {', '.join(names[:8])}")
        return list(self._columns)

    def __call__(self, row: object) -> Pair:
        if not isinstance(row, dict) or row.get(self._given.key) is None:
            kind = "the row" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise ValueError(f"{kind} has nothing under {self._given.key!r}")
        pair = self._make_pair(row)
        pair.prompt = self._keep(self._read(row[self._given.key])).decode() + pair.prompt
        return pair

    def _read(self, value: object) -> np.ndarray:
        given = self._given
        try:
            if given.image_size:
                return image_of(value, given.image_size, given.image_channels, self._folder)
            found = features_of(value, self._folder)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None  # of this row; the others may be good
        if self.shape and found.shape != self.shape:
            raise ValueError(
                f"features of shape {found.shape}, and the first row has {self.shape}; all have "
                "the same"
            )
        self.shape = found.shape
        return found.astype(self.dtype)

    def _keep(self, array: np.ndarray) -> bytes:
        """Write ``array`` unless an equal one is there, and return its key."""
        data = np.ascontiguousarray(array).tobytes()
        key = hashlib.blake2b(data, digest_size=KEY_BYTES // 2).hexdigest().encode()
        if key not in self._numbers:
            assert self._file is not None, "keeping_in comes first"
            self._file.write(data)
            self._numbers[key] = len(self._numbers)
        return key

    def stored(self, keys: Sequence[bytes]) -> tuple[np.ndarray, Iterator[np.ndarray]]:
        """Return (the number of each document's array [documents], the different arrays in order
        of their numbers)."""
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        index = np.array([numbers[key] for key in keys], np.int64)
        return index, map(self._array, numbers)

    def _array(self, key: bytes) -> np.ndarray:
        assert self._file is not None, "keeping_in comes first"
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        self._file.seek(self._numbers[key] * size)
        return np.frombuffer(self._file.read(size), self.dtype).reshape(self.shape)
