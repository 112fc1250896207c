"""The record of a text: every decision of the writer, so that a killed one goes on where it was.

Beside STORY.md lies STORY.md.jsonl. Its first line holds the settings, each further line one
decision, in the order in which they were made. A decision depends only on the settings and on those
before it, so a writer that reads them back writes what it would have written. The text is made from
the record, never the other way around.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mtnlg_jax import storage

SUFFIX = ".jsonl"
# The flag of a setting that is not named like it.
_FLAGS = {
    "topic": "--input",
    "model": "--workdir",
    "decode": "--set=decode.KEY",
    "weights": "--score_weights",
    "headings": "--outline",
    "held": "--dtype, --weights, --cache or --adapter",
}


def read_lines(output: str) -> list[dict]:
    """Return the lines of the record beside ``output``: [] where neither of the two exists.

    A last line without its end was cut off by a kill, and is left out. Nothing is written.

    Raises ValueError if ``output`` is finished, is a URL, is below a file, or exists without a
    record of its own, and if the record is damaged.
    """
    if storage.is_remote(output):
        raise ValueError(
            f"--output={output} is a URL, and lines are appended to the record beside it; name a "
            "local file, and copy it when it is finished"
        )
    path = output + SUFFIX
    folder = Path(output).absolute().parent
    above = next(each for each in (folder, *folder.parents) if each.exists())
    if not above.is_dir():
        raise ValueError(f"--output={output} is below {above}, which is a file; name another file")
    if not os.path.exists(path):
        if os.path.exists(output):
            raise ValueError(
                f"--output={output} exists, and no {os.path.basename(path)} beside it says that "
                "this command wrote it; name another file"
            )
        return []
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or entry.get("type", "") == "":
            raise ValueError(
                f"{path}, line {number}: not a line of a record; name another --output, or remove "
                f"{output} and {path} to begin again"
            )
        found.append(entry)
    if found and found[-1]["type"] == "end":
        raise ValueError(
            f"--output={output} is finished, with {found[-1]['words']:,} words; name another "
            f"file, or remove it and {path} to write it again"
        )
    return found


def check_settings(output: str, lines: Sequence[dict], settings: dict[str, Any]) -> None:
    """Raise ValueError that names the first of ``settings`` in which a record differs."""
    # As JSON gives them back: lists for tuples.
    for name, now in json.loads(json.dumps(settings)).items():
        before = lines[0].get(name) if lines else now
        if before == now:
            continue
        key = name
        if isinstance(before, dict) and isinstance(now, dict):
            inner = next(k for k in [*now, *before] if before.get(k) != now.get(k))
            key = f"{name}.{inner}"
            before = before.get(inner)
            now = now.get(inner)
        raise ValueError(
            f"{output}{SUFFIX} was made with {key}={_short(before)}, and this command has "
            f"{_short(now)} ({_FLAGS.get(name, f'--{name}')}); repeat the command as it was, or "
            "name another --output"
        )


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:57] + "..."


class Record:
    """The decisions of one text, old and new; those that are new are appended to the file."""

    def __init__(
        self, decisions: Sequence[dict] = (), output: str | None = None, file: IO | None = None
    ) -> None:
        """Continue from ``decisions``; `opened` gives a record with files."""
        self._before = list(decisions)
        self._position = 0
        self._output = output
        self._file = file

    @property
    def replays(self) -> bool:
        """Return whether the next decision was made before."""
        return self._position < len(self._before)

    def next(self, kind: str) -> dict:
        """Return the next decision that was made before.

        Raises ValueError for a kind that this version of the program would not decide.
        """
        decision = self._before[self._position]
        self._position += 1
        if decision["type"] != kind:
            raise ValueError(
                # Line 1 holds the settings.
                f"{self._output}{SUFFIX}, line {self._position + 1}: holds {decision['type']!r}, "
                f"and {kind!r} was due; begin again with another --output"
            )
        return decision

    def add(self, decision: dict) -> None:
        """Append a decision, durably: a kill leaves all of its line, or a part that is ignored."""
        if self._file is not None:
            _append(self._file, decision)

    def check_text(self, text: str) -> None:
        """Raise ValueError if ``output`` holds anything but the beginning of ``text``.

        The file may lack the last decisions, which were recorded before it was written.
        """
        if self._output is None or not os.path.exists(self._output):
            return
        with open(self._output, "rb") as file:
            if not _encoded(text).startswith(file.read().rstrip(b"\n")):
                raise ValueError(
                    f"--output={self._output} was changed after it was written, and going on "
                    "would undo that; move it away to go on from its record, or name another file"
                )

    def show(self, text: str) -> None:
        """Replace the text of ``output``, as a whole."""
        if self._output is not None:
            storage.write_file(*os.path.split(self._output), _encoded(text))


@contextlib.contextmanager
def opened(output: str, settings: dict[str, Any], lines: Sequence[dict]) -> Iterator[Record]:
    """Give the record beside ``output``, locked, with its ``lines`` from `read_lines`.

    A new record begins with ``settings``. The part of a line that a kill left is removed. Raises
    ValueError if another process writes the record.
    """
    path = output + SUFFIX
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with storage.disk_errors(path, "what was written is kept"), open(path, "a+b") as file:
        busy = f"another process writes {path}; wait for its end, or name another --output"
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(busy) from None
        file.seek(0)
        content = file.read()
        if content.count(b"\n") != len(lines):
            raise ValueError(busy)
        file.truncate(content.rfind(b"\n") + 1)
        if not lines:
            _append(file, {"type": "settings", **settings})
        yield Record(lines[1:], output, file)


def _append(file: IO, line: dict) -> None:
    file.write(_encoded(json.dumps(line, ensure_ascii=False)) + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _encoded(text: str) -> bytes:
    # Lone surrogates cannot be encoded as UTF-8.
    return text.encode("utf-8", "replace")
