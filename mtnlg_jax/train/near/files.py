"""The files of a near tier in the folder of one host: written whole or not at all, checked, read.

Data are synced before their manifest is renamed into place, so that a copy with a manifest is whole
also after a loss of power (in /dev/shm a sync costs nothing, and a loss of power takes all).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mtnlg_jax import storage
from mtnlg_jax.train.near.boxes import Box, Shard, within

OWN = "own"
PEER = "peer"


@dataclasses.dataclass(frozen=True)
class Copy:
    """The name of a copy: a step, in one start of the run."""

    step: int
    start: str

    @property
    def name(self) -> str:
        return f"{self.step}-{self.start}"


@dataclasses.dataclass
class File:
    """What a manifest says of one file of a copy."""

    copy: Copy
    process: int  # whose shards they are
    kind: str  # OWN | PEER
    shards: list[Shard]
    sums: list[int]  # CRC-32 of each shard
    about: dict  # meta, arrays and proven of the copy

    @property
    def name(self) -> str:
        return name_of(self.copy, self.process, self.kind)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


def name_of(copy: Copy, process: int, kind: str) -> str:
    """Return the name of a file below the folder of the run, without its ending."""
    return f"{copy.name}/{process}.{kind}"


class NearFiles:
    """The files below ``folder``, that of one run on one host."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def path(self, name: str, ending: str = "") -> str:
        return os.path.join(self.folder, name + ending)

    def used(self) -> int:
        """Return the bytes of all files of the run here."""
        return sum(
            os.path.getsize(os.path.join(above, name))
            for above, _, names in os.walk(self.folder)
            for name in names
        )

    def write(
        self, copy: Copy, process: int, kind: str, shards: Sequence[Shard], parts: Iterable, about
    ) -> None:
        """Write ``parts``, the bytes of ``shards`` in order, in pieces of any size.

        Raise OSError where they cannot be written; nothing of them is left then.
        """
        name = name_of(copy, process, kind)
        os.makedirs(self.folder, 0o700, exist_ok=True)
        os.makedirs(self.path(copy.name), exist_ok=True)
        data = self.path(name, ".data")
        sums: list[int] = []
        try:
            with open(data, "wb", buffering=0) as file:
                self._write_parts(file, shards, iter(parts), sums)
                os.fsync(file.fileno())
            content = {
                "step": copy.step,
                "start": copy.start,
                "process": process,
                "kind": kind,
                "shards": [[shard.name, shard.box, shard.bytes] for shard in shards],
                "sums": sums,
                "about": about,
            }
            body = json.dumps(content)
            digest = hashlib.sha256(body.encode()).hexdigest()
            # It renames a whole file into place: from here on the file counts.
            storage.write_file(self.folder, f"{name}.json", f"{digest}\n{body}".encode())
        except OSError:
            self.remove(name)
            raise

    def _write_parts(
        self, file: Any, shards: Sequence[Shard], parts: Iterator, sums: list[int]
    ) -> None:
        piece = memoryview(b"")
        for shard in shards:
            left = shard.bytes
            total = 0
            while left:
                piece = piece or memoryview(next(parts))
                written = file.write(piece[:left])
                total = zlib.crc32(piece[:written], total)
                piece = piece[written:]
                left -= written
            sums.append(total)

    def remove(self, name: str) -> None:
        """Remove one file with its manifest, which goes first."""
        for ending in (".json", ".data"):
            with contextlib.suppress(OSError):
                os.remove(self.path(name, ending))

    def mark_finite(self, copy: Copy, process: int) -> None:
        """Record that a loss of the parameters of ``copy`` was finite."""
        with contextlib.suppress(OSError), open(self.path(f"{copy.name}/{process}.finite"), "wb"):
            pass

    def is_finite(self, copy: Copy) -> bool:
        """Return whether a process here has marked ``copy``."""
        with contextlib.suppress(OSError):
            return any(name.endswith(".finite") for name in os.listdir(self.path(copy.name)))
        return False

    def remove_of(self, copy: Copy, names: Iterable[str]) -> None:
        """Remove the files ``names`` of a copy, and its folder once it is empty."""
        for name in names:
            self.remove(f"{copy.name}/{name}")
            with contextlib.suppress(OSError):
                os.remove(self.path(f"{copy.name}/{name.partition('.')[0]}.finite"))
        # Not the folder of the run: another process of this host may be about to write there.
        with contextlib.suppress(OSError):
            os.rmdir(self.path(copy.name))

    def copies(self) -> list[Copy]:
        """Return the copies of which there is anything here, the newest first."""
        with contextlib.suppress(FileNotFoundError):
            pairs = [name.partition("-") for name in os.listdir(self.folder)]
            found = [Copy(int(step), start) for step, _, start in pairs if step.isdigit()]
            return sorted(found, key=lambda copy: (-copy.step, copy.start))
        return []

    def keep_only(self, kept: Copy | None) -> None:
        """Remove everything but ``kept``. Only one process of a host may call this."""
        for copy in self.copies():
            if copy != kept:
                shutil.rmtree(self.path(copy.name), ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)

    def files(self, copy: Copy) -> tuple[list[File], list[str]]:
        """Return the files of ``copy`` that have a manifest, and warnings about damaged ones."""
        found = []
        warnings = []
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self.path(copy.name))):
                if name.endswith(".json") and not name.startswith("."):
                    path = self.path(f"{copy.name}/{name}")
                    if (file := _read_manifest(path)) is not None:
                        found.append(file)
                    else:
                        warnings.append(f"{path} is not what was written")
        return found, warnings

    def damage(self, file: File) -> str | None:
        """Return what is wrong with the data of ``file``, if anything. Reads all of them."""
        path = self.path(file.name, ".data")
        try:
            size = os.path.getsize(path)
            if size != file.bytes:
                return f"{path} has {size:,} bytes instead of {file.bytes:,}"
            data = self._mapped(file)
        except OSError as error:
            return f"{path}: {error.strerror}"
        start = 0
        for shard, written in zip(file.shards, file.sums, strict=True):
            if zlib.crc32(data[start : start + shard.bytes]) != written:
                return f"{path}: {shard.name} is not what was written (CRC-32 differs)"
            start += shard.bytes
        return None

    def read(self, file: File, name: str, outer: Box, box: Box, dtype: np.dtype) -> np.ndarray:
        """Return the part ``box`` of the shard ``outer`` of array ``name``."""
        start = 0
        for shard in file.shards:
            if (shard.name, shard.box) == (name, outer):
                data = self._mapped(file)[start : start + shard.bytes].view(dtype)
                whole = data.reshape([stop - first for first, stop in outer])
                return np.ascontiguousarray(whole[within(box, outer)])
            start += shard.bytes
        raise KeyError(f"{file.name} has no {name} {outer}")

    def _mapped(self, file: File) -> np.ndarray:
        # An empty file cannot be mapped.
        if not file.bytes:
            return np.zeros(0, np.uint8)
        return np.memmap(self.path(file.name, ".data"), np.uint8, "r")


def _read_manifest(path: str) -> File | None:
    try:
        with open(path, "rb") as opened:
            digest, _, body = opened.read().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    content = json.loads(body)
    return File(
        Copy(content["step"], content["start"]),
        content["process"],
        content["kind"],
        [shard_from(*each) for each in content["shards"]],
        content["sums"],
        content["about"],
    )


def shard_from(name: str, box: list[list[int]], size: int) -> Shard:
    """Return a shard from its form in JSON."""
    return Shard(name, tuple((start, stop) for start, stop in box), size)
