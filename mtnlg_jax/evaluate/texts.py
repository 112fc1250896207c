"""Read the texts to score."""

import io
import sys
from typing import Any, cast

from mtnlg_jax.data.read.documents import ReadReport, note_lines, read_documents, read_stream


def read_texts(
    path: str, text_key: str = "text", on_error: str = "raise", encoding: str = ""
) -> tuple[list[str], dict[str, int]]:
    """Return the documents of a file or folder, and counts of what was left out or repaired.

    "-" is standard input. Counts of 0 are left out. Notes on single documents are printed on
    standard error. Raises ValueError if there is no text.
    """
    report = ReadReport()
    given: dict[str, Any] = {"on_error": on_error, "report": report, "encoding": encoding}
    if path == "-":
        name = "standard input"
        if sys.stdin.isatty():
            print("type the text, end with Ctrl-D:", file=sys.stderr)
        stream = cast(io.BufferedReader, sys.stdin.buffer)  # typeshed only promises BinaryIO
        texts = [document.text for document in read_stream(stream, name, **given)]
    else:
        name = path
        texts = [document.text for document in read_documents(name, text_key, **given)]
    if not texts:
        raise ValueError(f"{name} contains no text; give a file or a folder with text")
    for line in note_lines(report.notes):
        print(f"{name}: {line}", file=sys.stderr)
    return texts, {
        what: count
        for what, count in report.counts().items()
        if count and what not in ("files", "documents", "bytes")
    }
