"""Readers: text, JSON lines, JSON lists and Parquet, plain or compressed, one `Document` at a time.

What comes out is clean: valid Unicode, LF line ends, no control characters but tab and newline, never empty.
What was mended or dropped is counted in a `ReadReport`.
"""

import ast
import gzip
import inspect
import io
import json
import logging
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_TEXT, _LINES, _JSON, _PARQUET = (".txt", ".md", ".text"), (".jsonl", ".ndjson"), (".json",), (".parquet",)
READABLE = ".txt .md .text .jsonl .ndjson .json (each also with .gz or .zst) .parquet"

_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
_SURROGATES = re.compile("[\ud800-\udfff]")
# Bytes that are not UTF-8 arrive as U+DC80..U+DCFF ("surrogateescape"); the others come from JSON escapes.
_OTHER_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
# No damaged text reaches this share of repaired characters; text in another encoding does.
_SUSPICIOUS_SHARE = 0.05

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """``source`` is the path below the folder read, with ``:line`` in files of many; never absolute. Of a pair,
    ``text`` is the answer alone and ``prompt`` what stands before it."""

    text: str
    source: str
    prompt: str | None = None


@dataclass
class ReadReport:
    """What became of the input. Counts of documents where nothing else is said."""

    files: int = 0
    skipped_files: int = 0  # files of a folder with an unknown suffix
    documents: int = 0
    bytes: int = 0  # UTF-8 bytes of the documents that came out
    empty: int = 0  # dropped: nothing but white space
    damaged: int = 0  # dropped, with on_error="skip"
    repaired: int = 0  # held invalid UTF-8, now U+FFFD
    control_characters: int = 0  # characters removed


class _Damaged(str):
    """Why a document could not be read; stands in its place."""


def read_documents(path: str | os.PathLike, text_key: str | Callable[[object], str] = "text", on_error: str = "raise",
                   report: ReadReport | None = None) -> Iterator[Document]:
    """Documents of a file, or of every readable file below a folder in the order of their relative paths.

    A text file is one document; JSON lines, the items of a JSON list and the rows of Parquet are one each,
    their text under ``text_key`` (a list of strings there is joined by newlines). Hidden files are skipped.
    Memory is bounded by the longest document. A function for ``text_key``, as of `pairs.pair_maker`, makes the
    text of each JSON value, or raises ValueError saying what is wrong with that.

    Raises FileNotFoundError at once, and ValueError for a file of unknown suffix that was named itself;
    later, unless ``on_error="skip"``, ValueError with the place of a damaged line or file.
    """
    path = Path(path)
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} is not known; use 'raise' or 'skip'")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a file or a folder with any of {READABLE}")
    report = ReadReport() if report is None else report
    if path.is_dir():
        root, names = path, _readable_files(path, report)
    elif _kind(path.name):
        root, names = path.parent, [path.name]
    else:
        raise ValueError(f"{path} has an unknown suffix; rename it to one of {READABLE}")
    return _read_files(root, names, text_key, on_error, report)


