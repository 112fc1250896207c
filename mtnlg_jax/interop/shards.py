"""Read and write ``safetensors`` folders of Hugging Face: one file, or shards and an index."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mtnlg_jax.interop import mxfp4
from mtnlg_jax.parallel import host

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The types that float32 parameters hold exactly.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Shards:
    """The tensors of a folder, with ``shapes`` and ``dtypes`` by name from the headers alone.

    Memory holds only the tensor that was read. Tensors whose names match ``unread`` may have any
    dtype. Two halves of MXFP4 (`mxfp4`) are one tensor, bfloat16.

    Raises FileNotFoundError if a file is missing; ValueError if one is damaged, has a dtype that is
    not in DTYPES, or does not agree with the index.
    """

    def __init__(self, folder: str | os.PathLike, unread: str = r"\.attn\.(bias|masked_bias)$"):
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._unread = unread
        self._places: dict[str, _Place] = {}  # by tensor
        placed = self._index()
        for name in sorted(set(placed.values())) if placed else [SINGLE]:
            self._open(name)
        if placed:
            self._compare(placed)
        self._packed = self._join_packed()

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._packed:
            return mxfp4.unpack(*(self[half] for half in self._packed[name]))
        return self._part(name, 0, None)

    def _join_packed(self) -> dict[str, tuple[str, str]]:
        """Put the tensors that MXFP4 stores in two halves in place of these."""
        packed = mxfp4.pairs_of({name for name, dtype in self.dtypes.items() if dtype == "U8"})
        for name, halves in packed.items():
            if name in self.shapes:
                raise ValueError(f"{self.folder} holds {name} and {halves[0]}; keep one of them")
            self.shapes[name] = mxfp4.shape_of(name, *(self.shapes.pop(half) for half in halves))
            self.dtypes[name] = "bfloat16"
            for half in halves:
                del self.dtypes[half]
        return packed

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows of the first dim, as many of them as there are."""
        last = min(stop, self.shapes[name][0])
        if name in self._packed:
            return mxfp4.unpack(*(self._part(half, start, last) for half in self._packed[name]))
        return self._part(name, start, last)

    def _part(self, name: str, start: int, last: int | None) -> np.ndarray:
        """Return rows of a tensor of the files, all of them without ``last``."""
        place = self._places[name]
        shape = place.shape if last is None else (last - start, *place.shape[1:])
        values = host.empty(shape, place.dtype)
        row = math.prod(place.shape[1:]) * values.dtype.itemsize
        into = memoryview(values.reshape(-1).view(np.uint8))
        # Straight from the page cache into memory that a device may keep.
        with open(place.path, "rb", buffering=0) as file:
            file.seek(place.start + start * row)
            done = 0
            while done < len(into):
                count = file.readinto(into[done:])  # at most 2 GB at a time
                if not count:
                    raise ValueError(f"{place.path} ends within {name}; copy it again")
                done += count
        return values

    def position(self, name: str) -> tuple[str, int]:
        """Return where a tensor lies: its file, and the first byte in it."""
        place = self._places[self._packed[name][0] if name in self._packed else name]
        return place.path.name, place.start

    def _index(self) -> dict[str, str]:
        """Return {tensor: file} of the index; {} if there is a single file, which is preferred."""
        if (self.folder / SINGLE).is_file():
            return {}
        path = self.folder / INDEX
        if not path.is_file():
            others = sorted(found.name for found in self.folder.glob("pytorch_model*.bin"))
            found = (
                f" but {others[0]}: save it again with transformers' save_pretrained"
                if others
                else "; copy the whole folder"
            )
            raise FileNotFoundError(f"{self.folder} holds neither {SINGLE} nor {INDEX}{found}")
        try:
            placed = json.loads(path.read_bytes())["weight_map"]
            if not placed or any(Path(name).name != name for name in placed.values()):
                raise ValueError("its weight_map must name files beside it")
            unnamed = sorted(
                found.name
                for found in self.folder.glob("model-*-of-*.safetensors")
                if found.name not in placed.values()
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not an index of shards ({type(error).__name__}: {error}); copy it again"
            ) from None
        if unnamed:
            raise ValueError(
                f"{path} names no tensor in {', '.join(unnamed[:3])}, beside it; copy the index "
                "again, or remove the files of another model"
            )
        return placed

    def _open(self, file_name: str) -> None:
        path = self.folder / file_name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, and {INDEX} names it; copy all shards")
        file = open_safetensors(path)
        starts = _starts(path)
        for name in file.keys():
            if name in self._places:
                raise ValueError(f"{path} and another shard both hold {name}; keep one of them")
            header = file.get_slice(name)
            dtype = header.get_dtype()
            packed = dtype == "U8" and name.endswith((mxfp4.BLOCKS, mxfp4.SCALES))
            if dtype not in DTYPES and not packed and not re.search(self._unread, name):
                raise ValueError(
                    f"{name} in {path} is {dtype}; parameters here are float32, which holds only "
                    f"{', '.join(DTYPES)} exactly; save it as one of them"
                )
            self.shapes[name] = tuple(header.get_shape())
            self.dtypes[name] = DTYPES.get(dtype, dtype)
            kind = DTYPES.get(dtype, "uint8")
            self._places[name] = _Place(path, starts[name], self.shapes[name], kind)

    def _compare(self, placed: dict[str, str]) -> None:
        missing = sorted(placed.keys() - self.shapes.keys())
        extra = sorted(self.shapes.keys() - placed.keys())
        if missing or extra:
            raise ValueError(
                f"{self.folder / INDEX} and its shards disagree: {len(missing)} tensors are in the "
                f"index alone ({', '.join(missing[:3])}), {len(extra)} in the shards alone "
                f"({', '.join(extra[:3])}); copy all files again"
            )


