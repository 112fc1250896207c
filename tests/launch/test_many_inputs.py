"""launch/task.py --inputs from end to end: killed and resumed, errors by row, bad input, report."""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from killing import run_with_kills

from mtnlg_jax.config import Config, ModelConfig, to_json
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.train.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["a", "fine", "dull", "film", "very", "good", "bad", "story", "slow", "warm"]


def review(number):
    """Return a review of its own, 1 to 20 words long."""
    return " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % 10] for i in range(number % 20 + 1))


def write_rows(path, count):
    with open(path, "w") as file:
        for number in range(1, count + 1):
            row = {
                "id": f"r{number}",
                "text": f"{review(number)} {number}",
                "source": "ab"[number % 2],
            }
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    write_rows(folder / "rows.jsonl", 6)
    (folder / "mixed.jsonl").write_text(
        '{"input": "A fine film.", "date": "2026-01-02"}\n{"text": "x"}\n{"inp\n{"input": " "}\n'
    )
    (folder / "none.jsonl").write_text('{"other": "x"}\n')
    (folder / "long.jsonl").write_text(
        json.dumps({"input": "Hello there. " * 99}) + '\n{"input": "Hello."}\n'
    )
    (folder / "notes").mkdir()
    (folder / "notes" / "one.txt").write_text("A fine film.")
    (folder / "theirs.jsonl").write_text("{}\n")
    (folder / "theirs.html").write_text("mine")
    texts = [
        "Is each review positive or negative? Review: a fine dull film Sentiment: 0123456789\n"
    ]
    train_tokenizer([*texts, " ".join(WORDS)] * 9, 320).save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def ask(answering, folder):
    answer = answering("task.py", folder / "tokenizer", positions=128, new_tokens=8)
    return lambda *arguments: answer(*(each.replace("{folder}", str(folder)) for each in arguments))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


SENTIMENT = ("--workdir=RUN", "--task=sentiment", "--inputs={folder}/rows.jsonl")


def test_rows_are_answered_and_reported(ask, folder):
    out = folder / "a.jsonl"
    code, text, err = ask(*SENTIMENT, f"--outputs={out}", "--batch=4")
    assert code == 0, err
    assert f"sentiment: 6 rows: 6 answers and 0 errors in {out}, report in {out}.html" in text
    assert "note: the input is taken from 'text'" in err
    lines = lines_of(out)
    assert sorted(line["row"] for line in lines) == [1, 2, 3, 4, 5, 6]
    first = next(line for line in lines if line["row"] == 1)
    assert (first["id"], first["columns"]) == ("r1", {"source": "b"})
    one = json.loads(
        ask(
            "--workdir=RUN",
            "--task=sentiment",
            "--json",
            f"--inputs={folder}/rows.jsonl",
            f"--outputs={folder}/b.jsonl",
            "--batch=1",
            "--keep_prompts",
            "--report=none",
        )[1]
    )
    assert (one["rows"], one["answered"], one["report"]) == (6, 6, None)
    # Whatever the batch, the scores are the same.
    others = {line["row"]: line for line in lines_of(folder / "b.jsonl")}
    for line in lines:
        other = others[line["row"]]
        assert other["prompt"].endswith(f"{line['input']}\nSentiment:")
        assert [c["label"] for c in line["choices"]] == [c["label"] for c in other["choices"]]
        for choice, same in zip(line["choices"], other["choices"], strict=True):
            assert choice["log_prob"] == pytest.approx(same["log_prob"], abs=1e-4)
    page = (folder / "a.jsonl.html").read_text()
    assert "By source" in page and f"{review(3)} 3" in page
    again = ask(*SENTIMENT, f"--outputs={out}", "--batch=2")
    assert again[0] == 0 and "6 rows (6 of them before)" in again[1]
    assert lines_of(out) == lines


