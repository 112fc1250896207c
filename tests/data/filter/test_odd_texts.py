"""Read unusual texts completely and once, without losing others."""

import gzip
import io
import json

import pytest

from mtnlg_jax.data.encode import _cut_marks
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.read.charsets import as_utf8
from mtnlg_jax.data.read.controls import repair_controls
from mtnlg_jax.data.read.documents import ReadReport, read_documents
from mtnlg_jax.data.read.open_files import COMPRESSION_ERRORS, open_file


def _texts(folder, on_error="raise", encoding="", report=None):
    found = read_documents(folder, on_error=on_error, report=report, encoding=encoding)
    return [document.text for document in found]


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("He said â€œhelloâ€\x9d to the world", "He said “hello” to the world"),
        ("so ðŸ˜\x8d it is", "so 😍 it is"),
        ("a \x93quote\x94 and more\x85", "a “quote” and more…"),
    ],
)
def test_utf8_read_as_windows_1252_with_controls_is_decoded(text, repaired):
    assert repair_controls(text)[0] == repaired


@pytest.mark.parametrize("odd", ["&#8;", "&#11;", "&#x1f;", "&#xFFFF;"])
@pytest.mark.parametrize(
    "element", ["<sup>2{}</sup>", "<pre>a{}b</pre>", "<sub>{}</sub>", "x{}y<img alt='a'>"]
)
def test_a_reference_to_a_control_loses_nothing_else(odd, element, tmp_path):
    sentence = "This is a sentence that is long enough to be taken for the text of the page. "
    page = f"<p>{sentence * 4}</p><p>Here it is: {element.format(odd)} and then {sentence * 2}</p>"
    (tmp_path / "a.html").write_text(f"<html><body><article>{page}</article></body></html>")
    (text,) = _texts(tmp_path)
    assert text.count("long enough") >= 5 and "Here it is" in text


def test_a_page_of_an_undefined_encoding_is_read(tmp_path):
    sentence = "This is a sentence that is long enough to be taken for the text of the page. "
    head = '<meta http-equiv="Content-Type" content="text/html; charset=undefined">'
    (tmp_path / "a.html").write_text(
        f"<html><head>{head}</head><body><p>{sentence * 6}</p></body></html>"
    )
    assert len(_texts(tmp_path)) == 1


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_ascii_is_read_despite_a_named_wide_encoding(encoding):
    stream, found = as_utf8(io.BufferedReader(io.BytesIO(b"plain ascii text in here")), encoding)
    assert stream.read() == b"plain ascii text in here" and found == ""
    wide = "plain text".encode(encoding)
    assert as_utf8(io.BufferedReader(io.BytesIO(wide)), encoding)[0].read() == b"plain text"


@pytest.mark.parametrize(
    ("name", "content", "left"),
    [
        ("a.json", '[{"text": "one", "n": ' + "1" * 5000 + '}, {"text": "two"}]', None),
        ("a.jsonl", '{"text": "one", "n": ' + "1" * 5000 + '}\n{"text": "two"}\n', ["two"]),
        ("a.csv", "id,text\r1,one\r2,two\r", None),
    ],
)
def test_an_invalid_value_is_damage(name, content, left, tmp_path):
    (tmp_path / name).write_bytes(content.encode())
    with pytest.raises(ValueError, match=name):
        _texts(tmp_path)
    if left is not None:
        assert _texts(tmp_path, on_error="skip") == left


@pytest.mark.parametrize("end", [b"\x1a", b"\x00\x00", b"\x7f\n\x1a"])
def test_removals_at_the_end_of_a_long_text_repeat_nothing(end, tmp_path, monkeypatch):
    monkeypatch.setattr("mtnlg_jax.data.read.long_texts.PIECE", 900)
    (tmp_path / "a.txt").write_bytes(b"line of text here\n" * 300 + end)
    report = ReadReport()
    pieces = [document.text for document in read_documents(tmp_path, report=report, pieces=True)]
    assert len(pieces) > 2 and "".join(pieces).count("line of text here") == 300
    assert report.bytes == len("".join(pieces).encode())


def test_a_long_text_that_begins_with_white_space_is_prepared(tmp_path, gpt2_files):
    (tmp_path / "a.txt").write_text("\n" * 70_000 + "Hello world, this is text. " * 100)
    info = prepare(
        tmp_path / "a.txt", tmp_path / "out", tokenizer=str(gpt2_files), heldout=0, progress=False
    )
    assert info["train"]["documents"] == 1


def test_a_token_across_a_space_is_not_cut():
    assert _cut_marks(_WithWords(["foo", " bar", "\n"])) == (b"\n", b" ")
    assert _cut_marks(_WithWords(["foo bar", "\n"])) == (b"\n",)
    assert _cut_marks(_WithWords(["foo bar", "a\nb"])) == ()


class _WithWords:
    """A tokenizer with one id a byte, and words as well."""

    def __init__(self, words):
        self._pieces = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
        self.vocab_size = len(self._pieces)

    def encode(self, text):
        return list(text.encode())

    def token_bytes(self, index):
        return self._pieces[index]


def test_a_truncated_compressed_file_is_damage(tmp_path):
    whole = gzip.compress(json.dumps({"text": "a" * 5000}).encode())
    (tmp_path / "a.gz").write_bytes(whole[:-9])
    for size in (-1, 100):
        with pytest.raises(COMPRESSION_ERRORS), open_file(str(tmp_path / "a.gz")) as stream:
            while stream.read(size) and size > 0:
                pass
