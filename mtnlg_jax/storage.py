"""Read and write files in a local folder or below a TensorStore URL (gs://, s3://, memory://)."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import tensorstore

# Decoded chunks of every open array share this cache: random rows of a corpus of a few hundred
# million tokens are decompressed once. One context per process also makes memory:// one store.
CONTEXT = tensorstore.Context({"cache_pool": {"total_bytes_limit": 256 << 20}})


def is_remote(location: str | os.PathLike) -> bool:
    """Return whether ``location`` is a URL."""
    return "://" in str(location)


def absolute(location: str | os.PathLike) -> str:
    """Return an absolute path, or the URL as it is."""
    return str(location) if is_remote(location) else os.path.abspath(location)


def join(location: str | os.PathLike, *names: str) -> str:
    """Return the path or URL of ``names`` below ``location``."""
    return "/".join([str(location).rstrip("/") or "/", *names])


def key_value_spec(location: str | os.PathLike) -> dict:
    """Return the TensorStore spec of a folder given as a path or a URL."""
    if not is_remote(location):
        return {"driver": "file", "path": os.path.abspath(location) + "/"}
    try:
        return tensorstore.KvStore.Spec(str(location).rstrip("/") + "/").to_json()
    except ValueError as error:
        raise ValueError(
            f"{location} is not a URL that TensorStore supports; use a path, gs://, s3:// or "
            f"memory:// ({first_line(error)})"
        ) from None


def _open(location: str | os.PathLike) -> tensorstore.KvStore:
    return tensorstore.KvStore.open(key_value_spec(location), context=CONTEXT).result()


def read_file(location: str | os.PathLike, name: str) -> bytes | None:
    """Return the content of one small file; None if it does not exist."""
    if not is_remote(location):
        path = Path(location, name)
        return path.read_bytes() if path.is_file() else None
    found = _open(location).read(name).result()
    return found.value if found.state == "value" else None


def exists(location: str | os.PathLike, name: str) -> bool:
    """Return whether the file exists."""
    if not is_remote(location):
        return Path(location, name).is_file()
    return bool(_open(location).list(tensorstore.KvStore.KeyRange(name, name + "\0")).result())


def write_file(location: str | os.PathLike, name: str, content: bytes) -> None:
    """Write one small file atomically and durably."""
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
    """Remove one file if it exists."""
    if is_remote(location):
        _open(location).write(name, None).result()
    else:
        Path(location, name).unlink(missing_ok=True)


def list_files(location: str | os.PathLike, folder: str) -> list[str]:
    """Return the sorted names, relative to ``location``, of all files below ``folder``.

    An empty ``folder`` means all files.
    """
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
def disk_errors(path: str, what: str) -> Iterator[None]:
    """Add ``path`` and ``what`` to OSErrors without a file name, and to TensorStore's errors."""
    try:
        yield
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(error.errno, f"{error.strerror}; {what}", path) from None
    except ValueError as error:
        # TensorStore reports a full disk in this form.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), f"{os.strerror(int(code[1]))}; {what}", path) from None


def first_line(error: Exception) -> str:
    """Return the readable part of TensorStore's message, which ends with the whole spec in
    brackets."""
    return str(error).split(" [")[0].split("\n")[0]


def lacking(folder: str, name: str) -> str:
    """Return why ``folder`` has no file ``name``, where it has none."""
    exists = is_remote(folder) or os.path.exists(folder)
    return f"it has no {name}" if exists else missing(folder)


def missing(path: str) -> str:
    """Return "PATH does not exist" and a similar name in its folder, such as a Megatron prefix."""
    folder, name = os.path.split(path.rstrip("/"))
    beside = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    names = {
        os.path.splitext(entry)[0] if entry.endswith((".idx", ".bin")) else entry
        for entry in beside
    }
    close = difflib.get_close_matches(name, sorted(names), 1)
    hint = f"; did you mean {os.path.join(folder, close[0])}?" if close else ""
    return f"{path} does not exist{hint}"
