"""The file of answers to many rows: written line by line, and continued after a kill.

Each line is one write, so that a killed process leaves at most one line without its end, which is
cut before the next process goes on. A file beside it, FILE.resume.json, says what it answers: the
inputs, the model and the settings. Answers to other inputs or by other settings are never mixed.
"""

import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from mtnlg_jax import storage
from mtnlg_jax.tasks.answers import Answer, record_of
from mtnlg_jax.tasks.many.inputs import Item

SUFFIX = ".resume.json"


@dataclasses.dataclass
class Counts:
    answered: int = 0
    errors: int = 0

    @property
    def rows(self) -> int:
        return self.answered + self.errors


class Record:
    """The answers of a file that this process writes; a context that ends with the lock of the
    file.

    Attributes:
      done: for each row number, whether the file has its line.
      counts: of the lines in the file.
      begun: of those, the lines of earlier processes.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        identity: Mapping[str, Any],
        count: int,
        *,
        retry_errors: bool = False,
        keep_prompt: bool = False,
    ):
        """Create the file, or go on with what it holds.

        Args:
          identity: what the answers depend on, by name, as JSON has it.
          count: number of rows of the inputs.
          retry_errors: remove the lines of errors, so that those rows are asked again.
          keep_prompt: write the prompt of each answer as well.

        Raises:
          FileExistsError: another process writes the file.
          ValueError: the file exists and is of other inputs or settings, or not of this class. It
            is left as it was.
        """
        check_writable(path)
        self.path = Path(path)
        self._keep_prompt = keep_prompt
        self._handle = _locked(self.path)
        try:
            self._check_identity(dict(identity))
            self._read(count)
            if retry_errors and self.counts.errors:
                self._drop_errors()
                self._read(count)
        except BaseException:
            self.close()
            raise
        self.begun = dataclasses.replace(self.counts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; remove it if it has no line, so that nothing stands in the way."""
        if self._handle.closed:
            return
        if not os.fstat(self._handle.fileno()).st_size:
            self._sidecar.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        self._handle.close()

    def add(self, item: Item, answer: Answer) -> None:
        """Append the line of an answered row."""
        assert item.row is not None, "a row with an error has no answer"
        line = record_of(item.number, item.row, answer)
        if not self._keep_prompt:
            del line["prompt"]
        self._append(item, line)
        self.counts.answered += 1

    def add_error(self, item: Item, error: str) -> None:
        """Append the line of a row that cannot be answered."""
        shown = {"input": item.row.input} if item.row else {}
        self._append(item, {"row": item.number, "error": error, **shown})
        self.counts.errors += 1

    def sync(self) -> None:
        """Wait until the lines are on the disk, so that a loss of power spares them."""
        os.fsync(self._handle.fileno())

    @property
    def identity(self) -> dict[str, Any]:
        """What the file says that its answers depend on."""
        return json.loads(self._sidecar.read_bytes())

    def require(self, name: str, value: Any, remedy: str) -> None:
        """Add a part of the identity that is known late, such as the step of the loaded model.

        Raises ValueError if the file was begun with another one.
        """
        known = self.identity
        if known.get(name, value) != value:
            raise ValueError(
                f"{self.path} was begun with {name} {known[name]}, and this is {name} {value}; "
                f"{remedy}, or name another file with --outputs"
            )
        if name not in known:
            self._write_identity(known | {name: value})

    @property
    def _sidecar(self) -> Path:
        return self.path.with_name(self.path.name + SUFFIX)

    def _write_identity(self, identity: Mapping[str, Any]) -> None:
        content = json.dumps(identity, ensure_ascii=False, indent=1) + "\n"
        storage.write_file(self.path.parent, self._sidecar.name, content.encode())

    def _append(self, item: Item, line: dict) -> None:
        if self.done[item.number]:
            raise AssertionError(f"row {item.number} of {self.path} would be answered twice")
        line = {"row": line.pop("row"), **({} if item.id is None else {"id": item.id}), **line}
        if item.columns:
            line["columns"] = item.columns
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        # Lone surrogates cannot be encoded as UTF-8.
        with storage.disk_errors(
            str(self.path), "the rows so far are kept; the same command goes on"
        ):
            _write(self._handle, text.encode("utf-8", "replace"))
        self.done[item.number] = 1

    def _check_identity(self, identity: dict) -> None:
        try:
            known = json.loads(self._sidecar.read_bytes())
        except FileNotFoundError:
            known = None
        except ValueError:
            raise ValueError(
                f"{self._sidecar} is damaged, so it does not say what {self.path} answers; name "
                "another file with --outputs"
            ) from None
        if not os.fstat(self._handle.fileno()).st_size:
            self._write_identity(identity)
            return
        if known is None:
            raise ValueError(
                f"{self.path} exists, and no {self._sidecar.name} beside it says that it holds "
                "these answers; name another file with --outputs"
            )
        # Some parts are known later than others (`require`).
        different = [
            name
            for name in {**known, **identity}
            if known.get(name) != identity.get(name) and (name in identity or name not in LATE)
        ]
        if different:
            changes = "; ".join(
                f"{_shown(name, known.get(name))}, now {_shown(name, identity.get(name))}"
                for name in different
            )
            raise ValueError(
                f"{self.path} was begun with {changes}; give the same to go on, or name another "
                "file with --outputs"
            )

    def _read(self, count: int) -> None:
        """Note the rows of the file, and cut a last line that was not written whole."""
        self.done = bytearray(count + 1)
        self.counts = Counts()
        size = 0
        for number, line in enumerate(_whole_lines(self.path), 1):
            size += len(line)
            try:
                found = json.loads(line)
                row = found["row"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self.path}, line {number} is not a line of these answers; restore it, or "
                    "name another file with --outputs"
                ) from None
            known = isinstance(row, int) and 0 < row <= count
            if not known or self.done[row]:
                what = "is answered twice" if known else f"is none of the {count:,} rows"
                raise ValueError(
                    f"{self.path}, line {number}: row {row} {what}; restore the file, or name "
                    "another one with --outputs"
                )
            self.done[row] = 1
            self.counts.answered += "error" not in found
            self.counts.errors += "error" in found
        os.ftruncate(self._handle.fileno(), size)

    def _drop_errors(self) -> None:
        """Write the file anew without the lines of errors, in one step."""
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        handle = open(beside, "ab", buffering=0)
        try:
            # Locked before it takes the name, so that nobody else can write it.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for line in _whole_lines(self.path):
                if "error" not in json.loads(line):
                    _write(handle, line)
            os.fsync(handle.fileno())
            os.replace(beside, self.path)
        except BaseException:
            handle.close()
            beside.unlink(missing_ok=True)
            raise
        self._handle.close()
        self._handle = handle


