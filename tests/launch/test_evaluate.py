"""launch/evaluate.py from end to end: its report on one text, on many, and its errors."""

import gzip
import json
import re
from pathlib import Path

import pytest

from mtnlg_jax.data.tokenizer import train_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "evaluate.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "a.txt").write_text("the whale swam north again\n")
    (folder / "rows.jsonl").write_text('{"body": "the whale"}\n{"body": "swam north"}\n')
    (folder / "cut.jsonl").write_text('{"text": "the whale"}\n{"text": "cut sh')
    (folder / "empty.txt").write_text(" \n")
    (folder / "many").mkdir()
    (folder / "many" / "a.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "the whale"}\n{"text": " "}\n')
    )
    (folder / "many" / "b.txt").write_bytes(b"swam \xff north again and again")
    (folder / "many" / "photo.jpg").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def ask(answering, folder):
    train_tokenizer(["the whale swam north again\n"] * 9, 300).save(folder / "tokenizer")
    answer = answering("evaluate.py", folder / "tokenizer", positions=64, new_tokens=8)
    return lambda *arguments, stdin=b"": answer(
        *(each.replace("{folder}", str(folder)) for each in arguments), stdin=stdin
    )


def test_a_text_and_its_figures(ask):
    code, out, err = ask("--workdir=RUN", "--input={folder}/a.txt")
    assert (code, err) == (0, "") and "1 document(s), 27 bytes" in out
    assert "word perplexity" in out and "of 5 words" in out
    record = json.loads(
        ask("--workdir=RUN", "--input={folder}/a.txt", "--json", "--dtype=bfloat16")[1]
    )
    assert (
        record["words"] == 5
        and record["left_out"] == {}
        and record["rounded"]["dtype"] == "bfloat16"
    )
    marked = b"\xef\xbb\xbfthe whale swam north again\n"
    typed = json.loads(ask("--workdir=RUN", "--input=-", "--json", stdin=marked)[1])
    assert typed["loss"] == pytest.approx(record["loss"], rel=1e-6), (
        "a byte order mark is not part of the text"
    )


def test_a_model_that_does_not_fit_is_refused(ask):
    arguments = ["--workdir=RUN", "--input={folder}/a.txt"]
    code, out, err = ask(*arguments, "--memory=0.00001")
    assert (code, out) == (2, "") and "RUN does not fit" in err and "--weights" not in err
    # A second form, or the copies that a text changes, are held beside it.
    for more in ("--weights=int8", "--adapt=1e-3"):
        assert "RUN does not fit" in ask(*arguments, "--memory=0.00004", more)[2]
    assert ask(*arguments, "--memory=0.00004")[0] == 0


def test_keys_are_named_and_what_is_left_out_is_counted(ask):
    record = json.loads(
        ask("--workdir=RUN", "--input={folder}/rows.jsonl", "--text_key=text|body", "--json")[1]
    )
    assert record["documents"] == 2 and record["bytes"] == 19
    record = json.loads(
        ask("--workdir=RUN", "--input={folder}/cut.jsonl", "--on_error=skip", "--json")[1]
    )
    assert record["documents"] == 1 and record["left_out"]["damaged"] == 1
    assert ask("--workdir=RUN", "--input={folder}/many")[0] == 2
    code, out, err = ask("--workdir=RUN", "--input={folder}/many", "--on_error=skip")
    assert code == 0 and "2 document(s)" in out
    for reported in ("1 skipped_files", "1 empty", "1 repaired"):
        assert reported in err


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--input={folder}/rows.jsonl"], b"", "no 'text' among body; name the right one with"),
        (["--input={folder}/cut.jsonl"], b"", "drop damaged documents with"),
        (
            ["--input={folder}/empty.txt"],
            b"",
            "contains no text; give a file or a folder with text",
        ),
        (["--input=-"], b" \n", "standard input contains no text"),
        (["--input=-"], b"\xff\xfa", "standard input: line 1: byte 0xff at 0 is not UTF-8"),
        (["--input={folder}/a.txt", "--stride=65"], b"", "stride=65 is outside [1, 64]"),
        (["--input={folder}/a.txt", "--adapt=-1"], b"", "adapt=-1"),
        (
            ["--input={folder}/a.txt", "--adapt=1e-3", "--cache=int8"],
            b"",
            "--cache=int8 rounds them; leave one",
        ),
    ],
)
def test_bad_input_is_one_line_and_names_only_flags_that_exist(ask, arguments, stdin, message):
    code, out, err = ask("--workdir=RUN", *arguments, stdin=stdin)
    assert (
        (code, out) == (2, "")
        and err.startswith("error: ")
        and err.count("\n") == 1
        and message in err
    )
    source = (SCRIPT.parents[1] / "mtnlg_jax/cli/evaluation/score.py").read_text()
    known = set(re.findall(r'(?:DEFINE_\w+|define_path)\(\s*"(\w+)"', source))
    assert (
        set(re.findall(r"--(\w+)", err)) | set(re.findall(r"\b(on_error|text_key)\b", err)) <= known
    )


