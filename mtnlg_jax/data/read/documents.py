"""Documents of files and folders: text, JSON lines, JSON, tables, Parquet, HTML and WARC, plain or
compressed.

Documents are clean: valid Unicode, LF line ends, no control characters except tab and newline (see
`controls`), never empty. Repaired, dropped and skipped input is counted in a `ReadReport`, with the
first names.
"""

import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator

from mtnlg_jax.data.read import charsets, long_texts, open_files
from mtnlg_jax.data.read.kinds import READABLE, describe, kind_of, suffix_of, unit_of
from mtnlg_jax.data.read.open_files import Damaged, File, Skipped
from mtnlg_jax.data.read.readers import Item, Reader
from mtnlg_jax.data.read.repair import drop, repair_pair, utf8_size
from mtnlg_jax.data.read.results import NAMED, Document, ReadReport, note_lines

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "NAMED",
    "READABLE",
    "Document",
    "ReadReport",
    "list_files",
    "note_lines",
    "read_documents",
    "read_file",
    "read_stream",
]

MAX_DOCUMENT_BYTES = 256 << 20
_log = logging.getLogger(__name__)


def read_documents(
    path: str | os.PathLike,
    text_key: str | Callable[[object], str] = "text",
    on_error: str = "raise",
    report: ReadReport | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    encoding: str = "",
    pieces: bool = False,
) -> Iterator[Document]:
    """Yield the documents of a file, or of every readable file below a folder by relative path.

    See `list_files` and `read_file`. Without a ``report`` its notes are logged as warnings.

    Raises FileNotFoundError at once, and ValueError for a file of unknown suffix that was named
    itself. Unless ``on_error="skip"``, ValueError is raised later for a damaged line or file.
    """
    _check(on_error, max_document_bytes, encoding)
    filled = ReadReport() if report is None else report
    listed = list_files(path, filled)

    def documents() -> Iterator[Document]:
        for file in listed:
            yield from read_file(
                file, text_key, on_error, filled, max_document_bytes, encoding, pieces
            )
        if report is None:  # the caller does not see the notes otherwise
            for line in note_lines(filled.notes):
                _log.warning("%s: %s", path, line)

    return documents()


def list_files(
    path: str | os.PathLike,
    report: ReadReport | None = None,
    hashed: bool = False,
    kinds: tuple[str, ...] | None = None,
) -> list[File]:
    """Return the readable files at a path or fsspec URL (gs://, s3://, memory://, file://).

    For a folder these are all readable files below it, by relative path. Links are followed (see
    `open_files.find`). ``report`` counts what is left out: hidden names, unknown suffixes, links to
    what was read already. With ``hashed`` each ``stamp`` is the SHA-256 of the content, which is
    read for it. ``kinds``: the suffixes to list, if not all readable ones.

    Raises FileNotFoundError, and ValueError for a file of unknown suffix that was named itself or a
    URL that needs a package. The list of a folder without a readable file is empty.
    """
    wanted = READABLE if kinds is None else describe(kinds)
    found = open_files.find(path)
    if found is None:
        raise FileNotFoundError(
            f"{path} does not exist; give a file or a folder with any of {wanted}"
        )
    readable = [
        file
        for file in found.files
        if (kind := kind_of(file.name)) and (kinds is None or kind in kinds)
    ]
    if not found.is_folder and not readable:
        raise ValueError(
            f"{found.path} has the suffix {suffix_of(found.path)}, which is not read; unpack an "
            "archive, convert a file that is not text, or rename a text file to .txt. "
            f"Readable are {wanted}"
        )
    if report is not None:
        chosen = {file.name for file in readable}
        for file in found.files:
            if file.name not in chosen:
                report.skipped_files += 1
                report.note(f"files with the suffix {suffix_of(file.name)}, not read", file.name)
        for reason, name in found.left_out:
            report.left_out += 1
            report.note(f"left out, {reason}", name)
    if hashed:
        return [
            dataclasses.replace(file, stamp=open_files.content_stamp(file)) for file in readable
        ]
    return readable