def test_each_bad_row_has_its_own_error(ask, folder):
    out = folder / "mixed.out.jsonl"
    code, text, _ = ask(
        "--workdir=RUN", "--task=sentiment", f"--inputs={folder}/mixed.jsonl", f"--outputs={out}"
    )
    assert code == 0 and "4 rows: 1 answers and 3 errors" in text
    errors = {line["row"]: line.get("error", "") for line in lines_of(out)}
    assert errors[1] == "" and errors[2].startswith("row 2: no input under 'input', only text")
    assert errors[3].startswith("line 3 is not valid JSON")
    assert errors[4] == "row 4: the input under 'input' is empty"
    assert "3 rows could not be answered" in (folder / "mixed.out.jsonl.html").read_text()


def test_a_row_that_is_too_long_does_not_stop_the_others(ask, folder):
    out = folder / "long.out.jsonl"
    asked = ["--workdir=RUN", "--task=translate", f"--inputs={folder}/long.jsonl"]
    asked += ["--set=num_beams=1", "--set=max_new_tokens=4"]
    # By parts it is answered as the others are.
    code, text, err = ask(*asked, f"--outputs={folder}/parts.out.jsonl")
    assert code == 0 and "2 rows: 2 answers and 0 errors" in text, err
    parts = [line["work"]["parts"] for line in lines_of(folder / "parts.out.jsonl")]
    assert min(parts) == 1 and max(parts) > 1
    asked += [f"--outputs={out}", "--long=cut"]
    code, text, err = ask(*asked)
    assert code == 0 and "2 rows: 1 answers and 1 errors" in text, err
    errors = [line for line in lines_of(out) if "error" in line]
    assert len(errors) == 1 and "context holds 128" in errors[0]["error"]
    code, text, _ = ask(*asked, "--retry_errors")
    assert code == 0 and "2 rows (1 of them before): 1 answers and 1 errors" in text
    assert sorted(line["row"] for line in lines_of(out)) == [1, 2]


