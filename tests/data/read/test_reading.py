"""Check encodings, JSON, tables and WARC records: they are read, or reported as damage with a
location."""

import codecs
import gzip
import io
import json
import random
import zlib

import pytest
import zstandard
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from mtnlg_jax.data.read import charsets, json_rows, long_texts
from mtnlg_jax.data.read.documents import (
    ReadReport,
    list_files,
    note_lines,
    read_documents,
    read_file,
    read_stream,
)

GERMAN = "Der alte Müller ging über die Brücke, als der Regen anfing; er hörte die Glocken."
CHINESE = "天下大势，分久必合，合久必分。学而时习之，不亦说乎？有朋自远方来，不亦乐乎？"


def _texts(path, **options):
    return [document.text for document in read_documents(path, **options)]


def _write(path, content):
    path.write_bytes(content)
    return path


# --- encodings

ENCODED = [
    ("cp1252", "“I don’t think so,” said the old man. " + GERMAN),
    ("latin-1", GERMAN),
    ("cp1251", "Дождь начался. " * 5),
    ("gb18030", CHINESE),
    ("gbk", CHINESE),
    ("big5", "燈塔的守護人每天清點經過的船隻。"),
    ("shift_jis", "雨が降り始めた。" * 3),
    ("euc_kr", "비가 오기 시작했다. " * 3),
    ("koi8-r", "Дождь начался. " * 5),
]
FORMS = {
    "a.txt": lambda text: text,
    "a.jsonl": lambda text: json.dumps({"text": text}, ensure_ascii=False) + "\n",
    "a.json": lambda text: json.dumps([{"text": text}], ensure_ascii=False, indent=1),
    "a.csv": lambda text: f'id,text\n1,"{text}"\n',
    "a.tsv": lambda text: f"id\ttext\n1\t{text}\n",
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("encoding, text", ENCODED)
def test_text_in_another_encoding_is_damage_unless_named(tmp_path, encoding, text, name):
    data = FORMS[name](text).encode(encoding)
    _write(tmp_path / name, data)
    with pytest.raises(
        ValueError,
        match=rf"{name}.*(byte 0x..|on line) .*is not UTF-8; name its encoding, as in enc",
    ):
        _texts(tmp_path)
    report = ReadReport()
    assert _texts(tmp_path, encoding=encoding, report=report) == [text]
    assert report.repaired == 0 and list(report.notes)[0].startswith("files decoded from ")
    # Files in UTF-8 are not read in the named encoding.
    _write(tmp_path / name, FORMS[name](text).encode())
    assert _texts(tmp_path, encoding=encoding) == [text]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "mark, encoding",
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_a_byte_order_mark_decides_the_encoding(tmp_path, mark, encoding, name):
    _write(tmp_path / name, mark + FORMS[name](CHINESE + GERMAN).encode(encoding))
    assert _texts(tmp_path) == _texts(tmp_path, encoding="cp1252") == [CHINESE + GERMAN]


@pytest.mark.parametrize("name", FORMS)
def test_one_invalid_byte_is_replaced_and_counted(tmp_path, name):
    data = (
        FORMS[name](GERMAN.replace("ü", "ue") * 9).encode().replace(b"h\xc3\xb6rte", b"h\xf6rte", 1)
    )
    _write(tmp_path / name, data)
    with pytest.raises(ValueError, match=name):
        _texts(tmp_path)
    report = ReadReport()
    (found,) = _texts(tmp_path, on_error="skip", report=report)
    assert found.count("\ufffd") == report.repaired == 1 and found.count("hörte") == 8
    assert "1 documents with U+FFFD for what is not UTF-8: a" in note_lines(report.notes)[0]


def test_much_in_another_encoding_is_dropped_and_named(tmp_path):
    _write(tmp_path / "a.txt", CHINESE.encode("gb18030"))
    _write(tmp_path / "b.txt", b"sound")
    report = ReadReport()
    assert _texts(tmp_path, on_error="skip", report=report) == ["sound"]
    assert report.damaged == 1
    assert note_lines(report.notes) == [
        "1 damaged and dropped, much of it is not UTF-8; name the right encoding, "
        "as in encoding=cp1252: a.txt"
    ]


def test_bytes_outside_the_named_encoding_are_damage(tmp_path):
    _write(tmp_path / "a.txt", b"one\ntwo\xff\xffthree" + CHINESE.encode("gb18030") * 2)
    with pytest.raises(
        ValueError, match="a.txt: line 2: not gbk; name the right encoding instead of encoding=gbk"
    ):
        _texts(tmp_path, encoding="gbk")
    assert _texts(tmp_path, encoding="gbk", on_error="skip")[0].endswith("three" + CHINESE * 2)
    for wrong in ("base64", "nonsense", "unicode_escape"):
        with pytest.raises(
            ValueError, match=f"unknown value encoding='{wrong}'; name one such as cp1252"
        ):
            read_documents(tmp_path, encoding=wrong)


def test_utf_16_without_a_mark_must_be_named(tmp_path):
    _write(tmp_path / "a.txt", GERMAN.encode("utf-16-le"))
    with pytest.raises(ValueError, match="binary data and not text .*encoding=utf-16-le"):
        _texts(tmp_path)
    assert _texts(tmp_path, encoding="utf-16-le") == [GERMAN]


def test_pages_follow_the_same_rule(tmp_path):
    article = f"<article><p>{GERMAN}</p><p>{GERMAN}</p></article>"
    body = f"<html><head>{{}}</head><body>{article}</body></html>"
    data = body.format("").encode("cp1252")
    _write(tmp_path / "a.html", data)
    report = ReadReport()
    assert GERMAN in _texts(tmp_path, report=report)[0]  # as in browsers, and reported
    assert "declare no encoding" in note_lines(report.notes)[0]
    russian = body.format("").replace(
        GERMAN, "Дождь начался, и старый мельник услышал колокола города. " * 3
    )
    _write(tmp_path / "a.html", russian.encode("koi8-r"))
    assert "Дождь" in _texts(tmp_path, encoding="koi8-r")[0]
    _write(tmp_path / "a.html", body.format("<meta charset=utf-8>").encode("cp1252"))
    with pytest.raises(ValueError, match="a.html: byte 0xfc at .* is not UTF-8"):
        _texts(tmp_path)
    assert "M\ufffdller" in _texts(tmp_path, on_error="skip")[0]


def test_standard_input_follows_the_same_rule():
    with pytest.raises(ValueError, match="standard input: line 1: byte 0xfc at 10 is not UTF-8"):
        list(read_stream(io.BufferedReader(io.BytesIO(GERMAN.encode("cp1252")))))
    (found,) = read_stream(
        io.BufferedReader(io.BytesIO(GERMAN.encode("cp1252"))), encoding="cp1252"
    )
    assert found.text == GERMAN


def test_random_bytes_never_raise_other_errors(tmp_path):
    draw = random.Random(5)
    for number in range(300):
        name = draw.choice([*FORMS, "a.html", "a.warc", "a.parquet"])
        mark = draw.choice(
            [b"", b"\xff\xfe", b"\xef\xbb\xbf", b"[", b'{"text": ', b"text\n", b"id,text\n"]
        )
        _write(
            tmp_path / name,
            mark
            + draw.choice([draw.randbytes(200), bytes(draw.choices(b'[]{},:"\n\t a1\xc3', k=200))]),
        )
        (file,) = (file for file in list_files(tmp_path) if file.name == name)
        list(read_file(file, on_error="skip", encoding=draw.choice(["", "gb18030", "cp1252"])))
        (tmp_path / name).unlink()
        assert number < 300


# --- JSON

A, B, C, D = ({"text": text} for text in "abcd")


@pytest.mark.parametrize(
    "content",
    [
        f"{json.dumps([A, B])}\n{json.dumps([C, D])}\n",
        f"{json.dumps([A, B])}{json.dumps([C, D])}",
        "\n".join(json.dumps(each, indent=2) for each in (A, B, C, D)),
        f"{json.dumps(A)}{json.dumps(B)} {json.dumps(C)},\n{json.dumps(D)}",
        f"\x1e{json.dumps(A)}\n\x1e{json.dumps(B)}\n\x1e{json.dumps([C, D])}\n",
        json.dumps({"version": 1, "data": [A, B, C, D]}),
        json.dumps({"rows": [A, B, C, D], "total": 4}, indent=1),
        f"[]\n{json.dumps([A])}\n[ ]{json.dumps([B, C, D], indent=4)}\n\n",
        json.dumps([A, B, C, D]).replace(", ", " ,\n"),
    ],
)
def test_every_value_of_a_json_file_is_read(tmp_path, content):
    _write(tmp_path / "a.json", content.encode())
    assert _texts(tmp_path) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(json.dumps(each, indent=2) for each in (A, B)),
        json.dumps([A, B], indent=1),
        f"{json.dumps(A)}{json.dumps(B)}\n",
        f"\n{json.dumps(A)} , {json.dumps(B)}\n",
    ],
)
def test_malformed_json_lines_are_read(tmp_path, content):
    _write(tmp_path / "a.jsonl", content.encode())
    assert _texts(tmp_path) == ["a", "b"]


