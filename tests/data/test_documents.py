import gzip
import json
import random
import subprocess
import sys
import sysconfig

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mtnlg_jax.data.documents import ReadReport, embedded_documents, read_documents

STORY = ["First, there was a word.", "Zweitens: ein Wort.\nUnd noch eines.", "第三，有一句话。"]


def _lines(texts):
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()


def _zstd(data):
    return zstandard.ZstdCompressor().compress(data)


def _texts(path, **options):
    return [document.text for document in read_documents(path, **options)]


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", _lines(STORY)),
    ("a.JSONL", b"\xef\xbb\xbf" + _lines(STORY)),
    ("a.jsonl.gz", gzip.compress(_lines(STORY[:1])) + gzip.compress(_lines(STORY[1:]))),
    ("a.jsonl.zst", _zstd(_lines(STORY[:1])) + _zstd(_lines(STORY[1:]))),
    ("a.json", _lines(STORY)),
    ("a.json", json.dumps([{"text": text} for text in STORY], indent=2).encode()),
    ("a.json.zst", _zstd(json.dumps(STORY).encode())),
    ("a.json", b" \n[" + b" , ".join(json.dumps(text).encode() for text in STORY) + b"\n]\n"),
    ("a.ndjson", b"\n" + _lines(STORY) + b"\n\n"),
])
def test_many_documents_a_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert _texts(tmp_path / name) == STORY


@pytest.mark.parametrize("name, pack", [("a.txt", bytes), ("a.md", bytes), ("a.text", bytes),
                                        ("a.txt.gz", gzip.compress), ("a.md.zst", _zstd)])
def test_one_document_a_file(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack("\n".join(STORY).encode()))
    (document,) = read_documents(tmp_path / name)
    assert (document.text, document.source) == ("\n".join(STORY), name)


def test_parquet(tmp_path):
    rows = [*STORY, None] * 50
    pyarrow.parquet.write_table(pyarrow.table({"n": list(range(200)), "body": rows}), tmp_path / "a.parquet")
    report = ReadReport()
    documents = list(read_documents(tmp_path / "a.parquet", text_key="body", report=report))
    assert [document.text for document in documents] == STORY * 50
    assert (documents[-1].source, report.empty) == ("a.parquet:199", 50)


def test_one_object_over_several_lines_and_a_list_of_lines(tmp_path):
    (tmp_path / "poem.json").write_text(json.dumps({"paragraphs": STORY}, indent=2))
    assert _texts(tmp_path, text_key="paragraphs") == ["\n".join(STORY)]


def test_folders_are_read_in_one_order_and_what_is_hidden_or_unknown_is_left_out(tmp_path, caplog):
    names = ["b.txt", "a/z.txt", "a.txt", "a/b/c.md", "Z.jsonl", ".b.txt", ".git/x", "a.pdf", "a.tar.gz"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    report = ReadReport()
    documents = list(read_documents(tmp_path, report=report))
    assert [document.text for document in documents] == ["Z.jsonl", "a.txt", "a/b/c.md", "a/z.txt", "b.txt"]
    assert [document.source for document in documents][:2] == ["Z.jsonl:1", "a.txt"]
    assert (report.files, report.skipped_files, report.documents) == (5, 2, 5)
    assert "2 files" in caplog.text


@pytest.mark.parametrize("content, text, counts", [
    (b"\xef\xbb\xbfmark", "mark", {}),
    (b"one\r\ntwo\rthree\n", "one\ntwo\nthree\n", {}),
    (b"nul\0 bell\x07 feed\x0c tab\t", "nul bell feed tab\t", {"control_characters": 3}),
    ("kept \ufffd \u200b \x7f \x85".encode(), "kept \ufffd \u200b \x7f \x85", {}),
    (b"caf\xc3\xa9 caf\xe9 \xe5\xad end", "caf\u00e9 caf\ufffd \ufffd end", {"repaired": 1}),
    (b"surrogate \xed\xa0\x80 overlong \xc0\xaf", "surrogate \ufffd\ufffd\ufffd overlong \ufffd\ufffd",
     {"repaired": 1}),
])
def test_what_is_mended(tmp_path, content, text, counts):
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "sound"}')
    report = ReadReport()
    assert _texts(tmp_path, report=report) == [text, "sound"]
    expected = ReadReport(files=2, documents=2, bytes=len(text.encode()) + 5, **counts)
    assert report == expected


