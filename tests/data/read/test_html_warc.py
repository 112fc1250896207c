import gzip
import io
import random

import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from mtnlg_jax.data.read.documents import ReadReport, read_documents
from mtnlg_jax.data.read.html_warc import decode_page, main_text

ENGLISH = [
    "The lighthouse keeper counted the ships that passed before noon, "
    "and wrote each name into a ledger.",
    "On the ninth day the fog came in, "
    "and for a week there was nothing to write down but the weather.",
]
CHINESE = [
    "灯塔的守护人每天中午以前清点经过的船只，并把每一个船名都写进一本厚厚的账簿里，从来没有遗漏过。",
    "到了第九天，大雾笼罩了整个海面，整整一个星期除了天气以外，再也没有什么值得他记录下来的事情。",
]
MENU = (
    "<nav><ul><li><a href='/'>Startpage</a></li><li><a href='/x'>Imprint</a></li></ul></nav>"
    "<script>var a=1</script>"
)


def page_text(data, charset=None):
    """Return the main text of a page; None for binary data."""
    text = decode_page(data, charset).text
    return None if text is None else main_text(text)


def page(paragraphs, head=""):
    body = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)
    head = f"<head><title>T</title>{head}</head>"
    return f"<html>{head}<body>{MENU}<article>{body}</article></body></html>"


def record(
    writer,
    content,
    kind="response",
    content_type="text/html",
    status="200 OK",
    headers=(),
    **options,
):
    http = None
    if kind == "response":
        http = StatusAndHeaders(
            status, [("Content-Type", content_type), *headers], protocol="HTTP/1.1"
        )
    else:
        options["warc_content_type"] = content_type
    made = writer.create_warc_record(
        "http://example.org/", kind, payload=io.BytesIO(content), http_headers=http, **options
    )
    writer.write_record(made)
    made.raw_stream.close()  # warcio leaves its temporary file open


def warc(*records, packed=False):
    stream = io.BytesIO()
    writer = WARCWriter(stream, gzip=packed)
    for content, options in records:
        record(writer, content, **options)
    return stream.getvalue()


HTML = page(ENGLISH).encode()
CRAWL = [
    (b"software: x\r\n", {"kind": "warcinfo", "content_type": "application/warc-fields"}),
    (HTML, {}),
    (b"\x89PNG" + bytes(100), {"content_type": "image/png"}),
    (b"\x89PNG" + bytes(100), {}),
    (HTML, {"status": "404 Not Found"}),
    (page(CHINESE).encode("gb18030"), {"content_type": "text/html; charset=GBK"}),
    (gzip.compress(HTML), {"headers": [("Content-Encoding", "gzip")]}),
    (page([]).encode(), {}),
    (HTML, {"kind": "resource"}),
]


@pytest.mark.parametrize(
    "head, encoding",
    [
        ("", "utf-8"),
        ("", "utf-8-sig"),
        ("", "utf-16"),
        ("", "gb18030"),
        ('<meta charset="gb2312">', "gb18030"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=big5">', "big5"),
        ('<meta charset="no-such-thing">', "utf-8"),
    ],
)
def test_the_declared_charset_is_used(head, encoding):
    paragraphs = (
        CHINESE
        if encoding != "big5"
        else ["燈塔的守護人每天清點經過的船隻，並把船名都寫進帳簿。"] * 2
    )
    text = page_text(page(paragraphs, head).encode(encoding))
    assert paragraphs[0] in text and "Startpage" not in text and "var a" not in text


def test_the_header_has_precedence_and_charset_names_follow_browsers():
    data = page(CHINESE, '<meta charset="gbk">').encode()
    assert CHINESE[0] in page_text(data, "UTF-8")
    assert CHINESE[0] in page_text(data)  # cannot be GBK, and is valid UTF-8
    other = page(
        ["Der Müller ging über die Brücke, als der Regen anfing, und hörte die Glocken."] * 2,
        '<meta charset="koi8-r">',
    ).encode("cp1252")
    assert "Müller" in page_text(other, "cp1252") and "Müller" not in page_text(other)
    assert "“quoted”" in page_text(
        page(["“quoted” " + ENGLISH[0], ENGLISH[1]]).encode("cp1252"), "iso-8859-1"
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"<html></html>",
        b"<p",
        b"\xff\xfe",
        b"<?xml version='1.0'?>",
        page([]).encode(),
        b"<div>" * 20_000,
    ],
)
def test_a_page_without_text_is_empty(data):
    assert page_text(data) == ""