def test_nested_keys(tmp_path):
    squad = {
        "data": [
            {"paragraphs": [{"context": "a", "qas": [{"id": 1}]}, {"context": "b"}]},
            {"paragraphs": [{"context": "c"}]},
        ]
    }
    _write(tmp_path / "a.json", json.dumps(squad).encode())
    with pytest.raises(ValueError, match="item 1: no 'text' among data"):
        _texts(tmp_path)
    assert _texts(tmp_path, text_key="data.paragraphs.context") == ["a", "b", "c"]
    _write(tmp_path / "a.json", json.dumps({"a.b": "whole", "a": {"b": "inner"}}).encode())
    assert _texts(tmp_path, text_key="a.b") == ["whole"]


@pytest.mark.parametrize(
    "content, place, sound, damaged",
    [
        ('[{"text": "a"}, {"text": "b"}]\ntrailing garbage', "item 3: .* on line 2", "ab", 1),
        ('[{"text": "a"}, {"text": "b"}] oops', "item 3: .* on line 1", "ab", 1),
        (
            '{"text": "a"}\n{"text": oops}\n{"text": "c"}\n',
            "item 2: not valid JSON on line 2",
            "ac",
            0,  # one or two: whether the list that begins there ends can be said or not
        ),
        (
            '{"text": "a"}\n{"text": "b\n{"text": "c"}\n{"text": "d"}\n',
            "item 2: not valid JSON on line 2",
            "acd",
            1,
        ),
        (
            '{\n "text": "a"\n}\n{\n "text": \n}\n{\n "text": "c"\n}\n',
            "item 2: not valid JSON on line 4",
            "ac",
            1,
        ),
        (
            '[\n  {"text": "a"},\n  {"text": },\n  {"text": "c"}\n]\n[{"text": "d"}]',
            "item 2: .* on line 3",
            "acd",
            1,
        ),
        (
            '[{"text": "a"}, {"text": }, {"text": "c"}]\n[{"text": "d"}]',
            "item 2: .*follows it on its line",
            "ad",
            1,
        ),
        ('[{"text": "a"}, {"text": "b"}', "item 3: the list is cut short", "ab", 1),
        ('[{"text": "a"}, {"text": "b', "item 2: cut short or damaged on line 1", "a", 1),
        (
            '{"text": "a"}\n' + "[" * 100_000 + '\n{"text": "c"}',
            "item 2: not valid JSON on line 2",
            "ac",
            0,  # one or two: whether the list that begins there ends can be said or not
        ),
        ('{"text": "a"}\n17\n"b"\n', "item 2: 'text' holds int, not text", "ab", 1),
    ],
)
def test_damaged_json_has_a_location_and_loses_only_itself(
    tmp_path, content, place, sound, damaged
):
    _write(tmp_path / "a.json", content.encode())
    with pytest.raises(ValueError, match=rf"a\.json, {place}"):
        _texts(tmp_path)
    report = ReadReport()
    assert _texts(tmp_path, on_error="skip", report=report) == list(sound)
    assert report.damaged == damaged or not damaged and report.damaged in (1, 2)


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_json_does_not_depend_on_block_boundaries(tmp_path, monkeypatch, size):
    monkeypatch.setattr(json_rows, "_READ", size)
    values = [
        {"text": "x" * 50 + 'ü€😀\n"\\'},
        12345678901234567890,
        -1.5e10,
        None,
        True,
        "s",
        [1, [2]],
        {"a": {}},
    ]
    content = "\n".join(
        [
            json.dumps(values[:3], ensure_ascii=False),
            *map(json.dumps, values[3:6]),
            json.dumps(values[6:], indent=3),
            "12",
            "34",
        ]
    )
    stream = io.BufferedReader(io.BytesIO(content.encode()))
    found = list(json_rows.json_values(stream, 1 << 20))
    assert [row.value for row in found] == [*values, 12, 34]
    assert [row.number for row in found] == list(range(1, 11))