class _Place(NamedTuple):
    """Where a tensor lies in the files."""

    path: Path
    start: int  # of its first byte
    shape: tuple[int, ...]
    dtype: str


def _starts(path: Path) -> dict[str, int]:
    """Return the first byte of each tensor of a file whose header was checked."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        name: 8 + size + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_shards(
    folder: str | os.PathLike,
    sizes: dict[str, int],
    read: Callable[[str], np.ndarray],
    max_shard_size: float,
) -> list[str]:
    """Write tensors to one file or to shards, and return the names of the files.

    Args:
      sizes: the bytes of each tensor by name, in the order in which they are written.
      read: returns a tensor by name; those of one shard are in memory together.
      max_shard_size: in GB (1e9 bytes). A larger tensor has its own shard. A single shard is named
        SINGLE and has no index.
    """
    if not max_shard_size > 0:
        raise ValueError(f"max_shard_size={max_shard_size} GB holds no tensor; set it above 0")
    groups = list(_groups(sizes, max_shard_size * 1e9))
    files = (
        [SINGLE]
        if len(groups) == 1
        else [
            f"model-{number:05}-of-{len(groups):05}.safetensors"
            for number in range(1, len(groups) + 1)
        ]
    )
    placed: dict[str, str] = {}
    for file_name, names in zip(files, groups, strict=True):
        write_tensors(Path(folder, file_name), {name: read(name) for name in names})
        placed |= dict.fromkeys(names, file_name)
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(placed.items())),
        }
        Path(folder, INDEX).write_text(json.dumps(index, indent=2) + "\n")
        files.append(INDEX)
    return files


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file. Raise ValueError if it is damaged."""
    try:
        return safe_open(path, "np")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({error}); copy it again"
        ) from None


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write ``tensors`` to one safetensors file, which may be read by whom the umask allows."""
    # save_file creates its file for the owner alone, but a model is often read by other accounts.
    path.touch()
    mode = path.stat().st_mode
    # transformers does not read a file without this metadata.
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _groups(sizes: dict[str, int], limit: float) -> Iterable[list[str]]:
    group: list[str] = []
    size = 0
    for name, more in sizes.items():
        if group and size + more > limit:
            yield group
            group = []
            size = 0
        group.append(name)
        size += more
    yield group


# The bits of infinity.
_ENDLESS = {
    jnp.dtype("bfloat16"): 0x7F80,
    jnp.dtype("float16"): 0x7C00,
    jnp.dtype("float32"): 0x7F800000,
}


def finite(what: str, values: np.ndarray) -> np.ndarray:
    """Return ``values``, or raise ValueError that names the first one that is not finite."""
    # On the bits, several times as fast: an exponent of ones is infinity or not a number. Signed,
    # the largest is the largest positive number; unsigned, the largest negative one.
    kind = jnp.dtype(values.dtype)
    if kind in _ENDLESS and values.size and values.flags.c_contiguous:
        bits = values.view(f"u{kind.itemsize}")
        sign = 1 << (8 * kind.itemsize - 1)
        end = _ENDLESS[kind]
        if bits.view(f"i{kind.itemsize}").max() < end and bits.max() < sign + end:
            return values
    known = np.isfinite(values)
    if not known.all():
        position = np.unravel_index(np.argmin(known), values.shape)
        raise ValueError(
            f"{what} has {known.size - known.sum():,} values that are not finite "
            f"({values[position]} at {list(map(int, position))}), and a model cannot compute with "
            "them; use an earlier checkpoint without them"
        )
    return values


def as_float32(values: np.ndarray) -> np.ndarray:
    """Return ``values`` as float32."""
    return values.astype(np.float32, copy=False)


def cast(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """Return ``values`` as ``dtype``; raise ValueError if one is not finite or would overflow."""
    kind = jnp.dtype(dtype)
    finite(name, values)
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(values.astype(kind))
    lost = made.size - np.isfinite(made.astype(np.float32)).sum() if kind != values.dtype else 0
    if lost:
        raise ValueError(
            f"{lost} values of {name} are too large for {dtype}; write --dtype=float32 or bfloat16"
        )
    return made