def test_an_xhtml_declaration_is_ignored():
    assert ENGLISH[1] in page_text(b'<?xml version="1.0" encoding="utf-8"?>\n' + HTML)


def test_html_files(tmp_path):
    (tmp_path / "a.html").write_bytes(HTML)
    (tmp_path / "b.htm.gz").write_bytes(gzip.compress(page(CHINESE).encode()))
    (tmp_path / "c.html").write_bytes(page([]).encode())
    report = ReadReport()
    documents = list(read_documents(tmp_path, report=report))
    assert [document.text.split("\n") for document in documents] == [ENGLISH, CHINESE]
    assert [document.source for document in documents] == [
        "a.html",
        "b.htm.gz",
    ] and report.empty == 1


@pytest.mark.parametrize(
    "name, packed", [("a.warc", False), ("a.warc.gz", True), ("A.WARC.GZ", "whole")]
)
def test_warc(tmp_path, name, packed):
    content = warc(*CRAWL, packed=packed is True)
    (tmp_path / name).write_bytes(gzip.compress(content) if packed == "whole" else content)
    report = ReadReport()
    documents = list(read_documents(tmp_path, report=report))
    assert [document.text.split("\n") for document in documents] == [
        ENGLISH,
        CHINESE,
        ENGLISH,
        ENGLISH,
    ]
    assert [document.source for document in documents] == [
        f"{name}:{number}" for number in (2, 6, 7, 9)
    ]
    assert (report.documents, report.skipped_records, report.empty, report.damaged) == (4, 4, 1, 0)


@pytest.mark.parametrize("name", ["a.wet", "a.warc.wet.gz"])
def test_wet(tmp_path, name):
    text = {"kind": "conversion", "content_type": "text/plain"}
    content = warc(
        CRAWL[0],
        ("\n".join(CHINESE).encode(), text),
        (b"bad \xff byte in a long line of text", text),
        packed=name.endswith("gz"),
    )
    (tmp_path / name).write_bytes(content)
    report = ReadReport()
    with pytest.raises(
        ValueError, match="record 3: byte 0xff at 4 is not UTF-8; name its encoding"
    ):
        list(read_documents(tmp_path))
    assert [
        document.text for document in read_documents(tmp_path, on_error="skip", report=report)
    ] == ["\n".join(CHINESE), "bad \ufffd byte in a long line of text"]
    assert (report.skipped_records, report.repaired) == (1, 1)


def test_random_bytes_as_html():
    draw = random.Random(0)
    for length in (1, 10, 1000):
        for _ in range(20):
            page_text(draw.randbytes(length))
            page_text(b"<html><body><p>" + bytes(draw.choices(range(32, 256), k=length)))


@pytest.mark.parametrize("cut", [100, 3])
def test_a_compressed_crawl_cut_short(tmp_path, cut):
    (tmp_path / "a.warc.gz").write_bytes(warc(*CRAWL[:3], packed=True)[:-cut])
    with pytest.raises(ValueError, match="record [23]: the compressed file is cut short"):
        list(read_documents(tmp_path))
    report = ReadReport()
    assert (
        len(list(read_documents(tmp_path, on_error="skip", report=report))) == 1
        and report.damaged == 1
    )


@pytest.mark.parametrize(
    "content, place, sound",
    [
        (warc(CRAWL[1], CRAWL[1], CRAWL[1])[:-40], "record 3: the file is cut short inside", 2),
        (b"GIF89a" + bytes(200), "record 1: not a WARC file", 0),
        (warc(CRAWL[1]) + b"\r\nnonsense here\r\n\r\n", "record 2: not a WARC record", 1),
        (
            warc((page(ENGLISH * 200).encode(), {}), CRAWL[1]),
            "record 1: longer than max_document_bytes=9,000",
            1,
        ),
    ],
)
def test_damaged_warc(tmp_path, content, place, sound):
    (tmp_path / "a.warc").write_bytes(content)
    with pytest.raises(ValueError, match=place):
        list(read_documents(tmp_path, max_document_bytes=9_000))
    report = ReadReport()
    documents = list(
        read_documents(tmp_path, on_error="skip", report=report, max_document_bytes=9_000)
    )
    assert (len(documents), report.damaged) == (sound, 1)


