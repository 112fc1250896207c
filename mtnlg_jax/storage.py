"""Where data lie: a local folder, or a TensorStore URL (gs://, s3://, memory://), read and written
alike."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import tensorstore

# Decoded chunks of every open array share this cache: random rows of a corpus of some hundred
# million tokens are decompressed once. One context a process also makes memory:// one store.
CONTEXT = tensorstore.Context({"cache_pool": {"total_bytes_limit": 256 << 20}})


def is_remote(location: str | os.PathLike) -> bool:
    return "://" in str(location)


def join(location: str | os.PathLike, *names: str) -> str:
    return "/".join([str(location).rstrip("/") or "/", *names])


def key_value_spec(location: str | os.PathLike) -> dict:
    """The TensorStore spec of a folder given as a path or a URL."""
    if not is_remote(location):
        return {"driver": "file", "path": os.path.abspath(location) + "/"}
    try:
        return tensorstore.KvStore.Spec(str(location).rstrip("/") + "/").to_json()
    except ValueError as error:
        raise ValueError(
            f"{location} is no URL that TensorStore knows; use a path, gs://, s3:// or memory://"
            f" ({first_line(error)})"
        ) from None


def _open(location: str | os.PathLike) -> tensorstore.KvStore:
    return tensorstore.KvStore.open(key_value_spec(location), context=CONTEXT).result()


def read_file(location: str | os.PathLike, name: str) -> bytes | None:
    """The content of one small file, or None where there is none."""
    if not is_remote(location):
        path = Path(location, name)
        return path.read_bytes() if path.is_file() else None
    found = _open(location).read(name).result()
    return found.value if found.state == "value" else None


def exists(location: str | os.PathLike, name: str) -> bool:
    """Whether there is a file of this name."""
    if not is_remote(location):
        return Path(location, name).is_file()
    return bool(_open(location).list(tensorstore.KvStore.KeyRange(name, name + "\0")).result())


def write_file(location: str | os.PathLike, name: str, content: bytes) -> None:
    """Write one small file whole or not at all, and make it last."""
    if is_remote(location):
        _open(location).write(name, content).result()
        return
    path = Path(location, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_file(location: str | os.PathLike, name: str) -> None:
    """Remove one file, if it is there."""
    if is_remote(location):
        _open(location).write(name, None).result()
    else:
        Path(location, name).unlink(missing_ok=True)


def list_files(location: str | os.PathLike, folder: str) -> list[str]:
    """The names below ``location`` of all files in ``folder`` ("": all), and deeper; sorted."""
    if is_remote(location):
        keys = (
            tensorstore.KvStore.KeyRange(folder + "/", folder + "0")
            if folder
            else tensorstore.KvStore.KeyRange()
        )
        names = _open(location).list(keys).result()
        return sorted(name.decode() for name in names)
    return sorted(
        path.relative_to(location).as_posix()
        for path in Path(location, folder).rglob("*")
        if path.is_file()
    )


@contextlib.contextmanager
def disk_errors(place: str, what: str) -> Iterator[None]:
    """Makes OSErrors without a file's name, and what TensorStore raises of the same kind, say
    ``what`` of ``place``."""
    try:
        yield
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(error.errno, f"{error.strerror}; {what}", place) from None
    except ValueError as error:
        code = re.search(
            r"os_error_code='(\d+)'", str(error)
        )  # how TensorStore says that the disk is full
        if not code:
            raise
        raise OSError(int(code[1]), f"{os.strerror(int(code[1]))}; {what}", place) from None


def first_line(error: Exception) -> str:
    """TensorStore's messages carry the whole spec in brackets: what a person needs stands before
    it."""
    return str(error).split(" [")[0].split("\n")[0]


def missing(path: str) -> str:
    """ "PATH does not exist", with the name beside it that may have been meant, as of a Megatron
    prefix."""
    folder, name = os.path.split(path.rstrip("/"))
    beside = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    names = {
        os.path.splitext(entry)[0] if entry.endswith((".idx", ".bin")) else entry
        for entry in beside
    }
    close = difflib.get_close_matches(name, sorted(names), 1)
    hint = f"; did you mean {os.path.join(folder, close[0])}?" if close else ""
    return f"{path} does not exist{hint}"