# Parts of the identity that are known only after the model is loaded.
LATE = ("step", "the weights")


def check_writable(path: str | os.PathLike) -> None:
    """Raise ValueError if ``path`` cannot be a file of answers, before anything is read."""
    if storage.is_remote(path):
        raise ValueError(
            f"--outputs={path} is a URL, and rows are appended to it one by one; name a local file"
        )
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"--outputs={path} is a folder; name a file, such as {path}/answers.jsonl")
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"--outputs={path}: the folder {path.parent} does not exist; create it, or name "
            "another file"
        )
    if path.suffix not in (".jsonl", ".ndjson"):
        raise ValueError(
            f"--outputs={path} holds a JSON line for each row; name it with the suffix .jsonl"
        )


def _shown(name: str, value: Any) -> str:
    """Return a part of the identity for an error; names of flags begin with "--"."""
    if value is None:
        return f"no {name}"
    return f"{name}={value}" if name.startswith("--") else f"{name} {value}"


def _locked(path: Path):
    """Open a file to append to it, and lock it until it is closed, however this process ends."""
    while True:
        handle = open(path, "ab", buffering=0)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # File systems without locks: starting two processes is the user's responsibility.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                handle.close()
                raise FileExistsError(
                    f"another process is writing {path}; wait for its end, or name another file "
                    "with --outputs"
                ) from None
        # The process before may have removed or replaced what was opened here.
        if path.exists() and os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
            return handle
        handle.close()


def _write(handle, data: bytes) -> None:
    """Write all of ``data``; a disk that fills up takes a part of it at first, without an error."""
    while data:
        data = data[handle.write(data) :]


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file but for a last one without its end."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def read_records(path: str | os.PathLike) -> Iterator[dict]:
    """Yield the lines of a file of answers as objects."""
    return map(json.loads, _whole_lines(Path(path)))
