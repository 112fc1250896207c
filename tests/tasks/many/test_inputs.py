"""Read rows of all formats, with their other columns, and an error for each that is damaged."""

import datetime
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from mtnlg_jax.tasks.examples import read_rows
from mtnlg_jax.tasks.many.inputs import Inputs
from mtnlg_jax.tasks.rendering import Row


def written(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def test_rows_keep_their_ids_and_other_columns(tmp_path):
    path = written(
        tmp_path / "a.jsonl",
        {"id": "x1", "text": "Good.", "date": "2026-01-02", "stars": 5, "tags": ["a", 1]},
        {"id": 7, "text": "坏。", "date": None},
    )
    inputs = Inputs(path)
    first, second = inputs.items()
    assert (first.number, first.id, first.row) == (1, "x1", Row("Good."))
    assert first.columns == {"date": "2026-01-02", "stars": 5, "tags": ["a", 1]}
    assert (second.number, second.id, second.row.input) == (2, 7, "坏。")
    assert inputs.count == inputs.asked == 2
    assert inputs.notes == ["the input is taken from 'text': --columns=input=text"]
    assert list(inputs.items()) == [first, second], "rows can be read again"


DAMAGED = [
    '{"input": "a", "n": 1}',
    '{"input": "a", ',
    "",
    '{"other": "a"}',
    '{"input": " \\n"}',
    '{"input": ""}',
    '{"input": 3}',
    "[1]",
    '{"input": ["b", "c"]}',
]


def test_each_damaged_row_has_an_error_of_its_own(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(DAMAGED).encode() + b'\n{"input": "\xff"}\n')
    items = list(Inputs(str(path)).items())
    assert [item.number for item in items] == list(range(1, 10)), "empty lines are no rows"
    assert [item.row.input if item.row else None for item in items] == [
        *("a", None, None, None, None, None, None, "b c", None),
    ]
    errors = [item.error for item in items if item.row is None]
    for error, part in zip(
        errors,
        (
            "line 2 is not valid JSON",
            "row 3: no input under 'input', only other; name the right one",
            "row 4: the input under 'input' is empty",
            "row 5: the input under 'input' is empty",
            "row 6: input is a int; give a text",
            "row 7 is a list, not an object",
            "line 10 is not UTF-8 at byte 11",
        ),
        strict=True,
    ):
        assert error.startswith(part), error


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".parquet", ".jsonl.gz"])
def test_formats_give_the_same_rows(tmp_path, suffix):
    rows = [
        {"id": "1", "review": "Good, really.", "when": "2026-01-02", "label": "1"},
        {"id": "2", "review": "Bad.", "when": "2026-01-03", "label": "0"},
    ]
    path = tmp_path / f"rows{suffix}"
    if suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        cells = [list(rows[0]), *(list(row.values()) for row in rows)]
        quoted = [[f'"{cell}"' if mark in cell else cell for cell in line] for line in cells]
        path.write_text("".join(mark.join(line) + "\n" for line in quoted))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    inputs = Inputs(str(path), labels={"0": "negative", "1": "positive"})
    items = list(inputs.items())
    assert [item.row for item in items] == [
        Row("Good, really.", ("positive",)),
        Row("Bad.", ("negative",)),
    ]
    assert [item.id for item in items] == ["1", "2"]
    assert items[0].columns == {"when": "2026-01-02", "label": "1"}
    assert list(inputs.names)[:4] == list(rows[0])


