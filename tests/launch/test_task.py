"""launch/task.py from end to end: answers, scores, pairs, and one line with exit code 2 for bad
input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtnlg_jax.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    (folder / "review.txt").write_text("A fine film.\n")
    (folder / "empty.txt").write_text(" \n")
    (folder / "rows.tsv").write_text("a fine film\t1\na dull film\t0\nvery good\t1\n")
    (folder / "rows.jsonl").write_text(
        '{"input": "One two.", "reference": "One."}\n{"input": "Three."}\n'
    )
    (folder / "piqa.jsonl").write_text(
        '{"goal": "g", "sol1": "a film", "sol2": "dull", "label": 1}\n'
    )
    (folder / "yes.jsonl").write_text('{"q": "fine", "r": false}\n')
    (folder / "blank.jsonl").write_text(
        '{"input": "a _ film", "choices": ["fine", "dull"], "reference": "dull"}\n'
    )
    (folder / "words.jsonl").write_text(
        '{"text": "is each review positive"}\n{"text": "a fine film"}\n'
    )
    (folder / "r.jsonl").write_text(
        '{"input": "Is each", "reference": " review"}\n{"input": "fine", "reference": "天地玄黄"}\n'
    )
    (folder / "notes").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "a.jsonl").write_text('{"text": "fine"}\n{"text": "cut sh')
    (folder / "notes" / "sea.txt").write_text(
        "The sea is grey. The captain hides a parrot. Nobody knows."
    )
    (folder / "bare").mkdir()
    (folder / "twice.json").write_text('{"en": {"labels": [["a", "x"], ["a", "y"]]}}')
    return folder


@pytest.fixture(scope="module")
def ask(answering, folder):
    """(*arguments, stdin bytes) -> (exit code, standard output, standard error).

    {folder} in an argument stands for the folder of the fixture.
    """
    texts = [
        "Is each review positive or negative? Review: a fine film Sentiment: dull\n",
        "Answer: Question: Who [1]\n",
    ]
    train_tokenizer(texts * 9, 330).save(folder / "tokenizer")
    answer = answering("task.py", folder / "tokenizer", positions=128, new_tokens=128)
    return lambda *arguments, stdin=b"": answer(
        *(each.replace("{folder}", str(folder)) for each in arguments), stdin=stdin
    )


SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "task.py"
SENTIMENT = ("--workdir=RUN", "--task=sentiment", "--labels=0=negative,1=positive")


def test_one_answer(ask):
    code, out, err = ask("--workdir=RUN", "--task=sentiment", "--input={folder}/review.txt")
    lines = out.splitlines()
    assert (code, err) == (0, "") and lines[0] in ("positive", "negative")
    assert lines[1].split()[1] == lines[0]
    assert sorted(line.split()[1] for line in lines[1:3]) == ["negative", "positive"]
    assert (
        lines[3] == "(probability among these choices, and logprob sum in nats, which ranks them)"
    )
    record = json.loads(
        ask("--workdir=RUN", "--task=sentiment", "--json", stdin=b"A fine film.")[1]
    )
    assert (
        record["text"] == lines[0]
        and record["step"] == 7
        and record["prompt"].endswith("A fine film.\nSentiment:")
    )
    shown = json.loads(
        ask(*SENTIMENT, "--json", "--examples={folder}/rows.tsv", "--shots=2", stdin=b"x")[1]
    )
    assert (
        shown["examples"] == 2
        and "Review: a fine film\nSentiment: positive\n\nReview: a dull" in shown["prompt"]
    )


def test_a_model_that_does_not_fit_is_refused(ask):
    arguments = ["--workdir=RUN", "--task=summarise", "--input={folder}/review.txt"]
    code, out, err = ask(*arguments, "--memory=0.00001")
    assert (code, out) == (2, "") and "RUN does not fit" in err
    # Summaries are written by beams, which have no int8 cache.
    assert "--weights=int8" in err and "--cache" not in err
    code, _, err = ask(*arguments, "--cache=int8")
    assert code == 2 and "add --set=decode.num_beams=1" in err


def test_an_answer_from_passages(ask):
    asked = (
        "--workdir=RUN",
        "--task=answer",
        "--passages={folder}/notes",
        "--passage_size=30",
        "--set=max_new_tokens=4",
    )
    code, out, err = ask(*asked, stdin=b"Who hides a parrot?")
    assert (code, err) == (0, "")
    assert "[1] sea.txt, characters 17 to 44: 'The captain hides a parrot.' ..." in out
    record = json.loads(ask(*asked, "--json", stdin=b"Who hides a parrot?")[1])
    assert record["citations"][0]["start"] == 17 and "[1] The captain hides" in record["prompt"]
    chosen = ask(
        "--workdir=RUN", "--task=answer", "--choices=captain", "--choices=cook", stdin=b"Who?"
    )[1]
    assert chosen.splitlines()[0] in ("captain", "cook") and chosen.count("%") == 2
    text = "Once upon"
    went_on = ask(
        "--workdir=RUN", "--task=continue", "--set=max_new_tokens=4", stdin=text.encode()
    )[1]
    assert went_on.startswith(text) and len(went_on) > len(text) + 1


def test_a_set_is_scored_beside_its_baseline(ask):
    code, out, _ = ask(*SENTIMENT, "--eval={folder}/rows.tsv")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith(
        "sentiment: 3 rows, checkpoint of step 7, 0 to 0 examples, 0 inputs short"
    )
    assert lines[1].split() == ["model", "majority", "class"] and lines[2].startswith("accuracy")
    assert " 66.67 [" in lines[2].split("]", 1)[1]
    record = json.loads(
        ask(*SENTIMENT, "--eval={folder}/rows.tsv", "--json", "--limit=2", "--scorer=pmi")[1]
    )
    assert record["rows"] == 2 and record["notes"] == ["2 of 3 rows, drawn by seed 0"]
    assert (
        record["scores"]["accuracy"]["value"] in (0, 50, 100) and record["ranked_by"] == "pmi sum"
    )
    record = json.loads(
        ask(*SENTIMENT, "--eval={folder}/rows.tsv", "--json", "--examples={folder}/rows.tsv")[1]
    )
    assert record["examples"] == {"min": 2, "max": 2}, "each row sees the two others"


CONTINUE = ("--workdir=RUN", "--task=continue")


def test_a_setting_with_and_without_its_section_is_the_same(ask):
    asked = [*CONTINUE, "--json"]
    answers = [
        json.loads(ask(*asked, f"--set={key}=4", stdin=b"Once upon")[1])
        for key in ("max_new_tokens", "decode.max_new_tokens")
    ]
    assert answers[0] == answers[1]
    longer = json.loads(ask(*asked, "--set=decode.max_new_tokens=9", stdin=b"Once upon")[1])
    assert len(longer["text"]) > len(answers[0]["text"])


@pytest.mark.parametrize(
    ("task", "setting"), [("summarise", "num_beams=1"), ("continue", "temperature=0")]
)
def test_settings_of_a_task_without_effect_are_reset(ask, task, setting):
    """early_stopping without beams, top_p without a temperature; those of --set are refused."""
    asked = ["--workdir=RUN", f"--task={task}", "--set=max_new_tokens=3", f"--set={setting}"]
    assert ask(*asked, stdin=b"A fine film.")[0] == 0
    code, _, err = ask(*asked, "--set=seed=3", stdin=b"A fine film.")
    assert code == 2 and "seed=3 affects sampling only" in err


def test_layouts_are_noted_and_every_normalization_is_reported(ask, folder):
    code, out, err = ask("--workdir=RUN", "--task=answer", "--eval={folder}/piqa.jsonl")
    assert (
        code == 0
        and "note: columns taken as those of PIQA: --columns=input=goal,choices=sol1+sol2" in err
    )
    assert "ranked by logprob per_byte" in out and " 50.00 [50.00, 50.00]" in out
    assert [line.split()[0] for line in out.splitlines()[2:]] == [
        "accuracy",
        "sum",
        "per_char",
        "per_byte",
    ]
    for columns in ("choices=sol1+sol2", "choices=sol1,sol2"):
        named = ask(
            "--workdir=RUN",
            "--task=answer",
            "--eval={folder}/piqa.jsonl",
            "--normalise=sum",
            "--json",
            f"--columns=input=goal,{columns},reference=label",
        )
        record = json.loads(named[1])
        assert (
            record["ranked_by"] == "logprob sum"
            and record["normalised"]["sum"] == record["scores"]["accuracy"]
        )
    record = json.loads(
        ask(
            "--workdir=RUN",
            "--task=answer",
            "--eval={folder}/yes.jsonl",
            "--choices=no",
            "--choices=yes",
            "--columns=input=q,reference=r",
            "--json",
        )[1]
    )
    assert record["baseline"] == "by chance" and record["rows"] == 1


def test_blanks_and_last_words(ask):
    code, out, _ = ask(*CONTINUE, "--eval={folder}/blank.jsonl", "--blank=_", "--json")
    assert code == 0 and json.loads(out)["ranked_by"] == "logprob sum"
    code, out, err = ask(
        *CONTINUE, "--eval={folder}/words.jsonl", "--last_word", "--columns=input=text"
    )
    assert code == 0 and "the commonest word" in out and "perplexity" in out, err


def test_answers_are_written_as_they_come_and_scored_without_a_model(ask, folder):
    out = folder / "answers.jsonl"
    code, first, _ = ask(*SENTIMENT, "--eval={folder}/rows.tsv", f"--output={out}", "--json")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    # Rows of similar lengths are answered together.
    assert code == 0 and sorted(line["row"] for line in lines) == [1, 2, 3]
    assert set(lines[0]["choices"][0]) == {"label", "text", "score", "log_prob", "probability"}
    code, again, _ = ask("--task=sentiment", f"--score={out}", "--json")
    assert code == 0 and json.loads(again)["scores"] == json.loads(first)["scores"]
    (folder / "outputs.txt").write_text("positive\nnegative\nnegative\n")
    code, again, _ = ask(
        "--task=sentiment",
        "--labels=0=negative,1=positive",
        "--eval={folder}/rows.tsv",
        "--score={folder}/outputs.txt",
    )
    assert code == 0 and "accuracy       66.67" in again and "answers of" in again


def test_a_row_without_a_common_character_is_scored(ask, folder):
    code, out, err = ask(
        *CONTINUE,
        "--eval={folder}/r.jsonl",
        "--set=max_new_tokens=4",
        "--output={folder}/kept.jsonl",
    )
    assert (
        code == 0 and len((folder / "kept.jsonl").read_text().splitlines()) == 2 and "chrf" in out
    ), err
    code, _, err = ask(*CONTINUE, "--eval={folder}/r.jsonl", "--output={folder}/kept.jsonl")
    assert code == 2 and "exists; name another file, or score it with --score=" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--workdir=RUN", "--task=sumarise"],
            "unknown task 'sumarise'; did you mean 'summarise'?",
        ),
        (["--workdir=RUN"], "--task"),
        (["--task=summarise"], "--workdir is missing"),
        (["--workdir=OTHER", "--task=summarise"], "OTHER holds no checkpoint"),
        (
            ["--workdir=OTHER", "--task=summarise", "--input={folder}/empty.txt"],
            "empty.txt is empty; give a text",
        ),
        (
            ["--workdir=OTHER", "--task=answer", "--passages={folder}/bare"],
            "bare holds no text to retrieve passages from",
        ),
        (
            ["--workdir=OTHER", "--task=sentiment", "--templates={folder}/twice.json"],
            "label 'a' occurs 2 times among 2",
        ),
        (
            ["--workdir=OTHER", "--task=summarise", "--examples={folder}/rows.jsonl"],
            "row 2: no reference under",
        ),
        (
            ["--workdir=OTHER", "--task=summarise", "--eval={folder}/rows.jsonl"],
            "row 2: no reference under 'reference'",
        ),
        (
            ["--workdir=OTHER", "--task=sentiment", "--eval={folder}/rows.tsv"],
            "reference '1' is none of the labels",
        ),
        (
            ["--workdir=OTHER", "--task=sentiment", "--eval=a", "--input=b"],
            "--eval reads its inputs",
        ),
        (
            ["--workdir=OTHER", "--task=sentiment", "--eval=a.tsv", "--columns=input"],
            "--columns=input is not of the form",
        ),
        (
            ["--workdir=OTHER", "--task=sentiment", "--eval=a.tsv", "--labels=0=a,0=b"],
            "--labels names '0' twice",
        ),
        (["--workdir=OTHER", "--task=sentiment", "--shots=2"], "--shots=2 without examples"),
        (
            [
                "--workdir=OTHER",
                *SENTIMENT[1:],
                "--eval={folder}/rows.tsv",
                "--examples={folder}/rows.tsv",
                "--shots=10",
            ],
            "--shots=10, but {folder}/rows.tsv holds 3 rows",
        ),
        (
            ["--workdir=OTHER", "--task=answer", "--eval={folder}/blank.jsonl", "--blank=_"],
            "use --task=continue",
        ),
        (
            ["--workdir=OTHER", "--task=continue", "--blank=_"],
            "--blank=_ is for rows that are scored",
        ),
        (
            ["--workdir=OTHER", "--task=continue", "--last_word"],
            "--last_word scores rows; name their file with --eval",
        ),
        (
            ["--task=sentiment", "--score={folder}/rows.tsv"],
            "answers are read from .jsonl, .ndjson, .json and .txt",
        ),
        (
            ["--task=sentiment", "--score={folder}/rows.jsonl"],
            "answer 2 has no references, only input",
        ),
        (
            ["--task=sentiment", "--score={folder}/yes.jsonl", "--workdir=RUN"],
            "without a model; leave --workdir out",
        ),
        (
            ["--workdir=RUN", "--task=summarise", "--normalise=sum", "--input={folder}/review.txt"],
            "normalise=sum ranks",
        ),
        (
            ["--workdir=OTHER", "--task=answer", "--passages={folder}/damaged"],
            "drop damaged documents with",
        ),
        (
            ["--workdir=RUN", "--task=answer", "--choices=a", "--choices=a"],
            "choice 'a' occurs 2 times among 2",
        ),
        (["--workdir=RUN", "--task=summarise", "--set=num_beam=2"], "did you mean 'num_beams'"),
        (["--workdir=RUN", "--task=summarise", "--preset=best"], "--preset=best ranks texts"),
        (
            ["--workdir=RUN", "--task=summarise", "--set=decode.num_beams=many"],
            "decode.num_beams='many' is not a value of type int",
        ),
        (
            ["--workdir=RUN", "--task=summarise", "--set=model.num_layers=2"],
            "unknown setting 'model.num_layers'; write --set=decode.KEY=VALUE",
        ),
        (["--workdir=RUN", "--task=summarise", "--language=de"], "language='de' has no template"),
        (
            ["--workdir=RUN", "--task=summarise", "--passages={folder}/notes"],
            "task 'summarise' takes no passages",
        ),
        (
            ["--workdir=RUN", "--task=translate", "--input={folder}/long.txt", "--long=cut"],
            "context holds 128; task 'translate' needs",
        ),
        (["--task=sentiment", "--make_pairs=x"], "--make_pairs takes its rows from a file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(ask, folder, arguments, message):
    (folder / "long.txt").write_text("Hello there. " * 99)
    code, out, err = ask(*arguments, stdin=b"Who?")
    assert (code, out) == (2, ""), err
    assert (
        err.startswith("error: ")
        and err.count("\n") == 1
        and message.replace("{folder}", str(folder)) in err
    )
    cli = SCRIPT.parents[1] / "mtnlg_jax/cli"
    paths = [*(cli / "task_modes").glob("*.py"), *(cli / "decoding").glob("*.py")]
    source = "".join(path.read_text() for path in paths)
    known = set(re.findall(r'(?:DEFINE_\w+|define_path)\(\s*"(\w+)"', source))
    named = set(re.findall(r"--(\w+)", err)) | set(re.findall(r"\b(on_error|text_key)\b", err))
    assert named <= known | {"help"}, "an error names a flag that the script does not have"


def run_alone(program, *arguments):
    """Run the script after ``program`` in a process of its own, without JAX and the like."""
    source = f"""
