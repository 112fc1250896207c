"""The header of a GGUF file: its metadata, and where its tensors lie.

Format: docs/gguf.md of ggml, versions 2 and 3. `gguf.GGUFReader` makes an array of each element of
each list, which takes 20 s and 700 MB for a vocabulary of 262,144 tokens; this takes half a second.
"""

import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
_STRING = 8
_ARRAY = 9
_DEFAULT_ALIGNMENT = 32


class StoredTensor(NamedTuple):
    """A tensor of the file. ``dims``: the fastest first. ``kind``: number of its ggml type.
    ``start``: byte from the beginning of the file."""

    name: str
    dims: tuple[int, ...]
    kind: int
    start: int


class Header(NamedTuple):
    """The ``metadata`` of a GGUF file by key, and its ``tensors``."""

    metadata: dict[str, Any]
    tensors: list[StoredTensor]


def read_header(path: str | os.PathLike) -> Header:
    """Return the header of the GGUF file at ``path``.

    Raises ValueError if the file is damaged, cut off in the header, or of another version.
    """
    size = Path(path).stat().st_size
    try:
        if size < 24:
            raise ValueError(f"it has {size} bytes")
        return _Parser(np.memmap(path, np.uint8, "r")).header()
    except (ValueError, IndexError, KeyError, struct.error, OverflowError) as error:
        raise ValueError(
            f"{path} is damaged or not a GGUF file ({type(error).__name__}: {error}); copy it again"
        ) from None


class _Parser:
    def __init__(self, file: np.memmap):
        self._file = memoryview(file)
        self._at = 0

    def header(self) -> Header:
        magic, version, tensors, pairs = self._unpack("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {bytes(magic)!r} and version {version}, not 2 or 3")
        metadata = {}
        for _ in range(pairs):
            key = self._string()
            (kind,) = self._unpack("I")
            metadata[key] = self._value(kind)
        found = []
        for _ in range(tensors):
            name = self._string()
            (count,) = self._unpack("I")
            dims = self._unpack(f"{count}Q")
            kind, offset = self._unpack("IQ")
            found.append(StoredTensor(name, dims, kind, offset))
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        data = -(-self._at // alignment) * alignment
        return Header(metadata, [each._replace(start=data + each.start) for each in found])

    def _unpack(self, form: str) -> tuple:
        found = struct.unpack_from(f"<{form}", self._file, self._at)
        self._at += struct.calcsize(f"<{form}")
        return found

    def _string(self) -> str:
        (size,) = self._unpack("Q")
        stop = self._at + size
        if stop > len(self._file):
            raise ValueError("a text goes beyond the end")
        text = str(self._file[self._at : stop], "utf-8", "replace")
        self._at = stop
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_SCALARS[kind])[0]
        inner, count = self._unpack("IQ")
        if inner in _SCALARS:
            return list(self._unpack(f"{count}{_SCALARS[inner]}"))
        if count > len(self._file):
            raise ValueError(f"a list has {count} entries")
        return [self._value(inner) for _ in range(count)]