def test_a_table_with_a_known_and_one_without_a_head(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("sentence\tlabel\na fine film\t1\ntoo\tmany\tcells\n")
    items = list(Inputs(str(path)).items())
    assert items[0].row == Row("a fine film", ("1",)) and items[0].columns == {"label": "1"}
    assert "3 columns where the first line names 2" in items[1].error
    path.write_text("a fine film\t1\na dull film\t0\n")
    first, second = Inputs(str(path), labels={"1": "positive"}).items()
    assert first.row == Row("a fine film", ("positive",)) and first.columns == {"1": "1"}
    assert second.row.references == ("0",), "a reference without a name stays as it is"
    named = Inputs(str(path), {"input": "1"})
    assert [item.row.input for item in named.items()] == ["1", "0"]


def test_columns_with_one_name_do_not_shift_the_others(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,,text, text,,source\n1,a,b,c,d,shop\n")
    (only,) = Inputs(str(path)).items()
    assert (only.row.input, only.columns) == ("b", {"": "a", "source": "shop"})


def test_a_folder_has_a_row_for_each_text(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("Zwei.")
    (tmp_path / "one.txt").write_bytes("\ufeffOne.\nMore.".encode())
    (tmp_path / "wide.txt").write_bytes("宽".encode("utf-16"))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfea")
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    inputs = Inputs(str(tmp_path))
    found = {item.id: item.row.input if item.row else item.error for item in inputs.items()}
    assert found.pop(None).startswith("bad.txt is not UTF-16")
    assert found == {
        "b/two.md": "Zwei.",
        "empty.txt": "row 3: the input under 'input' is empty",
        "one.txt": "One.\nMore.",
        "wide.txt": "宽",
    }
    assert inputs.notes == ["1 other files are left out: picture.png"]
    before = inputs.digest
    (tmp_path / "one.txt").write_text("Other.")
    assert Inputs(str(tmp_path)).digest != before


def test_choices_and_references_are_those_of_an_evaluation(tmp_path):
    rows = [
        {
            "question": "Q1?",
            "choices": ["a", "b", "c"],
            "answer": 2,
            "context": "C.",
            "source": "s",
        },
        {"question": "Q2?", "choices": ["d", "e", "f"], "answer": 0, "context": ""},
    ]
    path = written(tmp_path / "a.jsonl", *rows)
    inputs = Inputs(path)
    assert [item.row for item in inputs.items()] == read_rows(path, needs=("input", "reference"))
    assert next(inputs.items()).columns == {"answer": 2, "context": "C.", "source": "s"}
    given = Inputs(
        written(tmp_path / "b.jsonl", {"input": "a _ film"}), choices=("fine", "dull"), blank="_"
    )
    row = next(given.items()).row
    assert (row.choices, row.blank) == (("fine", "dull"), "_")


def test_a_limit_draws_rows_by_the_seed(tmp_path):
    path = written(tmp_path / "a.jsonl", *({"input": str(i)} for i in range(30)))
    drawn = [item.number for item in Inputs(path, limit=7, seed=3).items()]
    assert len(drawn) == 7 and drawn == sorted(drawn) and drawn != list(range(1, 8))
    assert drawn == [item.number for item in Inputs(path, limit=7, seed=3).items()]
    assert Inputs(path, limit=7).asked == 7 and Inputs(path, limit=99).asked == 30


def test_values_that_json_lacks_become_texts(tmp_path):
    table = pyarrow.Table.from_pylist(
        [{"input": "a", "day": datetime.date(2026, 1, 2), "x": float("nan"), "b": b"\xff"}]
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    columns = next(Inputs(str(tmp_path / "a.parquet")).items()).columns
    assert columns == {"day": "2026-01-02", "x": "nan", "b": "b'\\xff'"}
    json.dumps(columns, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        (
            "a.jsonl",
            '{"body1": "x"}\n',
            None,
            "no row has an input under 'input', the first one only",
        ),
        ("a.jsonl", '{"text": "x"}\n', {"input": "t"}, "no row has an input under 't'"),
        (
            "a.jsonl",
            '{"text": "x"}\n',
            {"input": "text", "reference": "y"},
            "has a reference under",
        ),
        ("a.jsonl", "{\n[\n", None, "none of 2 rows is an object; the first: line 1 is not valid"),
        ("a.jsonl", "\n", None, "holds no rows"),
        ("a.csv", "x,y\n1,2\n", None, "match no known data set"),
        ("a.pdf", "", None, "unknown suffix"),
        ("b.jsonl", None, None, "b.jsonl does not exist; did you mean"),
        ("a.jsonl", '{"input": "x"}\n', {"inptu": "x"}, "unknown column 'inptu'"),
        ("a.parquet", "no", None, "is not a readable Parquet file"),
        ("a.jsonl.gz", "no", None, "is cut short or damaged"),
    ],
)
def test_files_without_rows_are_one_clear_error(tmp_path, name, content, columns, message):
    (tmp_path / "a.jsonl").write_text("")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Inputs(str(tmp_path / name), columns)
    assert "\n" not in str(error.value)


def test_a_folder_without_texts_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no text to answer"):
        Inputs(str(tmp_path))