def test_a_truncated_compressed_list_gives_its_first_items(tmp_path):
    items = [{"text": f"{number} {random.Random(number).random()}"} for number in range(5000)]
    _write(tmp_path / "a.json.gz", gzip.compress(json.dumps(items).encode())[:-2000])
    report = ReadReport()
    found = _texts(tmp_path, on_error="skip", report=report)
    assert (
        len(found) > 3000
        and found == [item["text"] for item in items[: len(found)]]
        and report.damaged >= 1
    )


def test_damage_of_one_kind_is_one_line_of_the_report(tmp_path):
    _write(
        tmp_path / "a.jsonl",
        b"".join(b'{"text": %d, "n%d": }\n{"n%d": 1}\n' % (n, n, n) for n in range(3000)),
    )
    report = ReadReport()
    assert _texts(tmp_path, on_error="skip", report=report) == []
    assert note_lines(report.notes) == [
        "3,000 damaged and dropped, no 'text': "
        "a.jsonl:2, a.jsonl:4, a.jsonl:6, a.jsonl:8, a.jsonl:10 and 2,995 more",
        "3,000 damaged and dropped, not valid JSON: "
        "a.jsonl:1, a.jsonl:3, a.jsonl:5, a.jsonl:7, a.jsonl:9 and 2,995 more",
    ]


