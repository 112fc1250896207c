"""Find and open input files, plain or compressed, anywhere that fsspec reaches (a path, gs://,
s3://, memory://, file://)."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem


class CompressionError(Exception):
    """A compressed file is cut short or damaged."""


# Errors of the decompressors while such a file is read.
COMPRESSION_ERRORS = (zlib.error, gzip.BadGzipFile, CompressionError)
PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lzma")

HIDDEN = "hidden: the name begins with a dot"
READ_ALREADY = "links to what is read already"
CIRCLE = "links to a folder that holds them"
NOT_A_FILE = "neither files nor folders: pipes, sockets, devices"

_CONTROLS = bytes(byte for byte in range(32) if byte not in b"\t\n\v\f\r\x1b")


class Damaged(str):
    """The reason why a document could not be read, in its place."""


class Skipped(str):
    """The reason why a record has no document, in its place."""


@dataclass(frozen=True)
class File:
    """A file to read.

    ``name``: its path below the folder listed, with "/". ``size``: bytes as stored. ``stamp``
    changes with the content: size and modification time, or the version that a store gives (etag,
    generation), or "sha256:..." of the bytes on request. ``real``: the path of a local file without
    links. ``linked``: whether a link led to it.
    """

    path: str
    name: str
    size: int
    stamp: str
    real: str = ""
    linked: bool = False


class Found(NamedTuple):
    """A file, or the files of a folder in the order of their names.

    ``left_out``: (reason, name) of each other entry; the name of a folder ends with "/".
    """

    path: str
    is_folder: bool
    files: list[File]
    left_out: list[tuple[str, str]]


def find(path: str | os.PathLike) -> Found | None:
    """Return the file or files at a path or URL, or None.

    Hidden names are left out. Links are followed, and each real file is found once: by its own name
    if that is in the folder, else by the first link to it.

    Raises ValueError for a URL that cannot be opened, OSError for a folder without permission.
    """
    if "://" not in str(path):
        return _find_locally(Path(path))
    try:
        system, place = fsspec.core.url_to_fs(str(path))
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be opened: {error}; pip install 'mtnlg_jax[cloud]' brings gcsfs for "
            "gs:// and s3fs for s3://"
        ) from None
    if isinstance(system, LocalFileSystem):
        return _find_locally(Path(place))
    try:
        info = system.info(place)
    except FileNotFoundError:
        return None
    if info["type"] == "file":
        file = _remote_file(system, place, os.path.basename(place), info)
        return Found(str(path), False, [file], [])
    root = place.rstrip("/") + "/"
    found = {
        name.removeprefix(root): info for name, info in system.find(place, detail=True).items()
    }
    hidden = {entry: None for entry in map(_hidden_part, sorted(found)) if entry}
    files = [
        _remote_file(system, root + name, name, found[name])
        for name in sorted(found)
        if not _hidden_part(name)
    ]
    return Found(str(path), True, files, [(HIDDEN, name) for name in hidden])


def _hidden_part(name: str) -> str:
    """Return the path of the first hidden file or folder along ``name``, or ""."""
    parts = name.split("/")
    for number, part in enumerate(parts, 1):
        if part.startswith("."):
            return "/".join(parts[:number]) + ("/" if number < len(parts) else "")
    return ""


def _find_locally(path: Path) -> Found | None:
    if not path.exists():
        return None
    if not path.is_dir():
        return Found(str(path), False, [_local_file(path, path.name, os.path.realpath(path))], [])
    walk = _Walk(path)
    return Found(
        str(path),
        True,
        [_local_file(path / name, name, *walk.names[name]) for name in sorted(walk.names)],
        sorted(walk.left_out),
    )


class _Walk:
    """The files below a folder. ``names``: (real path, whether a link led there) by path."""

    def __init__(self, root: Path):
        self.names: dict[str, tuple[str, bool]] = {}
        self.left_out: list[tuple[str, str]] = []
        self._folders: set[str] = set()  # real paths of folders that were read
        self._linked: set[str] = set()  # real paths of files to which links led
        self._links: list[tuple[str, str]] = []
        self._read(str(root), "", os.path.realpath(root), False)
        # Links are followed last and by name, so that the result does not depend on the order in
        # which the system lists a folder.
        while self._links:
            self._links.sort()
            self._follow(*self._links.pop(0))

    def _read(self, path: str, prefix: str, real: str, linked: bool) -> None:
        waiting = [(path, prefix, real)]
        while waiting:
            path, prefix, real = waiting.pop()
            self._folders.add(real)
            # OSError is not caught: skipping a folder without permission would lose its text
            # silently.
            with os.scandir(path) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    below = os.path.join(real, entry.name)
                    if self._add(entry, name, below, linked):
                        waiting.append((entry.path, f"{name}/", below))

    def _add(self, entry: os.DirEntry, name: str, real: str, linked: bool) -> bool:
        """Add an entry of a folder; True for a folder to read."""
        if entry.name.startswith("."):
            is_folder = entry.is_dir(follow_symlinks=False)
            self.left_out.append((HIDDEN, f"{name}/" if is_folder else name))
        elif entry.is_symlink():
            self._links.append((name, entry.path))
        elif entry.is_dir(follow_symlinks=False):
            if real not in self._folders:
                return True
            self.left_out.append((READ_ALREADY, f"{name}/"))
        elif not entry.is_file(follow_symlinks=False):
            self.left_out.append((NOT_A_FILE, name))
        elif real in self._linked:
            self.left_out.append((READ_ALREADY, name))
        else:
            self.names[name] = (real, linked)
        return False

    def _follow(self, name: str, path: str) -> None:
        real = os.path.realpath(path)
        parent = os.path.realpath(os.path.dirname(path))
        if os.path.isdir(real):
            if f"{parent}/".startswith(real.rstrip("/") + "/"):
                self.left_out.append((CIRCLE, f"{name}/"))
            elif real in self._folders:
                self.left_out.append((READ_ALREADY, f"{name}/"))
            else:
                self._read(path, f"{name}/", real, True)
        elif real in self._linked or (
            os.path.dirname(real) in self._folders
            and os.path.isfile(real)
            and not os.path.basename(real).startswith(".")
        ):
            self.left_out.append((READ_ALREADY, name))
        elif os.path.exists(real) and not os.path.isfile(real):
            self.left_out.append((NOT_A_FILE, name))
        else:  # a file, or a broken link, which raises when it is read
            self._linked.add(real)
            self.names[name] = (real, True)


def _local_file(path: Path, name: str, real: str, linked: bool = False) -> File:
    # A broken link raises when it is read.
    state = path.lstat() if linked and not path.exists() else path.stat()
    return File(
        str(path), name, state.st_size, f"{state.st_size}-{state.st_mtime_ns}", real, linked
    )


def _remote_file(system: fsspec.AbstractFileSystem, place: str, name: str, info: dict) -> File:
    versions = (
        "etag",
        "ETag",
        "md5Hash",
        "generation",
        "mtime",
        "LastModified",
        "updated",
        "created",
    )
    version = next((info[key] for key in versions if info.get(key)), "")
    return File(system.unstrip_protocol(place), name, info["size"], f"{info['size']}-{version}")


def content_stamp(file: File) -> str:
    """Return a ``stamp`` that depends only on the bytes."""
    with _open_bytes(file.path) as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def open_file(path: str) -> io.BufferedReader:
    """Open a file, decompressed by its last suffix (`PACKED`).

    Reading raises one of ``COMPRESSION_ERRORS`` if the file is damaged.
    """
    stream = _open_bytes(path)
    suffix = os.path.splitext(path.lower())[1]
    if suffix == ".gz":
        return io.BufferedReader(_GzipFile(stream), 1 << 17)
    if suffix in (".zst", ".zstd"):
        return io.BufferedReader(ZstdFile(stream), 1 << 17)
    if suffix == ".bz2":
        return io.BufferedReader(_Unpacked(bz2.BZ2File(stream), stream), 1 << 17)
    if suffix in (".xz", ".lzma"):
        return io.BufferedReader(_Unpacked(lzma.LZMAFile(stream), stream), 1 << 17)
    return stream


def _open_bytes(path: str) -> io.BufferedReader:
    if "://" not in path:
        return open(path, "rb")
    system, place = fsspec.core.url_to_fs(path)
    return io.BufferedReader(system.open(place, "rb"), 1 << 17)


class _GzipFile(gzip.GzipFile):
    """A gzip file that also closes the file below it, and returns the data before an error.

    The error is not an EOFError, which warcio would take for the end.
    """

    def __init__(self, file: io.BufferedReader):
        super().__init__(fileobj=file)
        # gzip closes what it calls its own file.
        self.myfileobj = file  # type: ignore[assignment]  # typeshed knows only FileIO

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except EOFError as error:
            raise CompressionError(error) from None

    def readinto(self, buffer) -> int:
        try:
            data = self.read1(len(buffer))
        except EOFError as error:
            raise CompressionError(error) from None
        buffer[: len(data)] = data
        return len(data)


class _Unpacked(io.RawIOBase):
    """A file of the standard library's decompressors that also closes the file below it.

    Its errors are `CompressionError`.
    """

    def __init__(self, unpacked: bz2.BZ2File | lzma.LZMAFile, file: io.BufferedReader):
        self._unpacked = unpacked
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            data = self._unpacked.read1(len(buffer))
        except (EOFError, lzma.LZMAError) as error:
            raise CompressionError(error) from None
        except OSError as error:
            if error.errno:
                raise  # a fault of the disk, not of the file
            raise CompressionError(error) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._unpacked.close()
        self._file.close()
        super().close()


def read_all(stream: io.BufferedIOBase, limit: int) -> bytes | Damaged:
    """Return all bytes, or `Damaged` for more than ``limit``, of which few are read."""
    pieces = []
    size = 0
    while piece := stream.read(1 << 20):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            return too_long(limit)
    return b"".join(pieces)


def is_binary(data: bytes) -> bool:
    """Whether more than 8 bytes and 1 % are control characters that text does not have.

    This is so for pictures, archives, programs and UTF-16.
    """
    return controls(data) > max(8, 0.01 * len(data))


def controls(data: bytes) -> int:
    """Return the number of control characters that text does not have."""
    return len(data) - len(data.translate(None, _CONTROLS))


def too_long(limit: int) -> Damaged:
    """Return the damage of a document of more than ``limit`` bytes."""
    return Damaged(f"longer than max_document_bytes={limit:,}; split it or raise that limit")


def bounded_lines(stream: io.BufferedReader, limit: int) -> Iterator[bytes | Damaged]:
    """Yield lines; `Damaged` in place of one of more than ``limit`` bytes with its line end."""
    while line := stream.readline(limit + 1):
        if len(line) <= limit:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)
        yield too_long(limit)


class PieceStream(io.RawIOBase):
    """A stream of the pieces that a subclass makes of the stream ``below``."""

    def __init__(self, below: io.BufferedIOBase):
        self._below = below
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            piece = self._more()
            if piece is None:
                return 0
            self._ready = memoryview(piece)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _more(self) -> bytes | None:
        """Return the next piece, possibly empty, or None at the end."""
        raise NotImplementedError

    def close(self) -> None:
        self._below.close()
        super().close()


class ZstdFile(PieceStream):
    """A .zst file, frame by frame; zstandard's reader takes a truncated frame for the end."""

    def __init__(self, file: io.BufferedIOBase):
        try:
            import zstandard
        except ImportError:
            raise ValueError("a file with .zst needs a package; pip install zstandard") from None
        self._new_frame = lambda: zstandard.ZstdDecompressor(
            max_window_size=1 << 31
        ).decompressobj()
        self._error = zstandard.ZstdError
        super().__init__(file)
        self._frame: Any = None
        self._compressed = b""
        self._position = 0

    def _more(self) -> bytes | None:
        if self._position == len(self._compressed):
            self._compressed = self._below.read(1 << 17)
            self._position = 0
        if not self._compressed:
            if self._frame:
                raise CompressionError("it ends inside a zstd frame")
            return None
        self._frame = self._frame or self._new_frame()
        # Little at once, because 1 KB can decompress to 32 MB, all returned together.
        piece = self._compressed[self._position : self._position + 1024]
        try:
            unpacked = self._frame.decompress(piece)
        except self._error as error:
            raise CompressionError(error) from None
        ended = self._frame.eof
        self._position += len(piece) - (len(self._frame.unused_data) if ended else 0)
        self._frame = None if ended else self._frame
        return unpacked
