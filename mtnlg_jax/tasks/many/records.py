"""Read the records of a file one after the other, or the texts of a folder, as objects."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from mtnlg_jax.data.read import kinds, open_files
from mtnlg_jax.storage import missing
from mtnlg_jax.tasks.example_files import TABLES, kind_of, read_items, read_text
from mtnlg_jax.tasks.example_tables import read_records
from mtnlg_jax.tasks.layouts import LAYOUTS

LINES = (".jsonl", ".ndjson")
# Keys of the text of a row, in files with neither an "input" nor the keys of a known layout.
TEXT_KEYS = (
    *("text", "review", "sentence", "content", "body", "comment", "document", "article"),
    *("question", "文本", "评论", "内容"),
)
REFERENCE_KEYS = ("reference", "label")
# Rows of Parquet that are held at once.
_AT_ONCE = 1024


class Source:
    """A file of rows or a folder of texts, which can be read several times.

    Attributes:
      path: its path.
      digest: SHA-256 of its bytes, for a folder of the names and bytes of its texts.
      left_out: names of the files of a folder that are not texts.
    """

    def __init__(self, path: str):
        """Raise ValueError if there is nothing to read, or a file of an unknown kind."""
        found = open_files.find(path)
        if found is None:
            raise ValueError(missing(path))
        self.path = Path(path)
        self._whole: list | None = None
        self.is_folder = found.is_folder
        self.files = [file for file in found.files if kinds.kind_of(file.name) in kinds.TEXT]
        self.left_out: list[str] = []
        if not self.is_folder:
            self.kind = kind_of(self.path)
            self.digest = open_files.content_stamp(found.files[0])
            return
        self.left_out = [file.name for file in found.files if file not in self.files]
        if not self.files:
            raise ValueError(
                f"{path} holds no text to answer; put files {kinds.describe(kinds.TEXT)} there, or "
                "name a file of rows"
            )
        stamps = [(file.name, open_files.content_stamp(file)) for file in self.files]
        self.digest = "sha256:" + hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
        self.kind = ""

    def records(self, columns: dict[str, str] | None, notes: list[str]) -> Iterator:
        """Yield an object for each row, or the ValueError of a row that cannot be read.

        Lines and Parquet are read as they are needed; tables and JSON are read as a whole, once.
        Objects of a table with a header also hold the cells under the numbers of their columns.
        """
        if self.is_folder:
            return map(_text_of, self.files)
        if self.kind in LINES and not self._is_wide():
            return _lines(self.path)
        if self.kind == ".parquet":
            return _parquet(self.path)
        if self._whole is None:
            items, _ = read_items(self.path, columns, ("input",), notes, lenient=True)
            self._whole = [item for _, item in items]
        return iter(self._whole)

    def columns(self, notes: list[str]) -> dict[str, str] | None:
        """Return the columns of a table whose first line names them, if no known layout has them.

        None: the readers of layouts know, or the table has no header.
        """
        if self.is_folder or self.kind not in TABLES:
            return None
        records = read_records(self.path, self.kind, read_text(self.path))
        heads = [cell.strip() for cell in records[0][1]] if records else []
        known = {"input", "reference"} <= set(heads)
        if known or any(layout.fits(lambda key: key in heads) for layout in LAYOUTS):
            return None
        return columns_of(heads, notes)

    def _is_wide(self) -> bool:
        """Return whether the file begins with the mark of UTF-16."""
        try:
            with open_files.open_file(str(self.path)) as stream:
                return stream.read(2) in (b"\xff\xfe", b"\xfe\xff")
        except open_files.COMPRESSION_ERRORS:
            return False  # which reading tells


def columns_of(keys: list[str], notes: list[str]) -> dict[str, str] | None:
    """Return the columns of rows with these keys: those of TEXT_KEYS; None if there are none."""
    names = {key.casefold(): key for key in reversed(keys)}
    text = next((names[key] for key in ("input", *TEXT_KEYS) if key in names), None)
    if text is None:
        return None
    columns = {"input": text}
    reference = next((names[key] for key in REFERENCE_KEYS if key in names), None)
    if reference:
        columns["reference"] = reference
    if text != "input":
        flags = ",".join(f"{field}={key}" for field, key in columns.items())
        notes.append(f"the input is taken from {text!r}: --columns={flags}")
    return columns


def _text_of(file: open_files.File):
    try:
        with open_files.open_file(file.path) as stream:
            data = stream.read()
    except open_files.COMPRESSION_ERRORS as error:
        return ValueError(f"{file.name}: the compressed file is cut short or damaged ({error})")
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        return ValueError(
            f"{file.name} is not {'UTF-16' if wide else 'UTF-8'} at byte {error.start}; "
            "convert it, for example with iconv"
        )
    return {"id": file.name, "input": text}


def _lines(path: Path) -> Iterator:
    number = 0
    try:
        with open_files.open_file(str(path)) as stream:
            # Lines of bytes end at LF alone: a text may hold U+2028 and the like.
            for number, line in enumerate(stream, 1):
                if line.strip() and line.strip() != b"\xef\xbb\xbf":
                    yield _object_of(line, number)
    except open_files.COMPRESSION_ERRORS as error:
        raise ValueError(
            f"{path}: the compressed file is cut short or damaged after line {number} ({error})"
        ) from None


def _object_of(line: bytes, number: int):
    try:
        return json.loads(line.decode("utf-8-sig"), strict=False)
    except UnicodeDecodeError as error:
        return ValueError(f"line {number} is not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"line {number} is not valid JSON ({error})")


def _parquet(path: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_AT_ONCE):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path} is not a readable Parquet file ({str(error).splitlines()[0]})"
        ) from None