def test_invalid_text_inside_json(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "half \\ud83d pair"}\n{"text": "whole \\ud83d\\ude00"}\n'
                                       b'{"text": "nul \\u0000, raw\ttab, bad \xff byte"}\n')
    (tmp_path / "b.json").write_bytes(b'["bad \xff byte \\udc80"]')
    report = ReadReport()
    assert _texts(tmp_path, report=report) == ["half \ufffd pair", "whole \U0001f600",
                                               "nul , raw\ttab, bad \ufffd byte", "bad \ufffd byte \ufffd"]
    assert (report.repaired, report.control_characters) == (3, 1)


def test_text_in_another_encoding_is_told(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes(("天下大势，分久必合。" * 50).encode("gb18030"))
    assert "\ufffd" in _texts(tmp_path)[0]
    assert "iconv" in caplog.text


def test_empty_documents_are_dropped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b" \n\t\0\r\n")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": ""}\n{"text": null}\n{"text": "x"}\n[]\n')
    report = ReadReport()
    assert _texts(tmp_path, report=report) == ["x"]
    assert report.empty == 5


LONG = _lines(["a", "b", random.Random(0).randbytes(100_000).hex()])


@pytest.mark.parametrize("name, content, place, sound", [
    ("b.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}\n', "line 2", ["a", "b"]),
    ("b.jsonl", b'{"text": "a"}\n[1]\n3\n', "line 2", ["a"]),
    ("b.jsonl", b'{"body": "a"}\n{"text": "b"}\n', "no 'text' among body; name the right one", ["b"]),
    ("b.jsonl", b"[" * 100_000 + b'\n{"text": "b"}\n', "line 1", ["b"]),
    ("b.json", b'[{"text": "a"}, {"text": "b"}, {"te', "item 3", ["a", "b"]),
    ("b.json", b'["a", "b" nonsense', "item 3", ["a", "b"]),
    ("b.jsonl.gz", gzip.compress(LONG)[:-5000], "cut short", ["a", "b"]),
    ("b.jsonl.zst", _zstd(LONG)[:-5000], "cut short", ["a", "b"]),
    ("b.txt.gz", gzip.compress(LONG)[:-4], "cut short", []),
    ("b.txt.zst", _zstd(LONG)[:-4], "cut short", []),
    ("b.txt.gz", b"no gzip at all", "damaged", []),
    ("b.txt.zst", b"no zstd at all", "damaged", []),
    ("b.parquet", b"PAR1 nothing PAR1", "not a readable Parquet", []),
])
def test_damage_is_named_or_dropped_and_counted(tmp_path, name, content, place, sound):
    (tmp_path / "a.txt").write_text("before")
    (tmp_path / name).write_bytes(content)
    (tmp_path / "c.txt").write_text("after")
    with pytest.raises(ValueError, match=place) as error:
        _texts(tmp_path)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert "on_error=skip" in str(error.value)

    report = ReadReport()
    assert _texts(tmp_path, on_error="skip", report=report) == ["before", *sound, "after"]
    assert report.damaged == content.count(b"\n3\n") + 1


def test_long_items_of_a_list(tmp_path):
    items = ["x" * length + '"\\]' for length in (1, 70_000, 65_535, 65_536, 400_000, 3)]
    (tmp_path / "a.json").write_text(json.dumps(items))
    assert _texts(tmp_path) == items


def test_what_cannot_be_read_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_documents(tmp_path / "nowhere")
    (tmp_path / "a.pdf").write_text("text")
    with pytest.raises(ValueError, match=r"a\.pdf has an unknown suffix; rename it to one of \.txt"):
        read_documents(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="on_error='ignore'"):
        read_documents(tmp_path, on_error="ignore")


def test_embedded_text():
    documents = list(embedded_documents())
    text = "\n\n".join(document.text for document in documents)
    assert 800_000 < len(text.encode()) < 1_500_000
    paragraphs = [paragraph for document in documents for paragraph in document.text.strip().split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert all("\n" not in paragraph and len(paragraph.split()) >= 5 for paragraph in paragraphs)
    assert ">>>" not in "".join(paragraph[:3] for paragraph in paragraphs) and "``" not in text
    for place in (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib")):
        assert place == "/usr" or place not in text
    assert [document.source for document in documents][:1] == ["topic:assert"]
    assert documents[-1].source.startswith("module:")


def test_data_does_not_need_jax():
    code = ("import sys, mtnlg_jax.data.prepare, mtnlg_jax.data.batches; "
            "sys.exit(any(name.split('.')[0] in ('jax', 'flax') for name in sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
