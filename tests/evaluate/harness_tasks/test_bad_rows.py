"""Bad task files: one error with file, row and field, before the model is asked anything."""

import json
import re

import pytest

from mtnlg_jax.evaluate.harness_tasks import run

QUESTION = {"passage": "Ice floats.", "question": "does ice float", "label": 1}
PIQA = {"goal": "To cool tea", "sol1": "wait", "sol2": "boil it", "label": 0}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("boolq", [QUESTION, {"question": "q", "label": 1}], "row 2: .* needs the field 'passage'"),
        ("boolq", [QUESTION, QUESTION | {"label": 2}], "row 2: .*'label', which is 2, outside of"),
        ("boolq", [QUESTION | {"label": -1}], "row 1: .*test files without labels"),
        ("boolq", [QUESTION | {"passage": " "}], "'passage', which is ' ', not a text"),
        ("piqa", [PIQA | {"sol2": ""}], "row 1: .*'sol2', which is '', not a text"),
        ("hellaswag", [{"activity_label": "a", "ctx": "b", "endings": ["c", ""], "label": 0}],
         "'endings', which has the choice ''"),
        ("anli_r1", [{"premise": "a", "hypothesis": "b", "label": "x"}], "is 'x', outside of"),
        ("winogrande", [{"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}],
         "has no _ in place"),
        ("winogrande", [{"sentence": "_ a", "option1": "a", "option2": "b", "answer": "3"}],
         "'answer', which is '3', outside of the answers 1 and 2"),
        ("wic", [{"sentence1": "ab", "sentence2": "c", "start1": 1, "end1": 9, "label": 0}],
         "start1.*=1 and end1=9 are outside of the 2 characters"),
        ("wic", [{"sentence1": "ab", "sentence2": "c", "start1": "b", "end1": 2, "label": 0}],
         "'start1', which is 'b', not a number"),
        ("lambada_openai", [{"context": "a", "continuation": "two words"}], "more than one word"),
        ("lambada_openai", [{"context": "a", "continuation": ""}], "'continuation', which is ''"),
        ("arc_easy", [{"query": "q", "choices": ["a", "b"], "gold": 2}], "is 2, outside of"),
        ("race", [{"article": "a", "problems": "[}"}], "'problems', which is not a list"),
        ("hans", [{"premise": "a", "hypothesis": "b", "label": "c"}], "entailment"),
        ("copa", [{"query": "He fell", "choices": ["a", "b"], "gold": 0}], "does not end with"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_its_task(known, rows_of, name, rows, message):
    model = known(lambda *_: 0.0)
    folder = rows_of(f"{name}.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        run.run_tasks(model, [name], task_data=folder)
    assert f"{name}.jsonl row {len(rows)}: the task {name}" in str(error.value)
    assert model.seen == [] and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "boolq.jsonl has no rows; a task needs at least one"),
        ('{"passage": "a"', "boolq.jsonl line 1 is not JSON"),
        ("[1]\n", "boolq.jsonl row 1 is not an object"),
    ],
)
def test_a_file_without_rows(known, tmp_path, content, message):
    (tmp_path / "boolq.jsonl").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        run.run_tasks(known(lambda *_: 0.0), ["boolq"], task_data=str(tmp_path))


def test_names_and_files_that_do_not_exist(known, rows_of, tmp_path):
    model = known(lambda *_: 0.0)
    folder = rows_of("boolq.jsonl", [QUESTION])
    with pytest.raises(FileNotFoundError, match="has no file for the task piqa"):
        run.run_tasks(model, ["piqa"], task_data=folder)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run.run_tasks(model, ["boolq"], task_data=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="--task_data=FOLDER"):
        run.run_tasks(model, ["boolq"])
    with pytest.raises(ValueError, match=r"limit=0 is below 1"):
        run.run_tasks(model, ["boolq"], task_data=folder, limit=0)
    with pytest.raises(ValueError, match="names no task"):
        run.run_tasks(model, [""], task_data=folder)
    rows_of("other/boolq.jsonl", [QUESTION])
    with pytest.raises(ValueError, match="2 files fit the task boolq"):
        run.run_tasks(model, ["boolq"], task_data=folder)
    train = rows_of("train/arc_easy.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 0}])
    with pytest.raises(FileNotFoundError, match="has those for training alone"):
        run.run_tasks(model, ["arc_easy"], task_data=train)


def test_a_choice_longer_than_the_context(known, rows_of):
    long = PIQA | {"sol2": "boil it again and again and again"}
    folder = rows_of("piqa.jsonl", [PIQA, long])
    model = known(lambda *_: 0.0, words=6)
    with pytest.raises(ValueError, match=r"row 2: choice 2 of the task piqa has 7 tokens, .* of 6"):
        run.run_tasks(model, ["piqa"], task_data=folder)
    assert model.seen == []
    model.max_length = 7
    task = run.run_tasks(model, ["piqa"], task_data=folder)["tasks"]["piqa"]
    assert task["cut_prompts"] == 1, "the question has 5 tokens, and 5 + 7 is more than 7 + 1"


GENERAL = """\
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{choices}
"""


@pytest.mark.parametrize(
    ("row", "kind", "target", "choices", "message"),
    [
        ({"a": 1}, "loglikelihood", '"{{answer}}"', "", "needs the field 'question'"),
        ({"question": "q"}, "loglikelihood", '"{{answer}}"', "", "needs the field 'answer'"),
        ({"question": "q", "answer": " "}, "loglikelihood", "answer", "", "continuation .* empty"),
        ({"question": "q", "label": 2}, "multiple_choice", "label", 'doc_to_choice: ["a", "b"]',
         "label 2 of the task mine is outside of its 2 choices, 0 to 1"),
        ({"question": "q", "label": 0, "other": " "}, "multiple_choice", "label",
         "doc_to_choice: '{{[\"a\", other]}}'", "choice 2 of the task mine is empty"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", [1, 2])
def test_bad_rows_of_a_task_of_the_user(
    known, tmp_path, row, kind, target, choices, message, number
):
    """The field may be absent from one row alone, which a data set would fill."""
    good = {"question": "q", "answer": "b", "label": 1, "other": "c"}
    rows = [row] if number == 1 else [good, row]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    text = GENERAL.format(file=file, kind=kind, target=target, choices=choices)
    (tmp_path / "mine.yaml").write_text(text)
    model = known(lambda *_: 0.0)
    with pytest.raises(ValueError, match=message) as error:
        run.run_tasks(model, ["mine"], include_path=str(tmp_path))
    assert f"rows.jsonl row {number}: " in str(error.value) and model.seen == []


def test_fields_of_two_types(known, rows_of, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "q", "answer": "a"}\n{"question": 3, "answer": "b"}\n')
    (tmp_path / "mine.yaml").write_text(
        GENERAL.format(file=file, kind="loglikelihood", target="answer", choices="")
    )
    with pytest.raises(ValueError, match=r"row 2: the field 'question' is 3, and a str in"):
        run.run_tasks(known(lambda *_: 0.0), ["mine"], include_path=str(tmp_path))


def test_bad_rows_are_left_out_on_request(known, rows_of):
    rows = [
        PIQA,
        PIQA | {"sol2": ""},
        PIQA | {"goal": "To dry hands", "label": 1},
        PIQA | {"sol2": "boil it again and again and again"},
        PIQA | {"goal": "To walk"},
    ]
    folder = rows_of("piqa.jsonl", rows)
    model = known(lambda _, continuation: -float(len(continuation)), words=6)
    found = run.run_tasks(model, ["piqa"], task_data=folder, on_error="skip", log_rows=True)
    task = found["tasks"]["piqa"]
    assert (task["rows"], task["per_row"]["acc"]) == (3, [1, 0, 1])
    assert [record["place"][-5:] for record in task["log"]] == ["row 1", "row 3", "row 5"]
    assert task["left_out"]["rows"] == 2 and "'sol2', which is ''" in task["left_out"]["first"]
    limited = run.run_tasks(model, ["piqa"], task_data=folder, on_error="skip", limit=2)
    assert limited["tasks"]["piqa"]["per_row"]["acc"] == [1, 0], "two rows that can be used"
    folder = rows_of("piqa.jsonl", [rows[1]])
    with pytest.raises(ValueError, match=r"no row of the task piqa can be used; the first: .*sol2"):
        run.run_tasks(model, ["piqa"], task_data=folder, on_error="skip")


def test_bad_rows_of_a_task_of_the_user_are_left_out(known, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"question": "a", "answer": "b"}, {"question": "c"}, {"question": "d", "answer": "e"}]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    text = GENERAL.format(file=file, kind="loglikelihood", target="answer", choices="")
    (tmp_path / "mine.yaml").write_text(text)
    model = known(lambda *_: (-1.0, True))
    found = run.run_tasks(model, ["mine"], include_path=str(tmp_path), on_error="skip")
    assert [context for context, _ in model.seen] == ["a", "d"]
    assert found["tasks"]["mine"]["left_out"]["first"].startswith(f"{file} row 2: ")
