import gzip
import hashlib
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import sysconfig
import tracemalloc

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mtnlg_jax.data.read import open_files
from mtnlg_jax.data.read.builtin_corpus import embedded_documents
from mtnlg_jax.data.read.documents import (
    ReadReport,
    list_files,
    note_lines,
    read_documents,
    read_file,
)

STORY = ["First, there was a word.", "Zweitens: ein Wort.\nUnd noch eines.", "第三，有一句话。"]


def _lines(texts):
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()


def _zstd(data):
    return zstandard.ZstdCompressor().compress(data)


def _texts(path, **options):
    return [document.text for document in read_documents(path, **options)]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", _lines(STORY)),
        ("a.JSONL", b"\xef\xbb\xbf" + _lines(STORY)),
        ("a.jsonl.gz", gzip.compress(_lines(STORY[:1])) + gzip.compress(_lines(STORY[1:]))),
        ("a.jsonl.zst", _zstd(_lines(STORY[:1])) + _zstd(_lines(STORY[1:]))),
        ("a.json", _lines(STORY)),
        ("a.json", json.dumps([{"text": text} for text in STORY], indent=2).encode()),
        ("a.json.zst", _zstd(json.dumps(STORY).encode())),
        ("a.json", b" \n[" + b" , ".join(json.dumps(text).encode() for text in STORY) + b"\n]\n"),
        ("a.ndjson", b"\n" + _lines(STORY) + b"\n\n"),
    ],
)
def test_files_of_many_documents(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert _texts(tmp_path / name) == STORY


@pytest.mark.parametrize(
    "name, pack",
    [
        ("a.txt", bytes),
        ("a.md", bytes),
        ("a.text", bytes),
        ("a.txt.gz", gzip.compress),
        ("a.md.zst", _zstd),
    ],
)
def test_files_of_one_document(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack("\n".join(STORY).encode()))
    (document,) = read_documents(tmp_path / name)
    assert (document.text, document.source) == ("\n".join(STORY), name)


def test_parquet(tmp_path):
    rows = [*STORY, None] * 50
    pyarrow.parquet.write_table(
        pyarrow.table({"n": list(range(200)), "body": rows}), tmp_path / "a.parquet"
    )
    report = ReadReport()
    documents = list(read_documents(tmp_path / "a.parquet", text_key="body", report=report))
    assert [document.text for document in documents] == STORY * 50
    assert (documents[-1].source, report.empty) == ("a.parquet:199", 50)


def test_json_objects_over_several_lines_and_lists_of_lines(tmp_path):
    (tmp_path / "poem.json").write_text(json.dumps({"paragraphs": STORY}, indent=2))
    assert _texts(tmp_path, text_key="paragraphs") == ["\n".join(STORY)]


def test_folders_are_read_in_a_fixed_order_without_hidden_or_unknown_files(tmp_path):
    names = [
        "b.txt",
        "a/z.txt",
        "a.txt",
        "a/b/c.md",
        "Z.jsonl",
        ".b.txt",
        ".git/x",
        "a.pdf",
        "a.tar.gz",
    ]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    report = ReadReport()
    documents = list(read_documents(tmp_path, report=report))
    assert [document.text for document in documents] == [
        "Z.jsonl",
        "a.txt",
        "a/b/c.md",
        "a/z.txt",
        "b.txt",
    ]
    assert [document.source for document in documents][:2] == ["Z.jsonl:1", "a.txt"]
    assert (report.files, report.skipped_files, report.documents) == (5, 2, 5)
    assert note_lines(report.notes) == [
        "2 left out, hidden: the name begins with a dot: .b.txt, .git/",
        "1 files with the suffix .pdf, not read: a.pdf",
        "1 files with the suffix .tar.gz, not read: a.tar.gz",
    ]


@pytest.mark.parametrize(
    "content, text, counts",
    [
        (b"\xef\xbb\xbfmark", "mark", {}),
        (b"one\r\ntwo\rthree\n", "one\ntwo\nthree\n", {}),
        (b"nul\0 bell\x07 feed\x0c tab\t", "nul bell feed\n tab\t", {"control_characters": 3}),
        ("kept \ufffd \u200b \u200c \u200d".encode(), "kept \ufffd \u200b \u200c \u200d", {}),
        (
            "one\x85two\x7fthree\x9dfour\ufeff five\u2028six".encode(),
            "one\ntwothreefour five\nsix",
            {"control_characters": 5},
        ),
        (
            b"caf\xc3\xa9 caf\xe9 \xe5\xad end" + b"." * 40,
            "caf\u00e9 caf\ufffd \ufffd end" + "." * 40,
            {"repaired": 1},
        ),
        (
            b"surrogate \xed\xa0\x80 overlong \xc0\xaf" + b"." * 99,
            "surrogate \ufffd\ufffd\ufffd overlong \ufffd\ufffd" + "." * 99,
            {"repaired": 1},
        ),
    ],
)
def test_invalid_text_is_repaired_and_counted(tmp_path, content, text, counts):
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "sound"}')
    report = ReadReport()
    if "repaired" in counts:
        with pytest.raises(
            ValueError, match=r"a\.txt: line 1: byte 0x.. at .* is not UTF-8; name its encoding"
        ):
            _texts(tmp_path)
    assert _texts(tmp_path, report=report, on_error="skip") == [text, "sound"]
    expected = ReadReport(files=2, documents=2, bytes=len(text.encode()) + 5, **counts)
    assert report.counts() == expected.counts()