import runpy, sys
sys.argv = ["task.py", *{list(arguments)!r}]
for name in ("jax", "bm25s", "zstandard", "trafilatura", "ftfy", "tensorboardX"):
    sys.modules[name] = None
main = runpy.run_path({str(SCRIPT)!r})["main"]
{program}
from mtnlg_jax import command
command.run(main)
"""
    root = SCRIPT.parents[1]
    return subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )


def test_scoring_needs_neither_jax_nor_the_packages_of_other_paths(folder):
    (folder / "own.jsonl").write_text(
        '{"input": "a", "reference": "positive", "text": "positive"}\n'
    )
    done = run_alone(
        "for name in ('rouge_score', 'sacrebleu'): sys.modules[name] = None",
        "--task=sentiment",
        f"--score={folder}/own.jsonl",
    )
    assert (done.returncode, done.stderr) == (0, "") and "accuracy      100.00" in done.stdout


def test_answers_are_kept_if_the_metrics_fail(folder):
    program = """
import contextlib
from types import SimpleNamespace
from mtnlg_jax.cli.decoding import devices
from mtnlg_jax.cli.task_modes import performing
from mtnlg_jax.tasks import answers
def started(entries, check):
    check()
    return contextlib.nullcontext()
devices.started = started
def perform(task, rows, support, on_answer):
    made = [answers.Answer("b", "b", "en", "stop", (), (), 0, False, False, "a") for _ in rows]
    for index, answer in enumerate(made):
        on_answer(index, answer)
    return SimpleNamespace(step=1), made
def measure(*args):
    raise TypeError("don't know how to coerce float32 and float")
performing.perform = perform
answers.measure = measure
"""
    for output in ((), (f"--output={folder}/failed.jsonl",)):
        done = run_alone(
            program, "--task=translate", f"--eval={folder}/r.jsonl", "--workdir=RUN", *output
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert "error: the metrics failed (TypeError: don't know how to coerce" in done.stderr
        path = re.search(r"the answers so far are in (\S+); --score=\1 scores them", done.stderr)[1]
        assert output in ((), (f"--output={path}",))
        again = run_alone("", "--task=translate", f"--score={path}", "--json")
        assert again.returncode == 0 and json.loads(again.stdout)["rows"] == 2, again.stderr
    assert len(Path(path).read_text().splitlines()) == 2
