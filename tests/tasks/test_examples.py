"""Read rows in the layouts of public data sets; invalid rows raise an error of one line."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from mtnlg_jax.tasks.examples import read_rows
from mtnlg_jax.tasks.prompts import Row

SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "The c.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "Who?",
                            "answers": [
                                {"text": "A", "answer_start": 0},
                                {"text": "B", "answer_start": 1},
                            ],
                        },
                        {
                            "id": "2",
                            "question": "Why?",
                            "answers": [{"text": "C", "answer_start": 0}],
                        },
                    ],
                }
            ],
        }
    ],
}


def write(folder, name, content):
    (folder / name).write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )
    return folder / name


@pytest.mark.parametrize(
    ("name", "content", "options", "rows"),
    [
        (
            "a.jsonl",
            '{"input": "i\u2028j", "reference": "r"}\n\n{"input": "k", "reference": ["s", "t"]}\n',
            {},
            [Row("i\u2028j", ("r",)), Row("k", ("s", "t"))],
        ),
        (
            "a.jsonl",
            '{"source": ["One.", "Two."], "target": ["s"]}',
            {"columns": {"input": "source", "reference": "target"}},
            [Row("One. Two.", ("s",))],
        ),
        (
            "a.tsv",
            'it \'s "fine"\t1\r\nbad\t0\n',
            {"labels": {"0": "negative", "1": "positive"}},
            [Row('it \'s "fine"', ("positive",)), Row("bad", ("negative",))],
        ),
        (
            "a.txt",
            "\ufeffHi.\t嗨。\textra\nRun.\t跑。\n",
            {"columns": {"input": "1", "reference": "0"}},
            [Row("嗨。", ("Hi.",)), Row("跑。", ("Run.",))],
        ),
        (
            "a.tsv",
            "label\tsentence\n1\tgood\n",
            {"columns": {"input": "sentence", "reference": "label"}},
            [Row("good", ("1",))],
        ),
        ("a.json", SQUAD, {}, [Row("Who?", ("A", "B"), "The c."), Row("Why?", ("C",), "The c.")]),
        (
            "a.json",
            [{"query": "q", "choices": ["x", "y"], "gold": 1}],
            {"columns": {"input": "query", "reference": "gold"}},
            [Row("q", ("y",), choices=("x", "y"))],
        ),
        ("a.jsonl", '{"input": "a", "reference": 3}', {}, [Row("a", ("3",))]),
    ],
)
def test_rows_of_each_layout(tmp_path, name, content, options, rows):
    assert read_rows(write(tmp_path, name, content), **options) == rows


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "a.jsonl",
            '{"input": "a", "reference": "b"}\n{"text": "c"}',
            {},
            "row 2: no input under 'input', only text",
        ),
        (
            "a.jsonl",
            '{"input": "a", "reference": "b", "choices": ["b"]}',
            {"columns": {"choices": "choices.text"}},
            "no row has a choices under 'choices.text', the first one only input, reference, "
            "choices; name the right one, as",
        ),
        (
            "a.jsonl",
            '{"input": "a", "reference": "b"}',
            {"columns": {"context": "passage"}},
            "no row has a context under",
        ),
        (
            "a.jsonl",
            '{"input": "a", "target": "b"}',
            {},
            "row 1: no reference under 'reference', only input, target; name "
            "the right one, as in --columns=reference=KEY",
        ),
        ("a.jsonl", '{"input": "a", "reference": ""}', {}, "row 1: no reference under"),
        ("a.jsonl", '{"input": "a"', {}, "row 1: not valid JSON"),
        ("a.jsonl", "[1]", {}, "row 1: a list, not an object with input and reference"),
        ("a.jsonl", '{"input": 3, "reference": "b"}', {}, "row 1: input is a int; give a text"),
        ("a.jsonl", '{"input": "a", "choices": "b", "reference": 0}', {}, "choices are a str"),
        (
            "a.jsonl",
            '{"input": "a", "choices": ["b", "c"], "reference": 3}',
            {},
            "row 1: reference 3 is none of the 2 "
            "choices, nor the letter or number of one; copy it exactly",
        ),
        ("a.jsonl", "", {}, "holds no rows"),
        ("a.tsv", "alone\n", {}, "row 1: no reference under '1', only 0"),
        (
            "a.tsv",
            "x\ty\n",
            {"columns": {"input": "z", "reference": "y"}},
            "input=z, but the first line names x, y",
        ),
        (
            "a.tsv",
            "x\t2\n",
            {"labels": {"0": "a", "1": "b"}},
            "reference '2' is none of the labels 0, 1",
        ),
        ("a.xls", "x,y\n", {}, "unknown suffix; rows are read from .jsonl"),
        ("a.json", {"rows": []}, {}, "holds a dict; give a list"),
        ("a.json", {"data": [{}]}, {}, "not their layout below it"),
        (
            "a.jsonl",
            "{}",
            {"columns": {"inputs": "x"}},
            "unknown column 'inputs'; name some of input, reference",
        ),
    ],
)
def test_invalid_rows_raise_an_error(tmp_path, name, content, options, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        read_rows(path, needs=("input", "reference"), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unreadable_files_raise_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_rows("nowhere.jsonl")
    (tmp_path / "a.tsv").write_bytes(b"a\xff\tb\n")
    with pytest.raises(ValueError, match="not UTF-8 at byte 1"):
        read_rows(tmp_path / "a.tsv")


CHOICES = ["x", "y", "z", "w"]


def one(folder, item, **options):
    """Return the single row of a file that holds ``item``."""
    return read_rows(
        write(folder, "a.jsonl", json.dumps(item)), needs=("input", "reference"), **options
    )[0]


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("3", "w"),
        (3, "w"),
        (0, "x"),
        ("0", "x"),
        ("B", "y"),
        ("b", "y"),
        ("(B)", "y"),
        ("C.", "z"),
        ("D)", "w"),
        ("z", "z"),
        (4, "w"),
        ("4", "w"),
        ([0, 0, 1, 0], "z"),
        (2.0, "z"),
        (" y ", "y"),
    ],
)
def test_a_reference_is_the_text_letter_or_number_of_a_choice(tmp_path, reference, expected):
    row = one(tmp_path, {"input": "q", "choices": CHOICES, "reference": reference})
    assert row == Row("q", (expected,), choices=tuple(CHOICES))


@pytest.mark.parametrize(
    ("item", "reference"),
    [
        ({"text": CHOICES, "label": ["A", "B", "C", "D"]}, "C"),
        ({"text": CHOICES, "label": ["1", "2", "3", "4"]}, "3"),
        ([{"label": each, "text": text} for each, text in zip("ABCD", CHOICES, strict=True)], "C"),
        ([{"key": each, "text": text} for each, text in zip("1234", CHOICES, strict=True)], "3"),
        (dict(zip("ABCD", CHOICES, strict=True)), "C"),
        ({"choices": CHOICES, "labels": [0, 0, 1, 0]}, None),
        ({"x": 0.1, "y": 0.2, "z": 1.0, "w": 0}, None),
        ('["x", "y", "z", "w"]', "C"),
        ("['x', 'y', 'z', 'w']", 2),
    ],
)
def test_choices_are_read_from_dicts_lists_and_one_cell(tmp_path, item, reference):
    keys = {} if reference is None else {"reference": reference}
    path = write(tmp_path, "a.jsonl", json.dumps({"input": "q", "choices": item} | keys))
    assert read_rows(path, needs=("input", "reference")) == [
        Row("q", ("z",), choices=tuple(CHOICES))
    ]


@pytest.mark.parametrize(
    ("items", "columns", "expected"),
    [
        (
            [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}],
            {"input": "goal", "choices": "sol1+sol2", "reference": "label"},
            ["b"],
        ),
        (
            [{"s": "g", "option1": "a", "option2": "b", "answer": each} for each in "12"],
            {"input": "s", "choices": "option1+option2", "reference": "answer"},
            ["a", "b"],
        ),
        (
            [{"s": "g", "o1": "a", "o2": "b", "n": "1"}],
            {"input": "s", "choices": "o1+o2", "reference": "n@1"},
            ["a"],
        ),
        (
            [{"s": "g", "o1": "a", "o2": "b", "n": "1"}],
            {"input": "s", "choices": "o1+o2", "reference": "n@0"},
            ["b"],
        ),
        (
            [{"s": "g", "A": "a", "B": "b", "C": "", "D": None, "answer": "B"}],
            {"input": "s", "choices": "A+B+C+D", "reference": "answer"},
            ["b"],
        ),
        (
            [
                {
                    "q": {
                        "stem": "g",
                        "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}],
                    },
                    "answerKey": "B",
                }
            ],
            {"input": "q.stem", "choices": "q.choices", "reference": "answerKey"},
            ["b"],
        ),
        (
            [{"s": "g", "e": ["1", "2", "3"], "n": 2}],
            {"input": "s", "choices": "e", "reference": "n@0"},
            ["3"],
        ),
        (
            [{"s": "g", "e": ["1", "2", "3"], "n": 2}],
            {"input": "s", "choices": "e", "reference": "n@text"},
            ["2"],
        ),
        (
            [{"s": "g", "e": ["B", "A"], "n": "A"}],
            {"input": "s", "choices": "e", "reference": "n@letter"},
            ["B"],
        ),
        (
            [{"s": "g", "e": ["no", "yes"], "n": True}],
            {"input": "s", "choices": "e", "reference": "n"},
            ["yes"],
        ),
        (
            [{"s": "g", "e": ["Yes", "No"], "n": True}],
            {"input": "s", "choices": "e", "reference": "n"},
            ["Yes"],
        ),
        (
            [{"s": "g", "e": ["a", "b"], "n": False}],
            {"input": "s", "choices": "e", "reference": "n"},
            ["a"],
        ),
    ],
)
def test_choices_in_columns_set_the_first_number(tmp_path, items, columns, expected):
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, items)))
    rows = read_rows(path, columns, needs=("input", "reference"))
    assert [row.references[0] for row in rows] == expected and rows[0].input == "g"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (
            [{"e": ["1", "2", "3"], "r": "1"}],
            "row 1: reference '1' may be a choice's text or a choice's number, and they",
        ),
        (
            [{"e": ["1", "3", "2"], "r": 1}],
            "state which: --columns=reference=r@0, @1 (numbers that count from there)",
        ),
        ([{"e": ["B", "A"], "r": "A"}], "may be a choice's text or a choice's letter"),
        (
            [{"e": ["a", "b"], "r": 0}, {"e": ["a", "b"], "r": 2}],
            "row 2: reference 2 does not name its choice the way",
        ),
        (
            [{"e": ["a", "b"], "r": 1}, {"e": ["a", "b"], "r": "A"}],
            "write all references as texts, as letters or as numbers",
        ),
        ([{"e": ["maybe", "yes"], "r": False}], "reference False is none of the 2 choices"),
        ([{"e": ["a", {"b": 1}], "r": 0}], "choice 2 of 2 is a dict; give a text"),
        ([{"e": {"a": [1], "b": 2}, "r": 0}], "choices are a dict of a, b; give a list of texts"),
        ([{"e": "['a' 'b']", "r": 0}], "choices are a str"),
    ],
)
def test_ambiguous_references_raise_an_error(tmp_path, items, message):
    path = write(tmp_path, "a.jsonl", "\n".join(json.dumps({"i": "q"} | item) for item in items))
    with pytest.raises(ValueError) as error:
        read_rows(
            path, {"input": "i", "choices": "e", "reference": "r"}, needs=("input", "reference")
        )
    assert message in str(error.value)


def test_numbered_columns_without_a_first_number_raise_an_error(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"s": "q", "way1": "a", "way2": "b", "n": "1"}))
    with pytest.raises(
        ValueError, match="may count from 0 or from 1; state which: --columns=reference=n@0, @1"
    ):
        read_rows(path, {"input": "s", "choices": "way1+way2", "reference": "n"})
    notes = []
    path = write(tmp_path, "b.jsonl", json.dumps({"s": "q", "e": ["a", "b"], "n": "2"}))
    assert read_rows(path, {"input": "s", "choices": "e", "reference": "n"}, notes=notes)[
        0
    ].references == ("b",)
    assert "count from 1" in notes[0]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (
            {"ctx": "c", "endings": CHOICES, "label": "3", "ind": 4},
            Row("c", ("w",), choices=tuple(CHOICES)),
        ),
        (
            {"article": "p", "question": "q", "options": CHOICES, "answer": "B"},
            Row("q", ("y",), "p", tuple(CHOICES)),
        ),
        (
            {
                "question": "q",
                "choices": {"text": ["a", "b"], "label": ["1", "2"]},
                "answerKey": "1",
            },
            Row("q", ("a",), choices=("a", "b")),
        ),
        (
            {
                "question": {
                    "stem": "q",
                    "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}],
                },
                "answerKey": "B",
            },
            Row("q", ("b",), choices=("a", "b")),
        ),
        ({"goal": "g", "sol1": "a", "sol2": "b", "label": 1}, Row("g", ("b",), choices=("a", "b"))),
        (
            {
                "sentence": "Ann saw Bea, so _ left.",
                "option1": "Ann",
                "option2": "Bea",
                "answer": "1",
            },
            Row("Ann saw Bea, so _ left.", ("Ann",), choices=("Ann", "Bea"), blank="_"),
        ),
        (
            {
                "premise": "It broke.",
                "question": "cause",
                "choice1": "a",
                "choice2": "b",
                "label": 0,
            },
            Row("It broke. cause", ("a",), choices=("a", "b")),
        ),
        (
            {
                "context": "c",
                "question": "q",
                "answerA": "a",
                "answerB": "b",
                "answerC": "d",
                "label": "1",
            },
            Row("q", ("a",), "c", ("a", "b", "d")),
        ),
        ({"question": "q", "passage": "p", "answer": False}, Row("q", ("no",), "p", ("no", "yes"))),
        ({"context": "c", "continuation": "w"}, Row("c", ("w",))),
        (
            {
                "question": "q",
                "context": "c",
                "answers": {"text": ["a", "b"], "answer_start": [0, 3]},
            },
            Row("q", ("a", "b"), "c"),
        ),
        ({"question": "q", "answer": {"value": "a", "aliases": ["b"]}}, Row("q", ("a", "b"))),
        ({"translation": {"en": "Hi.", "zh": "嗨。"}}, Row("Hi.", ("嗨。",))),
        ({"sentence": "s", "label": 1, "idx": 3}, Row("s", ("1",))),
    ],
)
def test_well_known_layouts_need_no_columns(tmp_path, item, expected):
    notes = []
    assert one(tmp_path, item, notes=notes) == expected
    assert notes[0].startswith("columns taken as those of ") and "--columns=" in notes[0]


def test_a_key_named_for_a_field_is_read_for_no_other_field(tmp_path):
    row = one(tmp_path, {"context": "c", "reference": "r"}, columns={"input": "context"})
    assert row == Row("c", ("r",))
    row = one(
        tmp_path,
        {"input": "i", "choices": "gold", "texts": ["gold", "b"]},
        columns={"reference": "choices", "choices": "texts"},
    )
    assert row == Row("i", ("gold",), choices=("gold", "b"))


LINES = '{"sentence": "s", "label": "A"}\n{"sentence": "t\u2028", "label": "B"}\n'


ITEMS = [json.loads(line) for line in LINES.split("\n") if line]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", LINES),
        ("a.json", "\ufeff" + LINES),
        ("a.jsonl", "[" + ",".join(LINES.split("\n")[:2]) + "]"),
        ("a.json", json.dumps({"data": ITEMS})),
        ("a.json", json.dumps({"version": 1, "examples": ITEMS})),
        (
            "a.json",
            json.dumps({"rows": [{"row_idx": i, "row": item} for i, item in enumerate(ITEMS)]}),
        ),
        ("a.json", json.dumps({"sentence": ["s", "t\u2028"], "label": ["A", "B"]})),
        (
            "a.json",
            json.dumps({"sentence": {"0": "s", "1": "t\u2028"}, "label": {"0": "A", "1": "B"}}),
        ),
        ("a.json", json.dumps(ITEMS, indent=2)),
    ],
)
def test_json_layouts(tmp_path, name, content):
    assert read_rows(write(tmp_path, name, content)) == [Row("s", ("A",)), Row("t\u2028", ("B",))]


def test_nested_lists_of_dialogues(tmp_path):
    content = [
        [["A: Hi.", "B: No."], [{"question": "q", "choice": ["x", "y"], "answer": "y"}], "id-1"]
    ]
    assert read_rows(write(tmp_path, "a.json", content)) == [
        Row("q", ("y",), "A: Hi. B: No.", ("x", "y"))
    ]

    content = [
        {
            "context_id": "1",
            "context_text": "c",
            "qas": [{"query_text": "q", "answers": ["a", "b"]}],
        }
    ]
    assert read_rows(write(tmp_path, "b.json", content)) == [Row("q", ("a", "b"), "c")]


def test_float_labels_of_a_table(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\na,1.0\nb,0.0\n")
    assert [row.references for row in read_rows(path, labels={"0": "no", "1": "yes"})] == [
        ("yes",),
        ("no",),
    ]


def test_questions_without_an_answer_are_counted(tmp_path):
    content = json.loads(json.dumps(SQUAD))
    asked = content["data"][0]["paragraphs"][0]["qas"]
    asked.append({"id": "3", "question": "How?", "answers": [], "is_impossible": True})
    notes = []
    rows = read_rows(write(tmp_path, "a.json", content), needs=("input", "reference"), notes=notes)
    assert [row.input for row in rows] == ["Who?", "Why?"] and notes == [
        "1 of 3 questions have no answer in their passage and are left out"
    ]


QUOTED = [Row('He said "no",\nthen left.', ("1",)), Row("a, b; c", ("0",))]


@pytest.mark.parametrize(
    ("name", "content", "columns", "rows"),
    [
        ("a.csv", 'sentence,label\n"He said ""no"",\nthen left.",1\n"a, b; c",0\n', None, QUOTED),
        (
            "a.csv",
            'id;label;review\r\n7;1;"He said ""no"",\r\nthen left."\r\n8;0;"a, b; c"\r\n',
            {"input": "review", "reference": "label"},
            QUOTED,
        ),
        (
            "a.csv",
            '\ufefftext\tlabel\n"He said ""no"",\nthen left."\t1\na, b; c\t0\n',
            None,
            QUOTED,
        ),
        (
            "a.csv",
            '"He said ""no"",\nthen left.",1\n"a, b; c",0\n',
            {"input": "0", "reference": "1"},
            QUOTED,
        ),
        (
            "a.csv",
            'sentence,label\n"He said ""no"",\nthen left.",1\n"a, b; c",0\n',
            {"input": "0", "reference": "1"},
            QUOTED,
        ),
        ("a.tsv", 'sentence\tlabel\n"He said ""no"",\nthen left."\t1\na, b; c\t0\n', None, QUOTED),
        ("a.tsv", '"sentence"\t"label"\n"fine"\t"1"\n', None, [Row("fine", ("1",))]),
        ("a.tsv", 'sentence\tlabel\n"fine"\t1\n', None, [Row('"fine"', ("1",))]),
        (
            "a.tsv",
            '"Fine" , he said\t1\n" open\t0\n',
            None,
            [Row('"Fine" , he said', ("1",)), Row('" open', ("0",))],
        ),
        (
            "a.csv",
            "question,A,B,C,D,answer\nq,x,y,z,w,C\n",
            None,
            [Row("q", ("z",), choices=tuple(CHOICES))],
        ),
    ],
)
def test_tables_with_and_without_quotes(tmp_path, name, content, columns, rows):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read_rows(path, columns, needs=("input", "reference")) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "foo,bar\na,b\n",
            "the first line names foo, bar, which match no known data set; name the columns",
        ),
        (
            "a.csv",
            "text,label\none, two,1\n",
            "row 2: 3 columns where the first line names 2; put quotes around texts",
        ),
        ("a.csv", 'text,label\n"one,1\n', "not valid CSV"),
        ("a.json", '{"a": 1}\nnothing', "row 2: not valid JSON"),
        ("a.json", "nothing", "neither as a whole nor line by line"),
        (
            "a.json",
            {"train": [{"a": 1}], "test": [{"a": 2}]},
            "holds a dict of the lists 'train', 'test'; write the one",
        ),
    ],
)
def test_invalid_tables_and_json_raise_an_error(tmp_path, name, content, message):
    with pytest.raises(ValueError) as error:
        read_rows(write(tmp_path, name, content), needs=("input", "reference"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_compressed_wide_and_parquet_files(tmp_path):
    expected = read_rows(write(tmp_path, "a.jsonl", LINES))
    for suffix, packer in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        (tmp_path / f"a.json{suffix}").write_bytes(packer(LINES.encode()))
        assert read_rows(tmp_path / f"a.json{suffix}") == expected
        (tmp_path / f"b.json{suffix}").write_bytes(packer(LINES.encode() * 99)[:-20])
        with pytest.raises(ValueError, match="cut short or damaged"):
            read_rows(tmp_path / f"b.json{suffix}")
    (tmp_path / "a.tsv").write_bytes("sentence\tlabel\n很好\t1\n".encode("utf-16"))
    assert read_rows(tmp_path / "a.tsv") == [Row("很好", ("1",))]
    table = pyarrow.table({"question": ["q"], "choices": [["a", "b"]], "answer": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [Row("q", ("b",), choices=("a", "b"))]
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_rows(tmp_path / "b.parquet")


def test_a_limit_draws_rows_by_a_seed_and_keeps_their_order(tmp_path):
    path = write(tmp_path, "a.tsv", "".join(f"text {i}\t{int(i > 49)}\n" for i in range(100)))
    notes = []
    rows = read_rows(path, limit=20, notes=notes)
    numbers = [int(row.input.split()[1]) for row in rows]
    assert numbers == sorted(numbers) and notes == ["20 of 100 rows, drawn by seed 0"]
    assert {row.references[0] for row in rows} == {"0", "1"}, (
        "of rows in the order of their labels both come"
    )
    assert read_rows(path, limit=20) == rows != read_rows(path, limit=20, seed=1)
    assert len(read_rows(path, limit=500)) == 100


def test_equal_choices_count_once_and_are_reported(tmp_path):
    notes = []
    row = one(tmp_path, {"input": "q", "choices": ["a", "b", "a"], "reference": 2}, notes=notes)
    assert (
        row == Row("q", ("a",), choices=("a", "b"))
        and "1 of 1 rows have duplicate choices" in notes[-1]
    )


@pytest.mark.parametrize(
    ("path", "options", "count"),
    [
        ("eval/arc/arc_easy.jsonl", {}, 2376),
        ("eval/boolq/boolq_dev.jsonl", {}, 3270),
        ("eval/piqa/piqa_valid.jsonl", {}, 1838),
        ("eval/other/copa.jsonl", {}, 100),
        ("eval/lambada/lambada_openai_test.jsonl", {}, 5153),
        ("eval/other/openbook_qa.jsonl", {}, 500),
        ("eval/winogrande/winogrande_xl_dev.jsonl", {}, 1267),
        ("tasks/sentiment/sst2/dev.tsv", {"labels": {"0": "negative", "1": "positive"}}, 872),
        (
            "tasks/summarization/scitldr_a/dev.jsonl",
            {"columns": {"input": "source", "reference": "target"}},
            619,
        ),
        ("tasks/translation/tatoeba_en_zh/cmn.txt", {}, 21116),
        ("tasks/qa/xquad/xquad.zh.json", {}, 1190),
    ],
)
def test_real_data_sets(shared, path, options, count):
    rows = read_rows(shared / "data" / path, needs=("input", "reference"), **options)
    assert len(rows) == count and all(row.input and row.references for row in rows)
    assert all(set(row.references) <= set(row.choices) for row in rows if row.choices)