def test_invalid_text_inside_json(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "half \\ud83d pair"}\n{"text": "whole \\ud83d\\ude00"}\n'
        b'{"text": "nul \\u0000, raw\ttab, bad \xff byte"}\n'
    )
    (tmp_path / "b.json").write_bytes(b'["bad \xff byte and then a long text behind it \\udc80"]')
    report = ReadReport()
    for name, place in (
        ("a.jsonl", "line 3: byte 0xff at 35"),
        ("b.json", "item 1: byte 0xff on line 1"),
    ):
        with pytest.raises(ValueError, match=f"{name}, {place} is not UTF-8; name its encoding"):
            _texts(tmp_path / name)
    assert _texts(tmp_path, report=report, on_error="skip") == [
        "half \ufffd pair",
        "whole \U0001f600",
        "nul , raw\ttab, bad \ufffd byte",
        "bad \ufffd byte and then a long text behind it \ufffd",
    ]
    assert (report.repaired, report.control_characters) == (3, 1)


def test_empty_documents_are_dropped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b" \n\t\0\r\n")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": ""}\n{"text": null}\n{"text": "x"}\n[]\n')
    report = ReadReport()
    assert _texts(tmp_path, report=report) == ["x"]
    assert report.empty == 5


LONG = _lines(["a", "b", random.Random(0).randbytes(100_000).hex()])