def test_a_folder_of_texts(ask, folder):
    out = folder / "notes.jsonl"
    code, _, err = ask(
        "--workdir=RUN",
        "--task=continue",
        f"--inputs={folder}/notes",
        f"--outputs={out}",
        "--set=max_new_tokens=3",
    )
    assert code == 0, err
    assert [(line["id"], line["input"]) for line in lines_of(out)] == [("one.txt", "A fine film.")]
    assert not (folder / "notes.jsonl.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--outputs={folder}/x.jsonl"], "--outputs is for the rows of --inputs"),
        (["--inputs={folder}/rows.jsonl"], "is answered into a file; name it with --outputs"),
        (
            ["--inputs={folder}/rows.jsonl", "--outputs={folder}/x.jsonl", "--eval=a"],
            "leave --eval out",
        ),
        (
            ["--inputs={folder}/rows.jsonl", "--outputs={folder}/theirs.jsonl", "--report=none"],
            "theirs.jsonl exists, and no theirs.jsonl.resume.json beside it says",
        ),
        (
            ["--inputs={folder}/rows.jsonl", "--outputs={folder}/x.txt"],
            "name it with the suffix .jsonl",
        ),
        (
            ["--inputs={folder}/rows.jsonl", "--outputs={folder}/no/x.jsonl"],
            "no does not exist; create it",
        ),
        (
            ["--inputs={folder}/none.jsonl", "--outputs={folder}/x.jsonl"],
            "no row has an input under 'input', the first one only other",
        ),
        (
            ["--inputs={folder}/nothing.jsonl", "--outputs={folder}/x.jsonl"],
            "nothing.jsonl does not exist",
        ),
        (
            [
                "--inputs={folder}/rows.jsonl",
                "--outputs={folder}/x.jsonl",
                "--report={folder}/theirs.html",
            ],
            "theirs.html exists, and is not known to be of",
        ),
        (
            ["--inputs={folder}/rows.jsonl", "--outputs={folder}/x.jsonl", "--time_column=day"],
            "--time_column=day: rows have no such column beside their id and input, only source;",
        ),
        (
            ["--inputs={folder}/rows.jsonl", "--outputs={folder}/x.jsonl", "--group_column=id"],
            "--group_column=id: rows have no such column beside their id and input, only source",
        ),
        (
            ["--inputs={folder}/rows.jsonl", "--outputs={folder}/x.jsonl", "--time_column=source"],
            "--time_column=source: no value of this column is a date",
        ),
        (
            [
                "--inputs={folder}/rows.jsonl",
                "--outputs={folder}/x.jsonl",
                "--report={folder}/notes/../x.jsonl",
            ],
            "would replace the answers of --outputs=",
        ),
        (
            [
                "--inputs={folder}/rows.jsonl",
                "--outputs={folder}/x.jsonl",
                "--report={folder}/rows.jsonl/x.html",
            ],
            "the folder {folder}/rows.jsonl does not exist; create it",
        ),
        (
            ["--inputs={folder}/rows.jsonl", "--outputs={folder}/x.jsonl", "--labels=0=neg"],
            "--labels=0=neg: task 'sentiment' has the labels negative, positive; write them",
        ),
        (
            ["--inputs={folder}/rows.jsonl", "--outputs={folder}/x.jsonl", "--scorer=bert"],
            "--scorer",
        ),
        (
            [
                "--task=summarise",
                "--inputs={folder}/rows.jsonl",
                "--outputs={folder}/x.jsonl",
                "--report={folder}/x.html",
            ],
            "task 'summarise' ranks no labels; leave it out",
        ),
        (
            [
                "--task=summarise",
                "--inputs={folder}/rows.jsonl",
                "--outputs={folder}/x.jsonl",
                "--scorer=pmi",
            ],
            "scorer=pmi ranks labels and choices, and these rows have none",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(ask, folder, arguments, message):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, out, err = ask("--workdir=RUN", "--task=sentiment", *arguments)
    message = message.replace("{folder}", str(folder))
    assert (code, out) == (2, "") and message in err, err
    assert err.splitlines()[-1].startswith("error: ")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_settings_are_refused(ask, folder):
    out = folder / "c.jsonl"
    assert ask(*SENTIMENT, f"--outputs={out}")[0] == 0
    before = out.read_bytes()
    code, _, err = ask(*SENTIMENT, f"--outputs={out}", "--scorer=pmi")
    assert code == 2 and "was begun with no --scorer, now --scorer=pmi; give the same to go" in err
    code, _, err = ask(
        "--workdir=RUN", "--task=sentiment", f"--inputs={folder}/mixed.jsonl", f"--outputs={out}"
    )
    assert code == 2 and "was begun with the inputs sha256:" in err
    assert out.read_bytes() == before


@pytest.fixture(scope="module")
def run(folder):
    """Return a run on the disk, with a random model."""
    from mtnlg_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer")
    model = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=128,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_model(model)[1]
    )
    tokenizer.save(folder / "run" / "tokenizer")
    checkpoints = Checkpoints(folder / "run" / "checkpoints")
    meta = {"config": json.loads(to_json(Config(model=model))), "identity": {}}
    checkpoints.save(3, {"params": params}, meta, wait=True)
    checkpoints.close()
    return folder / "run"


@pytest.mark.parametrize(
    ("rows", "kills"), [(60, 3), pytest.param(2000, 10, marks=pytest.mark.slow)]
)
def test_each_row_is_answered_once_after_kills_at_random(run, tmp_path, rows, kills):
    """Killed by SIGKILL at random moments, the same command goes on until all is done."""
    write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "answers.jsonl"
    command = [
        *(sys.executable, ROOT / "launch/task.py", f"--workdir={run}", "--task=sentiment"),
        *(f"--inputs={tmp_path}/rows.jsonl", f"--outputs={out}", "--batch=2"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = run_with_kills(list(map(str, command)), out, rows, kills, seed=rows, env=environment)
    assert done["returncode"] == 0, done["output"]
    assert len(done["lines_at_kills"]) == kills and done["lines_at_kills"][-1] < rows
    lines = lines_of(out)
    assert sorted(line["row"] for line in lines) == list(range(1, rows + 1))
    for line in lines:
        assert line["input"] == f"{review(line['row'])} {line['row']}"
        assert line["id"] == f"r{line['row']}"
    before = done["lines_at_kills"][-1]
    assert f"{rows:,} rows ({before:,} of them before)" in done["output"]
    assert (tmp_path / "answers.jsonl.html").exists()