def read_file(
    file: File,
    text_key: str | Callable[[object], str] = "text",
    on_error: str = "raise",
    report: ReadReport | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    encoding: str = "",
    pieces: bool = False,
) -> Iterator[Document]:
    """Yield the documents of one file of `list_files`, streaming.

    Memory is bounded by ``max_document_bytes``.

    A text file or HTML page is one document. So is each value of JSON lines and .json (of a list,
    each item), each row of a table or Parquet file, and each page of WARC.

    ``text_key`` names the text of a JSON value or row; a list of strings there is joined by
    newlines. "text|content" takes the first key that is there. "data.paragraphs.context" goes into
    objects and lists, which may hold several documents. An object of .json without the key stands
    for its only list of objects with the key. A function as ``text_key``, such as
    `pairs.pair_maker` returns, makes the text of each JSON value or table row, or raises ValueError
    with what is wrong.

    ``encoding`` applies to text that has no byte order mark, declares nothing and is not UTF-8 (see
    `charsets`). With ``pieces`` a text file of more than some megabytes is yielded as several
    `Document`, all but the last ``continued``.

    ValueError is raised, with its position, for a document that is damaged, binary, without text,
    not in its encoding, or longer than ``max_document_bytes``. With ``on_error="skip"`` it is
    dropped and counted; a text of which less than 5 % is not in its encoding is kept with U+FFFD
    there, and counted.
    """
    _check(on_error, max_document_bytes, encoding)
    report = ReadReport() if report is None else report
    report.files += 1
    before = report.documents + report.damaged
    reader = Reader(file, text_key, max_document_bytes, encoding)
    survey = long_texts.survey(reader) if pieces and long_texts.is_long(reader) else None
    if survey is None:
        unit = unit_of(file.name)
        # Closed here: an error that is kept holds the generator, and with it the open file.
        with contextlib.closing(reader.items()) as items:
            yield from _documents(reader, items, on_error, report, file.path, unit)
    else:
        yield from long_texts.read_pieces(reader, survey, on_error, report)
    if reader.decoded_from:
        report.note(f"files decoded from {reader.decoded_from}", file.name)
    if report.documents + report.damaged == before:
        report.files_without_text += 1
        report.note("files without text", file.name)


def read_stream(
    stream: io.BufferedIOBase,
    name: str = "standard input",
    on_error: str = "raise",
    report: ReadReport | None = None,
    encoding: str = "",
) -> Iterator[Document]:
    """Yield the one document of a text stream, by the rules of `read_file` for text files."""
    _check(on_error, 1, encoding)
    report = ReadReport() if report is None else report
    report.files += 1
    reader = Reader(File(name, name + ".txt", 0, ""), "text", MAX_DOCUMENT_BYTES, encoding)
    item = reader.of_text(io.BufferedReader(io.BytesIO(stream.read())))
    yield from _documents(reader, [item], on_error, report, name)


def _documents(
    reader: Reader,
    items: Iterable[Item],
    on_error: str,
    report: ReadReport,
    path: str,
    unit: str = "line",
) -> Iterator[Document]:
    """Yield a document for each item that is one; raise or count the others."""
    for item in items:
        source = f"{reader.source}:{item.number}" if item.number else reader.source
        position = f"{path}, {unit} {item.number}" if item.number else path
        if isinstance(item.text, Skipped):
            report.skipped_records += 1
            report.note(item.text, source)
            continue
        text = "" if item.text is None else item.text
        prompt = getattr(item.text, "prompt", None)
        if not isinstance(text, Damaged):
            if item.wrong and on_error == "raise":
                raise ValueError(
                    f"{position}: {_wrong(item.wrong, reader.encoding)}; "
                    f"{charsets.way_out(reader.encoding)}"
                )
            prompt, text = repair_pair(text, prompt, item.wrong, source, report, reader.encoding)
        if isinstance(text, Damaged):
            drop(text, position, source, on_error, report)
            continue
        if item.how:
            report.note(item.how, source)
        if not text.strip():
            report.empty += 1
            continue
        report.documents += 1
        report.bytes += utf8_size(text) + utf8_size(prompt or "")
        yield Document(text, source, prompt)


def _wrong(wrong: str, encoding: str) -> str:
    """Return what is wrong with bytes, in words that name their encoding."""
    return wrong if not encoding or encoding in wrong else f"not {encoding}"


def _check(on_error: str, max_document_bytes: int, encoding: str) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"unknown value on_error={on_error!r}; use 'raise' or 'skip'")
    if max_document_bytes < 1:
        raise ValueError(f"max_document_bytes={max_document_bytes} must be at least 1")
    charsets.check(encoding)
