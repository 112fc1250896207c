"""Checkpoints of Megatron-LM's format `torch_dist`, written by PyTorch's distributed checkpoints.

.metadata has the global shape of each tensor and the place of its pieces in the .distcp files, so
the layout of the devices that wrote them does not matter.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mtnlg_jax.interop import torch_file
from mtnlg_jax.interop.megatron_settings import UNUSED, renamed
from mtnlg_jax.interop.megatron_tensors import Joined, args_of, state_of

_OTHERS = re.compile(
    r"^((chained_\d+\.)?optimizer|opt_param_scheduler|rng_state|rerun_state_machine)"
)
_STACKED = re.compile(r"^(decoder\.layers\.)(?!\d+\.)(.+)$")
_EXPERTS = re.compile(r"^(.*mlp\.experts\.)experts\.(?:(\d+)\.)?(linear_fc[12]\..+)$")


class Distributed(Joined):
    """A folder of PyTorch's distributed checkpoints: .metadata has the global shape of each tensor
    and its pieces, the .distcp files have the pieces."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._folder = folder
        about = folder / "metadata.json"
        if about.is_file():
            backend = json.loads(about.read_bytes()).get("sharded_backend")
            if backend != "torch_dist":
                raise ValueError(
                    f"{about} says that the format is {backend}; known is torch_dist, which "
                    "Megatron-LM writes with --ckpt-convert-format=torch_dist"
                )
        common = folder / "common.pt"
        if not common.is_file():
            raise FileNotFoundError(f"{common} is missing; copy the whole folder")
        self.args = args_of(state_of(common), common)
        path = folder / ".metadata"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; copy the whole folder, hidden files too")
        data = torch_file.unpickle(path.read_bytes(), str(path))
        try:
            entries = data.state_dict_metadata
            self._places = {
                (key.fqn, tuple(getattr(key, "offset", None) or ())): place
                for key, place in data.storage_data.items()
                if hasattr(place, "offset")
            }
        except AttributeError as error:
            raise ValueError(f"{path} is not metadata of torch_dist ({error})") from None
        self._check_files()
        for name, entry in entries.items():
            if not _OTHERS.match(name) and not re.search(UNUSED, name) and hasattr(entry, "chunks"):
                self._expand(name, entry)
        self._pair_halves()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for place in self._places.values():
            ends[place.relative_path] = max(
                ends.get(place.relative_path, 0), place.offset + place.length
            )
        for name, end in ends.items():
            path = self._folder / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is missing, and .metadata names it; copy all files"
                )
            if path.stat().st_size < end:
                raise ValueError(
                    f"{path} ends after {path.stat().st_size:,} of {end:,} bytes; copy it again"
                )

    def _expand(self, name: str, entry: Any) -> None:
        """Add the tensors that ``name`` holds: one, or those of all layers and experts."""
        shape = tuple(entry.size)
        properties = entry.properties
        kind = properties.state[0] if isinstance(properties.state, tuple) else properties.dtype
        dtype = getattr(kind, "qualified", str(kind)).rpartition(".")[2]
        plain = re.sub(r"^((module|model)\.)+", "", name)
        axes = 0
        layer = _STACKED.match(plain)
        if layer:
            axes += 1
        expert = _EXPERTS.match(plain)
        if expert and expert[2] is None:
            axes += 1
        for index in np.ndindex(shape[:axes]):
            full = plain
            numbers = list(index)
            if layer:
                full = f"{layer[1]}{numbers.pop(0)}.{layer[2]}"
            if match := _EXPERTS.match(full):
                number = match[2] or numbers.pop(0)
                full = f"{match[1]}local_experts.{number}.{match[3]}"
            make = functools.partial(self._read, name, entry, index)
            self._add(renamed(full), shape[axes:], dtype, make)

    def _pair_halves(self) -> None:
        """Join the gate and the rest of a product that were written apart."""
        for name in [name for name in self.shapes if name.endswith("_w")]:
            stem = name.removesuffix("_w")
            if f"{stem}_v" not in self.shapes:
                continue
            halves = [self._makers.pop(f"{stem}_{end}") for end in "wv"]
            shape = self.shapes.pop(name)
            self.shapes.pop(f"{stem}_v")
            self.dtypes.pop(f"{stem}_v")
            self._add(
                stem,
                (2 * shape[0], *shape[1:]),
                self.dtypes.pop(name),
                functools.partial(_joined, halves),
            )

    def _read(self, name: str, entry: Any, index: tuple[int, ...]) -> np.ndarray:
        """Return the tensor at ``index`` of the first axes, from the pieces that hold it."""
        axes = len(index)
        shape = tuple(entry.size)[axes:]
        made: np.ndarray | None = None
        filled = 0
        for chunk in entry.chunks:
            starts = tuple(chunk.offsets)
            sizes = tuple(chunk.sizes)
            inside = all(
                start <= at < start + size
                for start, size, at in zip(starts, sizes, index, strict=False)
            )
            if not inside:
                continue
            piece = self._piece(name, starts).numpy()
            if piece.shape != sizes:
                raise ValueError(
                    f"a piece of {name} of {self.where} is {piece.shape}, and .metadata says "
                    f"{sizes}; copy it again"
                )
            piece = piece[tuple(at - start for at, start in zip(index, starts, strict=False))]
            if piece.shape == shape:
                return piece
            if made is None:
                made = np.empty(shape, piece.dtype)
            made[
                tuple(
                    slice(start, start + size)
                    for start, size in zip(starts[axes:], sizes[axes:], strict=True)
                )
            ] = piece
            filled += piece.size
        if made is None or filled != made.size:
            raise ValueError(f"{name} of {self.where} lacks pieces; copy all files")
        return made

    def _piece(self, name: str, starts: tuple[int, ...]) -> torch_file.Tensor:
        place = self._places.get((name, starts))
        if place is None:
            raise ValueError(f".metadata of {self.where} has no place for {name} {list(starts)}")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{self.where} is compressed, which is not read; write it without")
        tensor = torch_file.load(self._folder / place.relative_path, place.offset, place.length)
        if not isinstance(tensor, torch_file.Tensor):
            raise ValueError(f"{self._folder / place.relative_path} holds no tensor for {name}")
        return tensor


def _joined(parts: list[Callable[[], np.ndarray]]) -> np.ndarray:
    return np.concatenate([part() for part in parts])
