"""Input files wherever fsspec finds them (a path, gs://, s3://, memory://, file://), plain or compressed, as bytes."""

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


class CompressionError(Exception):
    """A compressed file is cut short or damaged."""


# What the decompressors raise while such a file is read.
COMPRESSION_ERRORS = (zlib.error, gzip.BadGzipFile, CompressionError)


_CONTROLS = bytes(byte for byte in range(32) if byte not in b"\t\n\v\f\r\x1b")


class Damaged(str):
    """Why a document could not be read; stands in its place."""


@dataclass(frozen=True)
class File:
    """One file to read. ``name`` is its path below the folder listed, "/" between; ``size`` in bytes, as stored.
    ``stamp`` changes when the content does: of the size and the time of change or what the store calls the version
    (etag, generation), or "sha256:..." of the bytes where that was asked for."""

    path: str
    name: str
    size: int
    stamp: str


def find(path: str | os.PathLike) -> tuple[str, bool, list[File]] | None:
    """(place, whether a folder, its files or the file), hidden names left out, in the order of the names; None where
    nothing is. Raises ValueError for a URL that cannot be opened, OSError for a folder that may not be."""
    if "://" not in str(path):
        return _find_locally(Path(path))
    try:
        system, place = fsspec.core.url_to_fs(str(path))
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path} cannot be opened: {error}; pip install 'mtnlg_jax[cloud]' brings gcsfs for gs:// and "
                         "s3fs for s3://") from None
    if isinstance(system, LocalFileSystem):
        return _find_locally(Path(place))
    try:
        info = system.info(place)
    except FileNotFoundError:
        return None
    if info["type"] == "file":
        return str(path), False, [_remote_file(system, place, os.path.basename(place), info)]
    root = place.rstrip("/") + "/"
    found = {name.removeprefix(root): info for name, info in system.find(place, detail=True).items()}
    return str(path), True, [_remote_file(system, root + name, name, found[name]) for name in sorted(found)
                             if not any(part.startswith(".") for part in name.split("/"))]


def _find_locally(path: Path) -> tuple[str, bool, list[File]] | None:
    if not path.exists():
        return None
    if not path.is_dir():
        return str(path), False, [_local_file(path, path.name)]

    def fail(error: OSError):  # os.walk passes over a folder that it may not open; silence would lose text
        raise error

    names = []
    for parent, folders, files in os.walk(path, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(parent, name).relative_to(path).as_posix() for name in files if not name.startswith(".")]
    return str(path), True, [_local_file(path / name, name) for name in sorted(names)]


def _local_file(path: Path, name: str) -> File:
    state = path.lstat() if path.is_symlink() and not path.exists() else path.stat()  # reading a broken link will tell
    return File(str(path), name, state.st_size, f"{state.st_size}-{state.st_mtime_ns}")


def _remote_file(system: fsspec.AbstractFileSystem, place: str, name: str, info: dict) -> File:
    versions = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "updated", "created")
    version = next((info[key] for key in versions if info.get(key)), "")
    return File(system.unstrip_protocol(place), name, info["size"], f"{info['size']}-{version}")


def content_stamp(file: File) -> str:
    """The ``stamp`` that depends on the bytes alone."""
    with _open_bytes(file.path) as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def open_file(path: str) -> io.BufferedReader:
    """The content, decompressed. While it is read, one of ``COMPRESSION_ERRORS`` says that the file is damaged."""
    stream = _open_bytes(path)
    if path.lower().endswith(".gz"):
        return io.BufferedReader(_GzipFile(stream), 1 << 17)
    if path.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdFile(stream), 1 << 17)
    return stream


def _open_bytes(path: str) -> io.BufferedReader:
    if "://" not in path:
        return open(path, "rb")
    system, place = fsspec.core.url_to_fs(path)
    return io.BufferedReader(system.open(place, "rb"), 1 << 17)


class _GzipFile(gzip.GzipFile):
    """Closes the file below it, too, gives what it has before an error, and that is no EOFError, which warcio would
    take for the end."""

    def __init__(self, file: io.BufferedReader):
        super().__init__(fileobj=file)
        self.myfileobj = file

    def readinto(self, buffer) -> int:
        try:
            data = self.read1(len(buffer))
        except EOFError as error:
            raise CompressionError(error) from None
        buffer[:len(data)] = data
        return len(data)


def read_all(stream: io.BufferedIOBase, limit: int) -> bytes | Damaged:
    """All of it, or why not where that is more than ``limit`` bytes, after reading little more than those."""
    pieces, size = [], 0
    while piece := stream.read(1 << 20):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            return too_long(limit)
    return b"".join(pieces)


def is_binary(data: bytes) -> bool:
    """Whether more than 8 bytes and 1 % are control characters that no text has: so it is with pictures, archives,
    programs and UTF-16."""
    controls = len(data) - len(data.translate(None, _CONTROLS))
    return controls > max(8, 0.01 * len(data))


def too_long(limit: int) -> Damaged:
    return Damaged(f"longer than max_document_bytes={limit:,}; split it or raise that limit")


def bounded_lines(stream: io.BufferedReader, limit: int) -> Iterator[bytes | Damaged]:
    """Lines; in place of one of more than ``limit`` bytes, its end included, why it is not given."""
    while line := stream.readline(limit + 1):
        if len(line) <= limit:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)
        yield too_long(limit)


class _ZstdFile(io.RawIOBase):
    """Frame after frame. zstandard's own reader takes a frame that was cut short for the end of the file."""

    def __init__(self, file: io.BufferedReader):
        import zstandard

        self._new_frame = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._error = zstandard.ZstdError
        self._file, self._frame = file, None
        self._compressed, self._place, self._ready = b"", 0, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            if self._place == len(self._compressed):
                self._compressed, self._place = self._file.read(1 << 17), 0
            if not self._compressed:
                if self._frame:
                    raise CompressionError("it ends inside a zstd frame")
                return 0
            self._frame = self._frame or self._new_frame()
            # Little at once: 1 KB can become 32 MB, and all of it comes out.
            piece = self._compressed[self._place:self._place + 1024]
            try:
                self._ready = memoryview(self._frame.decompress(piece))
            except self._error as error:
                raise CompressionError(error) from None
            ended = self._frame.eof
            self._place += len(piece) - (len(self._frame.unused_data) if ended else 0)
            self._frame = None if ended else self._frame
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