def written(body):
    paragraphs = [ENGLISH[0], f"Before: {body} :after.", ENGLISH[1]]
    return page_text(page(paragraphs).encode()).split("Before: ")[1].split(" :after")[0]


TEX = r'<annotation encoding="application/x-tex">{\displaystyle a^{2}}</annotation>'


@pytest.mark.parametrize(
    "body, text",
    [
        ("10<sup>6</sup> cells of 2<sup>10</sup> bits", "10⁶ cells of 2¹⁰ bits"),
        ("5×10<sup>−3</sup> H<sub>2</sub>O Fe<sup>3+</sup>", "5×10⁻³ H₂O Fe³⁺"),
        (
            "x<sup>n+1</sup>, e<sup>-x/2</sup>, x<sub>i</sub>, a<sub>ij</sub>",
            "xⁿ⁺¹, e^{-x/2}, x_i, a_{ij}",
        ),
        ("2<sup>2<sup>3</sup></sup>", "2^{2³}"),
        ("the 1<sup>st</sup> Brand<sup>TM</sup>", "the 1st BrandTM"),
        ("said<sup><a href='#n3'>[3]</a></sup> so<sup><a href='#n4'>4</a></sup>", "said[3] so[4]"),
        ("<math><mi>E</mi><mo>=</mo><mi>m</mi><msup><mi>c</mi><mn>2</mn></msup></math>", "E=mc²"),
        (
            "<math><mfrac><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow><mn>2</mn></mfrac></math>",
            "(a+b)/2",
        ),
        ("<math><msqrt><mn>2</mn></msqrt><msub><mi>x</mi><mi>i</mi></msub></math>", "√2x_i"),
        ("<math alttext='x_1'><mi>q</mi></math>", r"\(x_1\)"),
        (f"<math display='block'><semantics><mi>a</mi>{TEX}</semantics></math>", r"\[a^{2}\]"),
        (
            "<span class='mwe-math-element'><span style='display: none;'>"
            f"<math><semantics><mi>a</mi>{TEX}</semantics></math></span>"
            "<img class='mwe-math-fallback-image-inline' alt='a' src='a'></span>",
            r"\(a^{2}\)",
        ),
        (
            f"<span class='katex'><math><semantics><mi>a</mi>{TEX}</semantics></math>"
            "<span>a2</span></span>",
            r"\(a^{2}\)",
        ),
        ("<span class='MathJax_Preview'>c3</span><script type='math/tex'>c^3</script>", r"\(c^3\)"),
        (r"<img class='latex' alt='\frac{1}{2}' src='x.png'>", r"\(\frac{1}{2}\)"),
        ("<ruby>漢<rp>(</rp><rt>かん</rt><rp>)</rp></ruby>", "漢(かん)"),
        ("write &amp;lt;b&amp;gt; and &lt;b&gt; &amp; R&amp;D", "write &lt;b&gt; and <b> & R&D"),
        ("one<br>two", "one\ntwo"),
    ],
)
def test_markup_becomes_text(body, text):
    assert written(body) == text


def test_code_keeps_its_lines():
    code = "def f(x):\n    if x < 3 && y:\n\n        return '&amp;'\n\treturn 10"
    escaped = code.replace("&", "&amp;").replace("<", "&lt;")
    body = page(ENGLISH).replace("</p><p>", f"</p><pre><code>{escaped}\n</code></pre><p>")
    assert code in page_text(body.encode())
    colored = body.replace("def ", "<span class='k'>def</span> ").replace("if ", "<b>if</b> ")
    assert code in page_text(colored.encode())


def test_cells_and_items_are_separated():
    body = (
        "</p><table><tr><td>Ann</td><td>Oslo</td></tr></table><ul><li>one</li><li>two</li></ul><p>"
    )
    text = page_text(page([ENGLISH[0], body + ENGLISH[1]]).encode())
    assert "Ann | Oslo" in text and "one\n" in text and "two\n" in text