STORY = "the whale swam north again. the whale saw the cold sea. north again swam the whale. "


def test_long_texts_have_a_table_plots_and_an_object(ask, folder):
    (folder / "story.txt").write_text(STORY * 12)
    (folder / "rest.txt").write_text(STORY * 60)
    arguments = ["--workdir=RUN", "--input={folder}/story.txt", "--longtext", "--sentences=4"]
    code, out, err = ask(*arguments, "--references={folder}/rest.txt", "--plots={folder}/plots")
    assert code == 0 and "zipf.png, repetition.png, loss_by_position.png" in err
    lines = out.splitlines()
    assert "1 text(s), 192 words, " in lines[0] and lines[0].endswith(" (checkpoint of step 7)")
    assert "repeated 4-grams (seq-rep-4)" in out and "references" in lines[1]
    assert "self-BLEU of the texts, texts: absent, compares texts with each other" in out
    assert {each.name for each in (folder / "plots").iterdir()} >= {"zipf.png", "repetition.png"}
    record = json.loads(ask(*arguments, "--json")[1])
    assert record["references"] is record["needles"] is None
    assert record["texts"]["figures"]["seq_rep_4"]["value"] > 0.9
    assert record["texts"]["figures"]["context_gain"]["value"] is None, "its sentences are three"


def test_flags_of_long_texts_that_have_no_effect_are_refused(ask):
    arguments = ["--workdir=RUN", "--input={folder}/a.txt"]
    for more, message in (
        (["--plots=x"], "--plots=x has no effect without --longtext"),
        (["--needle"], "--needle=True has no effect without --longtext"),
        (["--longtext", "--stride=3"], "--stride=3 is of the score, which --longtext"),
        (["--longtext", "--cache=int8"], "--cache=int8 is of the score"),
        (["--longtext", "--needle_trials=2"], "--needle_trials=2 has no effect without --needle"),
        (["--longtext", "--needle", "--needle_lengths=a"], "is not a list of numbers"),
        (["--longtext", "--plots={folder}/a.txt"], "a.txt is a file; give a folder"),
        (["--longtext", "--needle", "--needle_lengths="], "= is not a list of numbers"),
        (["--longtext", "--seed=4294967296"], "--seed"),
        (["--longtext", "--needle"], "does not fit: the prompt without filler has"),
        (["--longtext", "--references={folder}/empty.txt"], "contains no text"),
    ):
        code, out, err = ask(*arguments, *more)
        assert (code, out) == (2, "") and message in err, more


def test_lengths_of_pass_keys_are_checked_before_anything_is_measured(ask):
    # Texts without words are an error of measuring.
    code, _, err = ask(
        *("--workdir=RUN", "--input=-", "--longtext", "--needle", "--needle_lengths=5"),
        stdin=b"***",
    )
    assert code == 2 and "length=5 does not fit: the prompt without filler has" in err