# --- tables


def test_tables(tmp_path):
    long = "word " * 60_000  # more than the default limit of Python's csv
    _write(
        tmp_path / "a.csv",
        f'id,text\r\n1,"He said ""no"",\nand left."\r\n\r\n2,plain\r\n3,{long}\r\n'.encode(),
    )
    found = list(read_documents(tmp_path))
    assert [document.text for document in found] == ['He said "no",\nand left.', "plain", long]
    assert [document.source for document in found] == ["a.csv:2", "a.csv:5", "a.csv:6"]
    _write(tmp_path / "a.csv", b"\xef\xbb\xbftext;n\nfirst, second;1\n")
    assert _texts(tmp_path) == ["first, second"]
    _write(tmp_path / "a.csv", b"text\nonly, one\nb\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 2: 2 cells, and the first line names 1"):
        _texts(tmp_path)
    (tmp_path / "a.csv").unlink()
    _write(
        tmp_path / "b.tsv",
        b'n\ttext\n1\t"Rings true, he said.\n2\t"a ""b"""\n3\t"two\nlines"\n'
        b'4\t"quoted"\n5\t"a\tb"\n',
    )
    assert _texts(tmp_path) == ['"Rings true, he said.', 'a "b"', "two\nlines", '"quoted"', "a\tb"]
    _write(tmp_path / "b.tsv", b'"n"\t"text"\n"1"\t"all ""are"" quoted"\n"2"\t"every one"\n')
    assert _texts(tmp_path) == ['all "are" quoted', "every one"]


