"""The page of the report: its numbers and escapes; it needs neither network nor scripts."""

import html.parser
import re

import pytest
from lines import LABELS, line

from mtnlg_jax.tasks.many.report import GENERATOR, HEIGHT, LEFT, SHOWN, WIDTH, chart_of, render
from mtnlg_jax.tasks.many.summary import summarize

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


class Page(html.parser.HTMLParser):
    """Collects the elements and the text of a page, and checks that elements are closed."""

    EMPTY = ("meta", "img", "br", "link")

    def __init__(self, page):
        super().__init__()
        self.elements = []
        self.words = []
        self.open = []
        self.feed(page)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def named(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def page_of(lines, *columns, title="sentiment: rows.jsonl"):
    return render(summarize(lambda: iter(lines), LABELS, *columns), title, [("step", 900)])


ROWS = [
    line(n, LABELS[n % 3 > 0], 0.6 + n / 100, LABELS[n % 2], date=f"2026-01-{n % 5 + 1:02}")
    for n in range(1, 31)
]


def test_the_numbers_of_the_page_are_those_of_the_summary():
    lines = [
        each | {"columns": each["columns"] | {"source": "ab"[each["row"] % 2]}} for each in ROWS
    ]
    page = Page(page_of([*lines, {"row": 31, "id": 9, "error": "too long"}]))
    assert "31 rows 33.3 % negative 10 rows" in page.text and "66.7 % positive 20 rows" in page.text
    assert "1 rows could not be answered" in page.text and "31 · 9 too long" in page.text
    summary = summarize(lambda: iter(lines), LABELS)
    assert f"Cohen's kappa is {summary.agreement.kappa:.3f}" in page.text
    assert "50.0 % of 30 labeled rows agree" in page.text and "step 900" in page.text
    widths = [
        float(re.search(r"width:([\d.]+)%", attrs["style"])[1])
        for attrs in page.named("span")
        if "width" in attrs.get("style", "")
    ]
    assert widths[:2] == pytest.approx([100 / 3, 200 / 3], abs=1e-3)
    assert len(widths) == 6 and sum(widths) == pytest.approx(300, abs=1e-2)


def test_kappa_of_one_label_alone_is_not_a_number():
    page = Page(page_of([line(n, reference="positive") for n in range(1, 4)]))
    assert "Cohen's kappa is undefined, since only one label occurs." in page.text


def test_the_chart_fills_its_space():
    summary = summarize(lambda: iter(ROWS), LABELS)
    chart = chart_of(summary)
    assert len(summary.times) == 5 and len(chart.bars) == 10 and len(chart.counts) == 5
    for bar in (*chart.bars, *chart.counts):
        assert LEFT <= bar.x and bar.x + bar.width <= WIDTH and 0 <= bar.y
        assert bar.y + bar.height <= HEIGHT
    for group, upper, lower in zip(summary.times, chart.bars[::2], chart.bars[1::2], strict=True):
        # The last label is at the bottom, and both fill the plot.
        assert upper.y == pytest.approx(lower.y + lower.height, abs=0.02)
        whole = upper.height + lower.height
        assert upper.height / whole == pytest.approx(group.counts[1] / group.rows, abs=1e-3)
    most = max(chart.counts, key=lambda bar: bar.height)
    assert most.title.endswith(f"{chart.most:,} rows")
    assert all(tick.x <= WIDTH for tick in chart.names)


def test_all_text_is_escaped():
    lines = [
        line(1, "positive", 0.9, "negative", source=EVIL, date="2026-01-01") | {"input": EVIL},
        line(2, "negative", 0.9, source="b", date="2026-01-02", language="zh")
        | {"input": "很无聊", "id": EVIL},
        {"row": 3, "id": EVIL, "error": EVIL},
    ]
    page = page_of(lines, None, "source", title=EVIL)
    read = Page(page)
    names = {tag for tag, _ in read.elements}
    assert not names & {"script", "img", "link", "iframe", "object", "base", "form"}
    assert not any(key.startswith("on") for _, attrs in read.elements for key in attrs)
    assert read.text.count("alert(1)") >= 6 and "很无聊" in read.text
    assert {"lang": "zh", "dir": "auto"} in read.named("q")


def test_the_page_needs_no_network():
    page = page_of(ROWS)
    assert GENERATOR in page[:2048] and "prefers-color-scheme: dark" in page
    read = Page(page)
    assert not re.search(r"https?:|//|url\(|@import", page)
    assert not any({"src", "href"} & set(attrs) for _, attrs in read.elements)
    assert ("meta", "default-src 'none'; style-src 'unsafe-inline'") in [
        (tag, attrs.get("content")) for tag, attrs in read.elements
    ]


def test_long_texts_are_clipped_and_empty_parts_left_out():
    page = Page(page_of([line(1) | {"input": "word " * 200}]))
    assert max(map(len, page.words)) < SHOWN + 200 and "word …" in page.text
    assert "Over time" not in page.text and "Agreement" not in page.text
    nothing = Page(page_of([{"row": 1, "error": "damaged"}]))
    assert "Telling rows" not in nothing.text and "damaged" in nothing.text
