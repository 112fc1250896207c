"""Rows from the layouts in which people keep them, and one line for what is none."""

import json

import pytest

from mtnlg_jax.tasks.prompts import Row
from mtnlg_jax.tasks.rows import read_rows

SQUAD = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "The c.", "qas": [
    {"id": "1", "question": "Who?", "answers": [{"text": "A", "answer_start": 0}, {"text": "B", "answer_start": 1}]},
    {"id": "2", "question": "Why?", "answers": [{"text": "C", "answer_start": 0}]}]}]}]}


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(("name", "content", "options", "rows"), [
    ("a.jsonl", '{"input": "i\u2028j", "reference": "r"}\n\n{"input": "k", "reference": ["s", "t"]}\n', {},
     [Row("i\u2028j", ("r",)), Row("k", ("s", "t"))]),
    ("a.jsonl", '{"source": ["One.", "Two."], "target": ["s"]}',
     {"columns": {"input": "source", "reference": "target"}}, [Row("One. Two.", ("s",))]),
    ("a.tsv", 'it \'s "fine"\t1\r\nbad\t0\n', {"labels": {"0": "negative", "1": "positive"}},
     [Row('it \'s "fine"', ("positive",)), Row("bad", ("negative",))]),
    ("a.txt", "\ufeffHi.\t嗨。\textra\nRun.\t跑。\n", {"columns": {"input": "1", "reference": "0"}},
     [Row("嗨。", ("Hi.",)), Row("跑。", ("Run.",))]),
    ("a.tsv", "label\tsentence\n1\tgood\n", {"columns": {"input": "sentence", "reference": "label"}},
     [Row("good", ("1",))]),
    ("a.json", SQUAD, {}, [Row("Who?", ("A", "B"), "The c."), Row("Why?", ("C",), "The c.")]),
    ("a.json", [{"query": "q", "choices": ["x", "y"], "gold": 1}], {"columns": {"input": "query", "reference": "gold"}},
     [Row("q", ("y",), choices=("x", "y"))]),
    ("a.jsonl", '{"input": "a"}\n{"input": "b"}\n', {"limit": 1}, [Row("a")]),
    ("a.jsonl", '{"input": "a", "reference": 3}', {}, [Row("a", ("3",))]),
])
def test_layouts(tmp_path, name, content, options, rows):
    assert read_rows(write(tmp_path, name, content), **options) == rows


@pytest.mark.parametrize(("name", "content", "options", "message"), [
    ("a.jsonl", '{"input": "a", "reference": "b"}\n{"text": "c"}', {}, "row 2: no input under 'input', only text"),
    ("a.jsonl", '{"input": "a", "target": "b"}', {}, "row 1: no reference under 'reference', only input, target; name "
     "the right one, as in --columns=reference=KEY"),
    ("a.jsonl", '{"input": "a", "reference": ""}', {}, "row 1: no reference under"),
    ("a.jsonl", '{"input": "a"', {}, "row 1: not valid JSON"),
    ("a.jsonl", "[1]", {}, "row 1: a list, not an object with input and reference"),
    ("a.jsonl", '{"input": 3, "reference": "b"}', {}, "row 1: input is a int; give a text"),
    ("a.jsonl", '{"input": "a", "choices": "b", "reference": 0}', {}, "choices are a str"),
    ("a.jsonl", '{"input": "a", "choices": ["b"], "reference": 1}', {}, "reference 1, but the 1 choices are counted"),
    ("a.jsonl", "", {}, "holds no rows"),
    ("a.tsv", "alone\n", {}, "row 1: no reference under '1', only 0"),
    ("a.tsv", "x\ty\n", {"columns": {"input": "z", "reference": "y"}}, "input=z, but the first line names x, y"),
    ("a.tsv", "x\t2\n", {"labels": {"0": "a", "1": "b"}}, "reference '2' is none of the labels 0, 1"),
    ("a.csv", "x,y\n", {}, "unknown suffix; rows are read from .jsonl"),
    ("a.json", {"rows": []}, {}, "holds a dict; give a list"),
    ("a.json", {"data": [{}]}, {}, "not their layout below it"),
    ("a.jsonl", "{}", {"columns": {"inputs": "x"}}, "column 'inputs' is not known; name those of input, reference"),
])
def test_what_is_no_row(tmp_path, name, content, options, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        read_rows(path, needs=("input", "reference"), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_rows("nowhere.jsonl")
    (tmp_path / "a.tsv").write_bytes(b"a\xff\tb\n")
    with pytest.raises(ValueError, match="not UTF-8 at byte 1"):
        read_rows(tmp_path / "a.tsv")


@pytest.mark.parametrize(("path", "options", "count"), [
    ("sentiment/sst2/dev.tsv", {"labels": {"0": "negative", "1": "positive"}}, 872),
    ("summarization/scitldr_a/dev.jsonl", {"columns": {"input": "source", "reference": "target"}}, 619),
    ("translation/tatoeba_en_zh/cmn.txt", {}, 21116),
    ("qa/xquad/xquad.zh.json", {}, 1190),
])
def test_real_sets(shared, path, options, count):
    rows = read_rows(shared / "data" / "tasks" / path, needs=("input", "reference"), **options)
    assert len(rows) == count and all(row.input and row.references for row in rows)