@pytest.mark.parametrize(
    "content, place, sound",
    [
        ("id,text\n1,a\n2,b,c\n3,d\n", "line 3: 3 cells", "ad"),
        ("id,text\n1,a\n2\n3,d\n", "line 3: no 'text' among id", "ad"),
        ('id,text\n1,a\n2,"b" c\n3,d\n', "line 3: not a row of a table", "ad"),
        ('id,text\n1,a\n2,"b\n3,d\n', "line 3: not a row of a table .*to line 4", "a"),
        ("id,body\n1,a\n", "line 2: no 'text' among id, body; name the right one", ""),
    ],
)
def test_damaged_tables(tmp_path, content, place, sound):
    _write(tmp_path / "a.csv", content.encode())
    with pytest.raises(ValueError, match=rf"a\.csv, {place}"):
        _texts(tmp_path)
    report = ReadReport()
    assert _texts(tmp_path, on_error="skip", report=report) == list(sound) and report.damaged == 1


def test_a_line_that_is_too_long_after_an_open_quote_is_counted(tmp_path):
    """The search for the closing quote reads ahead, and must not lose the damage that it finds."""
    long = "word " * 300
    _write(tmp_path / "a.tsv", f'id\ttext\n1\t"open\n{long}\n3\tc\n'.encode())
    with pytest.raises(ValueError, match=r"a\.tsv, line 3: longer than max_document_bytes=1,000"):
        _texts(tmp_path, max_document_bytes=1000)
    report = ReadReport()
    found = _texts(tmp_path, max_document_bytes=1000, on_error="skip", report=report)
    assert (found, report.damaged) == (['"open', "c"], 1)


# --- WARC

PAGE = (
    "<!doctype html><html><body><article><p>"
    + "The lighthouse keeper counted the ships that passed before noon. " * 4
    + "</p></article></body></html>"
).encode()
RAW = zlib.compressobj(9, zlib.DEFLATED, -15)


def _warc(tmp_path, *records):
    stream = io.BytesIO()
    writer = WARCWriter(stream, gzip=False)
    for content, headers, status in records:
        http = StatusAndHeaders(status, headers, protocol="HTTP/1.1")
        made = writer.create_warc_record(
            "http://e.org/", "response", payload=io.BytesIO(content), http_headers=http
        )
        writer.write_record(made)
        made.raw_stream.close()  # warcio leaves its temporary file open
    return _write(tmp_path / "a.warc", stream.getvalue())


def _chunked(data):
    return (
        b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:99], data[99:]))
        + b"0\r\n\r\n"
    )


@pytest.mark.parametrize(
    "coding, data",
    [
        ("zstd", zstandard.ZstdCompressor().compress(PAGE)),
        ("gzip, gzip", gzip.compress(gzip.compress(PAGE))),
        ("gzip", gzip.compress(PAGE[:50]) + gzip.compress(PAGE[50:])),
        ("x-gzip", gzip.compress(PAGE)),
        ("deflate", zlib.compress(PAGE)),
        ("deflate", RAW.compress(PAGE) + RAW.flush()),
        ("deflate, zstd", zstandard.ZstdCompressor().compress(zlib.compress(PAGE))),
        ("gzip", PAGE),
        ("br", PAGE),
        ("identity", PAGE),
        ("ZSTD", zstandard.ZstdCompressor(write_content_size=False).compress(PAGE)),
    ],
)
@pytest.mark.parametrize("chunks", [False, True])
def test_pages_in_every_coding(tmp_path, coding, data, chunks):
    headers = [("Content-Type", "text/html"), ("Content-Encoding", coding)]
    headers += [("Transfer-Encoding", "chunked")] if chunks else []
    if coding == "br":
        pytest.importorskip("brotli")
    _warc(
        tmp_path,
        (_chunked(data) if chunks else data, headers, "200 OK"),
        (PAGE, [("Content-Type", "text/html")], "200 OK"),
    )
    first, second = _texts(tmp_path)
    assert first == second and first.startswith("The lighthouse keeper")


@pytest.mark.parametrize(
    "coding, data, words",
    [
        ("compress", b"\x1f\x9d" + bytes(50), "'compress' is unknown"),
        ("zstd", zstandard.ZstdCompressor().compress(PAGE)[:-20], "'zstd' cannot be undone"),
        ("gzip", gzip.compress(PAGE)[:-20], "'gzip' cannot be undone"),
        ("gzip", bytes(range(200)), "'gzip' cannot be undone"),
    ],
)
def test_data_that_cannot_be_decompressed_is_damage(tmp_path, coding, data, words):
    headers = [("Content-Type", "text/html"), ("Content-Encoding", coding)]
    _warc(tmp_path, (data, headers, "200 OK"), (PAGE, [("Content-Type", "text/html")], "200 OK"))
    with pytest.raises(ValueError, match=f"record 1: its Content-Encoding {words}"):
        _texts(tmp_path)
    report = ReadReport()
    assert len(_texts(tmp_path, on_error="skip", report=report)) == report.damaged == 1


