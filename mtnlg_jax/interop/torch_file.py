"""Read files of torch.save without PyTorch, and without running what they pickle.

A file is a zip archive: a pickle of the objects, and the numbers of each storage, uncompressed. The
pickle may only name classes that checkpoints have. Except for plain containers they become `Inert`
objects, which compute nothing; tensors become `Tensor`s, whose numbers stay on disk until read.
"""

import argparse
import collections
import io
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

# Modules that checkpoints of Megatron-LM name. Their classes are not imported.
MODULES = (
    *("torch", "megatron", "transformer_engine", "apex", "nvidia_resiliency_ext", "nemo"),
    *("numpy", "ml_dtypes", "argparse", "collections", "pathlib", "enum", "datetime", "types"),
)
_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "Float8_e4m3fnStorage": np.dtype(ml_dtypes.float8_e4m3fn),
    "Float8_e5m2Storage": np.dtype(ml_dtypes.float8_e5m2),
}


class Inert:
    """An object of a class that is not imported: its arguments and attributes."""

    qualified = ""

    def __new__(cls, *args: Any, **more: Any) -> "Inert":
        made = object.__new__(cls)
        made.__dict__["arguments"] = args
        return made

    def __init__(self, *args: Any, **more: Any):
        """The arguments were taken by __new__."""

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        self.__dict__["state"] = state
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update({str(key): value for key, value in part.items()})

    def append(self, item: Any) -> None:
        self.__dict__.setdefault("items", []).append(item)

    def extend(self, items: Any) -> None:
        self.__dict__.setdefault("items", []).extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Entries of a dict are not needed."""


class Tensor:
    """A tensor on disk; `numpy` reads it."""

    def __init__(self, storage: "_Storage", offset: int, shape: Any, strides: Any):
        self._storage = storage
        self._offset = int(offset)
        self.shape = tuple(int(each) for each in shape)
        self._strides = tuple(int(each) for each in strides)
        self.dtype = storage.dtype

    def numpy(self) -> np.ndarray:
        """Return the numbers, mapped from the file."""
        flat = self._storage.mapped()
        last = self._offset + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self._strides, strict=True)
        )
        if min((self._offset, *self._strides)) < 0 or (0 not in self.shape and last >= flat.size):
            raise ValueError(
                f"{self._storage.where} has a tensor beyond its storage; copy it again"
            )
        item = flat.itemsize
        return np.lib.stride_tricks.as_strided(
            flat[self._offset :],
            self.shape,
            [stride * item for stride in self._strides],
            writeable=False,
        )


class _Storage:
    """Numbers at a place in a file."""

    def __init__(self, where: str, read: Callable[[], bytes | memoryview], dtype: np.dtype):
        self.where = where
        self._read = read
        self.dtype = dtype

    def mapped(self) -> np.ndarray:
        data = self._read()
        return np.frombuffer(data, self.dtype, len(data) // self.dtype.itemsize)


class _Part(io.RawIOBase):
    """Bytes ``start`` to ``start + length`` of mapped bytes, as a file."""

    def __init__(self, view: memoryview):
        super().__init__()
        self._view = view
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._view))[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._view[self._at : self._at + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


class _Call:
    """A function that a pickle may call, and cannot change."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]):
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError(f"it would set {name} of a function")

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Tensor:
    return Tensor(storage, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _typed(make: Callable, kind: Any, arguments: tuple, *_: Any) -> Any:
    return make(*arguments)


def _characters(text: str, encoding: str = "latin1") -> bytes:
    return text.encode(encoding)


# Replacements of the functions and classes with which plain data is pickled.
_PLAIN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Call(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Call(_typed),
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _Call(_characters),
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "slice"): slice,
    ("builtins", "range"): range,
}
_NAMESPACES = (("argparse", "Namespace"), ("types", "SimpleNamespace"))
# Named, never called.
_INERT = {
    *(("builtins", name) for name in ("getattr", "int", "float", "list", "dict", "object")),
    ("_io", "BytesIO"),
    ("copyreg", "_reconstructor"),
    ("signal", "Signals"),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, where: str, storage: Callable[[str, np.dtype], _Storage]):
        super().__init__(file)
        self._where = where
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if (module, name) in _NAMESPACES:
            return type(name, (argparse.Namespace,), {})  # a new one, as a pickle may change it
        if module.partition(".")[0] not in MODULES and (module, name) not in _INERT:
            raise ValueError(
                f"{self._where} asks to run {module}.{name}, which no checkpoint needs; do not "
                "use this file, and get the checkpoint from its author again"
            )
        return type(name, (Inert,), {"qualified": f"{module}.{name}"})

    def persistent_load(self, what: Any) -> _Storage:
        _, kind, key, *_ = what
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        if name not in _STORAGES:
            raise ValueError(
                f"{self._where} holds numbers of the type {name}; known are {', '.join(_STORAGES)}"
            )
        return self._storage(str(key), _STORAGES[name])


def unpickle(data: bytes, where: str) -> Any:
    """Return what a pickle without tensors holds."""

    def none(key: str, dtype: np.dtype) -> _Storage:
        raise ValueError(f"{where} holds tensors, which it may not")

    return _guarded(where, lambda: _Unpickler(io.BytesIO(data), where, none).load())


def load(path: str | os.PathLike, start: int = 0, length: int | None = None) -> Any:
    """Return what torch.save wrote to ``path``, or to ``length`` bytes of it from ``start``.

    Raises FileNotFoundError if the file is missing; ValueError if it is damaged, or asks to run
    anything.
    """
    where = str(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        end = size if length is None else start + length
        if end > size or not size:
            raise ValueError(f"{where} ends after {size:,} of {end:,} bytes; copy it again")
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return _guarded(where, lambda: _load(mapped[start:end], where))


def _guarded(where: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ValueError:
        raise
    except Exception as error:  # damaged pickles fail in many ways
        line = str(error).partition("\n")[0]
        raise ValueError(
            f"{where} is damaged or not a file of torch.save ({type(error).__name__}: {line}); "
            "copy it again"
        ) from None


def _load(view: memoryview, where: str) -> Any:
    if bytes(view[:4]) != b"PK\x03\x04":
        raise ValueError(
            f"{where} is not a zip file, as torch.save has written since PyTorch 1.6; if it is "
            "older, load it there and save it again"
        )
    try:
        archive = zipfile.ZipFile(io.BufferedReader(_Part(view)))
    except zipfile.BadZipFile:
        raise ValueError(f"{where} is cut off or damaged; copy it again") from None
    names = {name.partition("/")[2]: name for name in archive.namelist()}
    if "data.pkl" not in names:
        raise ValueError(f"{where} has no data.pkl, so torch.save did not write it")
    if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
        raise ValueError(f"{where} has its numbers in another byte order; save it on x86 or ARM")

    def storage(key: str, dtype: np.dtype) -> _Storage:
        entry = f"data/{key}"
        if entry not in names:
            raise ValueError(f"{where} lacks {entry}; copy it again")
        return _Storage(where, lambda: _numbers(view, archive.getinfo(names[entry]), where), dtype)

    return _Unpickler(archive.open(names["data.pkl"]), where, storage).load()


def _numbers(view: memoryview, entry: zipfile.ZipInfo, where: str) -> memoryview:
    """Return an entry's bytes, mapped."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{where} is compressed; save it again with torch.save")
    head = entry.header_offset
    name, extra = struct.unpack("<HH", view[head + 26 : head + 30])
    start = head + 30 + name + extra
    return view[start : start + entry.file_size]