def _kind(name: str) -> str | None:
    """The suffix that says how to read a file, or None; that of the compression does not count."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix in (".gz", ".zst"):
        suffix = os.path.splitext(stem)[1]
        return suffix if suffix in _TEXT + _LINES + _JSON else None
    return suffix if suffix in _TEXT + _LINES + _JSON + _PARQUET else None


def _readable_files(folder: Path, report: ReadReport) -> list[str]:
    def fail(error: OSError):  # os.walk passes over a folder that it may not open; silence would lose text
        raise error

    names = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = [name for name in files if not name.startswith(".")]
        readable = [name for name in shown if _kind(name)]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in readable]
        report.skipped_files += len(shown) - len(readable)
    if report.skipped_files:
        _log.warning("%s: skipped %d files; what is read is %s", folder, report.skipped_files, READABLE)
    return sorted(names)


def _read_files(root: Path, names: list[str], text_key: str, on_error: str,
                report: ReadReport) -> Iterator[Document]:
    for name in names:
        report.files += 1
        unit = {".json": "item", ".parquet": "row"}.get(_kind(name), "line")
        for number, text in _read_file(root / name, text_key):
            if isinstance(text, _Damaged):
                if on_error == "raise":
                    place = f"{root / name}, {unit} {number}" if number else f"{root / name}"
                    raise ValueError(f"{place}: {text}; mend it, or drop what is damaged with on_error=skip")
                report.damaged += 1
                continue
            source = name.encode("utf-8", "replace").decode() + (f":{number}" if number else "")
            prompt, text = getattr(text, "prompt", None), _clean(text or "", source, report)
            if text and prompt is not None:
                prompt = _mend(prompt, source, report)
                report.bytes += len(prompt.encode())
            if text:
                yield Document(text, source, prompt)


def _clean(text: str, source: str, report: ReadReport) -> str:
    """Valid text without control characters, or "" where nothing is left; counts what it does."""
    text = _mend(text, source, report)
    if not text.strip():
        report.empty += 1
        return ""
    report.documents += 1
    report.bytes += len(text.encode())
    return text


def _mend(text: str, source: str, report: ReadReport) -> str:
    if _SURROGATES.search(text):
        before = text.count("\ufffd")
        data = _OTHER_SURROGATES.sub("\ufffd", text).encode("utf-8", "surrogateescape")
        text = data.decode("utf-8", "replace")
        report.repaired += 1
        if text.count("\ufffd") - before > _SUSPICIOUS_SHARE * len(text):
            _log.warning("%s: much of it is not UTF-8; if it is in another encoding, convert it first, "
                         "as in `iconv -f GB18030 -t UTF-8`", source)
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text, removed = _CONTROLS.subn("", text)
    report.control_characters += removed
    return text


def _read_file(path: Path, text_key: str) -> Iterator[tuple[int, str | None]]:
    """(number, text) of each document, number 0 for a whole file; `_Damaged` where a text should be."""
    kind, number = _kind(path.name), 0
    if callable(text_key) and kind not in _LINES + _JSON:
        yield 0, _Damaged("pairs are read from .jsonl, .ndjson and .json")
        return
    try:
        if kind in _PARQUET:
            yield from _read_parquet(path, text_key)
            return
        with _open(path) as stream:
            if kind in _TEXT:
                yield 0, _decode(stream.read())
                return
            values = _read_json_list(stream) if _is_json_list(kind, stream) else _read_lines(stream, kind)
            for number, value in values:
                yield number, value if isinstance(value, _Damaged) else _text_of(value, text_key)
    except (EOFError, zlib.error, gzip.BadGzipFile, _ZstdError) as error:
        yield number, _Damaged(f"the compressed file is cut short or damaged ({error})")


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _text_of(value, text_key: str) -> str | None:
    """The text of a JSON value: a string, or what an object holds under the key."""
    if callable(text_key):
        try:
            return text_key(value)
        except ValueError as error:
            return _Damaged(error)
    if isinstance(value, dict):
        if text_key not in value:
            return _no_text(text_key, value)
        value = value[text_key]
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if value is None or isinstance(value, str):
        return value
    return _Damaged(f"{text_key!r} holds {type(value).__name__}, not text")


def _no_text(text_key: str, names: Iterable[str]) -> _Damaged:
    return _Damaged(f"no {text_key!r} among {', '.join(list(names)[:8])}; name the right one with text_key")


def _read_lines(stream: io.BufferedIOBase, kind: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if kind in _JSON and number == 1 and line.strip() == b"{":
            line += stream.read()  # a .json file with one object, spread over lines
        if line.strip():
            try:
                # strict=False: control characters inside strings are no reason to refuse a text.
                yield number, json.loads(_decode(line), strict=False)
            except (ValueError, RecursionError) as error:
                yield number, _Damaged(f"not valid JSON ({error})")


def _is_json_list(kind: str, stream: io.BufferedReader) -> bool:
    return kind in _JSON and stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _read_json_list(stream: io.BufferedIOBase) -> Iterator[tuple[int, object]]:
    """The items of one list, without ever holding the list."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    decoder = json.JSONDecoder(strict=False)
    buffer, number, size = text.read(1 << 16).lstrip()[1:], 1, 1 << 16
    while True:
        buffer = buffer.lstrip(" \t\r\n,") if number > 1 else buffer.lstrip()
        if buffer.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(buffer)
        except (ValueError, RecursionError) as error:
            more = text.read(size)
            if not more:
                # Where one item is damaged, the start of the next cannot be told.
                yield number, _Damaged(f"the list is cut short or damaged here ({error})")
                return
            buffer, size = buffer + more, 2 * size  # twice as much each time: a long item stays linear
            continue
        yield number, value
        buffer, number, size = buffer[end:], number + 1, 1 << 16