def test_decompression_bombs_are_too_long(tmp_path):
    for coding, data in (
        ("gzip", gzip.compress(bytes(20 << 20))),
        ("zstd", zstandard.ZstdCompressor().compress(bytes(20 << 20))),
    ):
        _warc(
            tmp_path,
            (data, [("Content-Type", "text/html"), ("Content-Encoding", coding)], "200 OK"),
        )
        with pytest.raises(ValueError, match="longer than max_document_bytes=100,000"):
            _texts(tmp_path, max_document_bytes=100_000)


def test_records_are_counted_by_reason(tmp_path):
    html = [("Content-Type", "text/html")]
    _warc(
        tmp_path,
        (PAGE, [], "200 OK"),
        (b"  <!-- c --> " + PAGE, [], "200 OK"),
        (PAGE, html, "301 Moved"),
        (b"just text", [], "200 OK"),
        (b"{}", [("Content-Type", "application/json")], "200 OK"),
        (b"\x89PNG" + bytes(99), html, "200 OK"),
    )
    report = ReadReport()
    assert len(_texts(tmp_path, report=report)) == 2
    assert report.skipped_records == 4
    assert note_lines(report.notes) == [
        "3 records of WARC that are not HTML: a.warc:4, a.warc:5, a.warc:6",
        "1 records of WARC whose HTTP status is not 200: a.warc:3",
    ]


# --- long texts in pieces


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", "\f\n"])
@pytest.mark.parametrize("name, pack", [("a.txt", bytes), ("a.txt.gz", gzip.compress)])
def test_pieces_of_a_text_join_to_the_text(tmp_path, monkeypatch, name, pack, ending):
    monkeypatch.setattr(long_texts, "PIECE", 1000)
    text = ("one\r\ntwo\x0bthree\x1f " + GERMAN + CHINESE + ending + "\n") * 40 + "😀" * 900
    _write(tmp_path / name, pack(codecs.BOM_UTF8 + text.encode()))
    whole = ReadReport()
    pieces = ReadReport()
    (expected,) = _texts(tmp_path, report=whole)
    found = list(read_documents(tmp_path, report=pieces, pieces=True))
    assert (
        len(found) > 5
        and "".join(document.text for document in found) == expected
        and whole == pieces
    )
    assert [document.continued for document in found] == [True] * (len(found) - 1) + [False]


def test_damage_in_a_piece_is_damage_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(long_texts, "PIECE", 100)
    for data in (
        b"x y\n" * 100 + b"\xff" + b"x y\n" * 100,
        b"x y\n" * 100 + bytes(99),
        b" \n" * 300,
        CHINESE.encode("gb18030") * 9,
        b"a\n" * 90 + b"it\xc2\x85s\n" * 90,
        b"x" * 500,
    ):
        _write(tmp_path / "a.txt", data)
        for on_error in ("raise", "skip"):
            outcomes = []
            for pieces in (False, True):
                report = ReadReport()
                try:
                    text = "".join(
                        d.text
                        for d in read_documents(
                            tmp_path, pieces=pieces, on_error=on_error, report=report
                        )
                    )
                except ValueError as error:
                    text = str(error)
                outcomes.append((text.replace("401", "?"), report))
            assert outcomes[0][0].split(" at ")[0] == outcomes[1][0].split(" at ")[0]
            assert on_error == "raise" or outcomes[0] == outcomes[1]


def test_encoding_rules_agree_with_the_documentation():
    assert charsets.known("GBK") == "gb18030" and charsets.known("latin-1") == "cp1252"
    assert (
        charsets.known("Shift_JIS") == "cp932"
        and charsets.known("rot13") is None
        and charsets.known("") is None
    )