@pytest.mark.parametrize(
    "name, content, place, sound",
    [
        ("b.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}\n', "line 2", ["a", "b"]),
        ("b.jsonl", b'{"text": "a"}\n[1]\n3\n', "line 2", ["a"]),
        (
            "b.jsonl",
            b'{"body": "a"}\n{"text": "b"}\n',
            "no 'text' among body; name the right one",
            ["b"],
        ),
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
    ],
)
def test_damage_raises_or_is_dropped_and_counted(tmp_path, name, content, place, sound):
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


def test_an_error_that_is_kept_leaves_no_file_open(tmp_path, monkeypatch):
    opened = []

    def recorded(path):
        opened.append(real(path))
        return opened[-1]

    real = open_files.open_file
    monkeypatch.setattr(open_files, "open_file", recorded)
    for name in ("b.jsonl", "b.jsonl.gz", "b.json"):
        content = b'{"text": "a"}\n{"te'
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(ValueError) as error:
            _texts(tmp_path / name)
        assert error.traceback and opened.pop().closed


def test_long_items_of_a_list(tmp_path):
    items = ["x" * length + '"\\]' for length in (1, 70_000, 65_535, 65_536, 400_000, 3)]
    (tmp_path / "a.json").write_text(json.dumps(items))
    assert _texts(tmp_path) == items


def test_binary_files_are_distinguished_from_text(tmp_path):
    noise = random.Random(0).randbytes(5000)
    (tmp_path / "sound.txt").write_text("sound \0 text with one stray byte")
    binary = [
        ("a.txt", noise),
        ("b.jsonl", b"\x7fELF" + bytes(100)),
        ("c.json", noise),
        ("d.html", noise),
        ("e.txt", "text in UTF-16".encode("utf-16-le")),
        ("f.txt.gz", gzip.compress(noise)),
    ]
    for name, content in binary:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: binary data and not text"):
            _texts(tmp_path / name)
    report = ReadReport()
    assert _texts(tmp_path, on_error="skip", report=report) == ["sound  text with one stray byte"]
    assert report.damaged == len(binary)


def _long(name):
    """(content, where it is too long, what else is in it); the limit is 1000 bytes."""
    long = "x" * 1200
    kind = name.split(".")[1]
    if kind == "jsonl":
        return _lines(["a", long, "b"]), "line 2", ["a", "b"]
    if kind == "json":
        return json.dumps(["a", "b", long, "c"]).encode(), "item 3", ["a", "b", "c"]
    if kind == "parquet":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", long, "b"]}), sink)
        return sink.getvalue().to_pybytes(), "row 2", ["a", "b"]
    return long.encode(), name, []


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet", "a.txt", "a.html"]
)
def test_items_that_are_too_long_raise_or_are_skipped(tmp_path, name):
    content, place, sound = _long(name)
    pack = {"gz": gzip.compress, "zst": _zstd}.get(name.rsplit(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack(content))
    with pytest.raises(
        ValueError, match=rf"{place}: longer than max_document_bytes=1,000; split it"
    ):
        _texts(tmp_path, max_document_bytes=1000)
    report = ReadReport()
    assert _texts(tmp_path, max_document_bytes=1000, on_error="skip", report=report) == sound
    assert report.damaged == 1
    assert len(_texts(tmp_path)) == len(sound) + (name != "a.html")


def test_a_list_ends_at_an_item_too_long_to_find_its_end(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(["a", "x" * 300_000, "b"]))
    with pytest.raises(
        ValueError,
        match="item 2: longer than max_document_bytes=1,000.*What follows it .* not read",
    ):
        _texts(tmp_path, max_document_bytes=1000)
    assert _texts(tmp_path, max_document_bytes=1000, on_error="skip") == ["a"]
    (tmp_path / "a.json").write_text(json.dumps({"text": "x" * 1000}, indent=1))
    with pytest.raises(ValueError, match="item 1: longer than max_document_bytes=1,000"):
        _texts(tmp_path, max_document_bytes=1000)


def test_a_line_of_exactly_the_limit_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(_lines(["a", "b" * 100]))
    limit = len(_lines(["b" * 100]))
    assert len(_texts(tmp_path, max_document_bytes=limit)) == 2
    with pytest.raises(ValueError, match="line 2"):
        _texts(tmp_path, max_document_bytes=limit - 1)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, _zstd])
def test_a_huge_line_is_never_held_in_memory(tmp_path, pack):
    name = {bytes: "a.jsonl", gzip.compress: "a.jsonl.gz"}.get(pack, "a.jsonl.zst")
    (tmp_path / name).write_bytes(
        pack(b'{"text": "' + b"x" * (100 << 20) + b'"}\n' + _lines(["b"]))
    )
    tracemalloc.start()
    assert _texts(tmp_path, max_document_bytes=1 << 20, on_error="skip") == ["b"]
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()


@pytest.fixture
def mixed(tmp_path):
    """A folder with a file of most kinds, and its twin at memory://."""
    content = {
        "b.txt": STORY[1].encode(),
        "a/z.jsonl.gz": gzip.compress(_lines(STORY)),
        "a/c.md.zst": _zstd(b"c"),
        "a.html": b"<html><body><p>" + b"A page that says something. " * 20 + b"</p></body></html>",
        "ü/d.json": json.dumps(STORY).encode(),
        ".hidden/x.txt": b"no",
        "a/.x.txt": b"no",
        "pic.png": b"no",
    }
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": STORY}), sink)
    content["p.parquet"] = sink.getvalue().to_pybytes()
    memory = fsspec.filesystem("memory")
    for name, data in content.items():
        path = tmp_path / "mixed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        memory.pipe(f"/corpus{tmp_path}/{name}", data)
    return tmp_path / "mixed", f"memory://corpus{tmp_path}"