def _read_parquet(path: Path, text_key: str) -> Iterator[tuple[int, str | None]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                yield 0, _no_text(text_key, names)
                return
            for batch in file.iter_batches(batch_size=64, columns=[text_key]):
                column = batch.column(0)
                if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                    # As strings, pyarrow would refuse invalid UTF-8 instead of letting us repair it.
                    column = column.cast(pyarrow.large_binary())
                for value in column.to_pylist():
                    number += 1
                    yield number, _decode(value) if isinstance(value, bytes) else _text_of(value, text_key)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's fault and not the file's
        yield number, _Damaged(f"not a readable Parquet file ({str(error).splitlines()[0]})")


class _ZstdError(Exception):
    pass


def _open(path: Path) -> io.BufferedReader:
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(path), 1 << 17)
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdFile(open(path, "rb")), 1 << 17)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """Frame after frame. zstandard's own reader takes a frame that was cut short for the end of the file."""

    def __init__(self, file: io.BufferedReader):
        import zstandard

        self._new_frame = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._error = zstandard.ZstdError
        self._file, self._frame = file, None
        self._compressed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._compressed or self._file.read(1 << 17)
            if not data:
                if self._frame:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise _ZstdError(error) from None
            ended = self._frame.eof
            self._compressed = self._frame.unused_data if ended else b""
            self._frame = None if ended else self._frame
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def embedded_documents() -> Iterator[Document]:
    """A corpus that needs no download: the prose of the running interpreter's own documentation, about 1 MB.

    The topics of ``help()``, then a document for each module of the standard library with the docstrings of
    the module, its classes and its functions; parsed, never imported. Code, tables and signatures are left
    out, and no paragraph comes twice. The same text on every machine with the same version of Python.
    """
    seen = set()
    for source, docstrings in _documentation():
        paragraphs = []
        for docstring in docstrings:
            for paragraph in _prose(docstring):
                if paragraph.casefold() not in seen:
                    seen.add(paragraph.casefold())
                    paragraphs.append(paragraph)
        if paragraphs:
            yield Document("\n\n".join(paragraphs) + "\n", source)


def _documentation() -> Iterator[tuple[str, list[str]]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions pack it separately
        topics = {}
    for name in sorted(topics):
        yield f"topic:{name}", [topics[name]]
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        folder = library / name
        files = [library / f"{name}.py", *folder.rglob("*.py")] if name != "test" else []
        for file in sorted(files, key=lambda file: file.relative_to(library).as_posix()):
            # Tests say little in prose, and not every installation has them.
            if file.is_file() and not {"test", "tests", "idle_test"} & set(file.relative_to(library).parts):
                try:
                    tree = ast.parse(file.read_bytes())
                except SyntaxError:
                    continue
                yield f"module:{file.relative_to(library).as_posix()}", list(_docstrings(tree))


def _docstrings(node: ast.AST) -> Iterator[str]:
    yield ast.get_docstring(node, clean=False) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


_BULLET = re.compile(r"^\s*(?:[-*+•]|\(?\w{1,2}[.)])\s+")
_ROLE = re.compile(r":[a-z:]+:(?=`)|`")
_EMPHASIS = re.compile(r"(?<![\w\"'*])(\*\*?)(\w(?:[^*]*\w)?)\1(?![\w\"'*])")


def _prose(docstring: str) -> Iterator[str]:
    """The paragraphs of a docstring that are sentences, each on one line, without markup."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        # Each item of a list is a paragraph of its own.
        items = [[]]
        for line in block.split("\n"):
            if _BULLET.match(line):
                items.append([])
            items[-1].append(_BULLET.sub("", line).strip())
        for lines in items:
            if any(line.startswith((">>>", "...", "::=")) for line in lines):
                continue
            paragraph = " ".join(" ".join(line for line in lines if line).split())
            paragraph = _EMPHASIS.sub(r"\2", _ROLE.sub("", paragraph))
            if _is_prose(paragraph):
                yield paragraph


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    plain = sum(word.strip("'\"(),.;:!?-").isalpha() for word in words)
    return (len(words) >= 5 and plain >= 0.75 * len(words) and paragraph[0].isupper()
            # Not ":", which announces the code or table that was left out.
            and paragraph.rstrip("\"')").endswith((".", "!", "?")))