def test_urls_are_read_like_folders(mixed):
    reports = [ReadReport() for _ in range(3)]
    places = [*mixed, f"file://{mixed[0]}"]
    first, *others = [
        list(read_documents(place, report=report))
        for place, report in zip(places, reports, strict=True)
    ]
    assert len(first) == 12 and reports[0].skipped_files == 1
    assert others == [first, first] and reports[1:] == reports[:1] * 2
    assert _texts(f"{mixed[1]}/b.txt") == [STORY[1]]
    with pytest.raises(FileNotFoundError, match="memory://nowhere does not exist; give a file"):
        read_documents("memory://nowhere")
    with pytest.raises(ValueError, match=r"pic\.png has the suffix \.png, which is not read"):
        read_documents(f"{mixed[1]}/pic.png")


@pytest.mark.parametrize(
    "url, package", [("gs://bucket/a.txt", "gcsfs"), ("s3://bucket", "s3fs"), ("nope://x", "nope")]
)
def test_a_url_without_its_package_raises_an_error(url, package, monkeypatch):
    for name in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"{url} cannot be opened: .*{package}"):
        list_files(url)


def test_single_files_add_up_to_the_folder(mixed):
    for place in mixed:
        listed = pickle.loads(pickle.dumps(list_files(place)))
        assert [file.name for file in listed] == sorted(file.name for file in listed)
        assert all(file.size and file.stamp for file in listed)
        parts = [pickle.loads(pickle.dumps(list(read_file(file)))) for file in listed]
        assert list(itertools.chain(*parts)) == list(read_documents(place))
    hashes = [[file.stamp for file in list_files(place, hashed=True)] for place in mixed]
    assert hashes[0] == hashes[1]
    assert (
        hashes[0][-1]
        == "sha256:" + hashlib.sha256((mixed[0] / "ü/d.json").read_bytes()).hexdigest()
    )


def test_the_stamp_changes_with_the_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = list_files(path)
    hashed = list_files(path, hashed=True)
    path.write_text("two")
    os.utime(path, ns=(1, 1))
    assert list_files(path) != before and list_files(path, hashed=True) != hashed
    path.write_text("one")
    os.utime(path, ns=(1, 1))
    assert list_files(path) != before and list_files(path, hashed=True) == hashed


def test_an_empty_folder_has_no_files(tmp_path):
    assert list_files(tmp_path) == [] and _texts(tmp_path) == []


def test_unreadable_inputs_raise_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_documents(tmp_path / "nowhere")
    (tmp_path / "a.pdf").write_text("text")
    with pytest.raises(
        ValueError, match=r"a\.pdf has the suffix \.pdf, .* rename a text file to \.txt"
    ):
        read_documents(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="on_error='ignore'"):
        read_documents(tmp_path, on_error="ignore")
    with pytest.raises(ValueError, match="max_document_bytes=0 must be at least 1"):
        read_documents(tmp_path, max_document_bytes=0)


def test_parquet_without_the_column_raises_an_error(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": STORY}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match="a.parquet: no 'text' among body; name the right one with text_key"
    ):
        _texts(tmp_path)
    report = ReadReport()
    assert _texts(tmp_path, on_error="skip", report=report) == [] and report.damaged == 1


def test_builtin_corpus():
    documents = list(embedded_documents())
    text = "\n\n".join(document.text for document in documents)
    assert 800_000 < len(text.encode()) < 1_500_000
    paragraphs = [
        paragraph for document in documents for paragraph in document.text.strip().split("\n\n")
    ]
    assert len(paragraphs) == len(set(paragraphs))
    assert all("\n" not in paragraph and len(paragraph.split()) >= 5 for paragraph in paragraphs)
    assert ">>>" not in "".join(paragraph[:3] for paragraph in paragraphs) and "``" not in text
    for place in (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib")):
        assert place == "/usr" or place not in text
    assert [document.source for document in documents][:1] == ["topic:assert"]
    assert documents[-1].source.startswith("module:")


def test_data_does_not_need_jax():
    code = (
        "import sys, mtnlg_jax.data.prepare, mtnlg_jax.data.batches; "
        "sys.exit(any(name.split('.')[0] in ('jax', 'flax') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
