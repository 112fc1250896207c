"""launch/task.py from end to end: its answers and scores, its pairs, and one line with exit code 2 for bad input."""

import json

import pytest

from mtnlg_jax.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    (folder / "review.txt").write_text("A fine film.\n")
    (folder / "empty.txt").write_text(" \n")
    (folder / "rows.tsv").write_text("a fine film\t1\na dull film\t0\nvery good\t1\n")
    (folder / "rows.jsonl").write_text('{"input": "One two.", "reference": "One."}\n{"input": "Three."}\n')
    (folder / "notes").mkdir()
    (folder / "notes" / "sea.txt").write_text("The sea is grey. The captain hides a parrot. Nobody knows.")
    (folder / "bare").mkdir()
    (folder / "twice.json").write_text('{"en": {"labels": [["a", "x"], ["a", "y"]]}}')
    return folder


@pytest.fixture(scope="module")
def ask(answering, folder):
    """(*arguments, stdin bytes) -> (exit code, standard output, standard error); {folder} is filled in."""
    texts = ["Is each review positive or negative? Review: a fine film Sentiment: dull\n",
             "Answer: Question: Who [1]\n"]
    train_tokenizer(texts * 9, 330).save(folder / "tokenizer")
    answer = answering("task.py", folder / "tokenizer", positions=128, new_tokens=128)
    return lambda *arguments, stdin=b"": answer(*(each.replace("{folder}", str(folder)) for each in arguments),
                                                stdin=stdin)


SENTIMENT = ("--workdir=RUN", "--task=sentiment", "--labels=0=negative,1=positive")


def test_one_answer(ask):
    code, out, err = ask("--workdir=RUN", "--task=sentiment", "--input={folder}/review.txt")
    lines = out.splitlines()
    assert (code, err) == (0, "") and lines[0] in ("positive", "negative")
    assert lines[1].split()[1] == lines[0] and sorted(line.split()[1] for line in lines[1:]) == ["negative", "positive"]
    record = json.loads(ask("--workdir=RUN", "--task=sentiment", "--json", stdin=b"A fine film.")[1])
    assert record["text"] == lines[0] and record["step"] == 7 and record["prompt"].endswith("A fine film.\nSentiment:")
    shown = json.loads(ask(*SENTIMENT, "--json", "--examples={folder}/rows.tsv", "--shots=2", stdin=b"x")[1])
    assert shown["examples"] == 2 and "Review: a fine film\nSentiment: positive\n\nReview: a dull" in shown["prompt"]


def test_an_answer_from_passages(ask):
    asked = ("--workdir=RUN", "--task=answer", "--passages={folder}/notes", "--passage_size=30",
             "--set=max_new_tokens=4")
    code, out, err = ask(*asked, stdin=b"Who hides a parrot?")
    assert (code, err) == (0, "")
    assert "[1] sea.txt, characters 17 to 44: 'The captain hides a parrot.' ..." in out
    record = json.loads(ask(*asked, "--json", stdin=b"Who hides a parrot?")[1])
    assert record["citations"][0]["start"] == 17 and "[1] The captain hides" in record["prompt"]
    chosen = ask("--workdir=RUN", "--task=answer", "--choices=captain", "--choices=cook", stdin=b"Who?")[1]
    assert chosen.splitlines()[0] in ("captain", "cook") and chosen.count("%") == 2
    text = "Once upon"
    went_on = ask("--workdir=RUN", "--task=continue", "--set=max_new_tokens=4", stdin=text.encode())[1]
    assert went_on.startswith(text) and len(went_on) > len(text) + 1


def test_a_set_is_scored_beside_its_baseline(ask):
    code, out, _ = ask(*SENTIMENT, "--eval={folder}/rows.tsv")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("sentiment: 3 rows, checkpoint of step 7, 0 to 0 examples")
    assert lines[1].split() == ["model", "majority", "class"] and lines[2].startswith("accuracy")
    assert " 66.67 [" in lines[2].split("]", 1)[1]
    record = json.loads(ask(*SENTIMENT, "--eval={folder}/rows.tsv", "--json", "--limit=2", "--scorer=pmi")[1])
    assert record["rows"] == 2 and record["baseline_scores"]["accuracy"]["value"] == 50
    assert record["scores"]["accuracy"]["value"] in (0, 50, 100)


def test_pairs_are_written(ask, folder):
    code, out, _ = ask("--task=sentiment", "--labels=0=negative,1=positive", "--input={folder}/rows.tsv",
                       "--make_pairs={folder}/pairs.jsonl")
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert code == 0 and "3 pairs in" in out and "Sentiment:[ positive]" in out
    assert pairs[1] == {"prompt": "Is each review positive or negative?\n\nReview: a dull film\nSentiment:",
                        "answer": " negative"}
    assert ask(*SENTIMENT, "--input={folder}/rows.tsv", "--make_pairs={folder}/same.jsonl")[0] == 0
    assert (folder / "same.jsonl").read_text() == (folder / "pairs.jsonl").read_text()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--workdir=RUN", "--task=sumarise"], "task 'sumarise' is not known; did you mean 'summarise'?"),
    (["--workdir=RUN"], "--task"),
    (["--task=summarise"], "--workdir is missing"),
    (["--workdir=OTHER", "--task=summarise"], "OTHER holds no checkpoint"),
    (["--workdir=OTHER", "--task=summarise", "--input={folder}/empty.txt"], "empty.txt is empty; give a text"),
    (["--workdir=OTHER", "--task=answer", "--passages={folder}/bare"], "bare holds no text to look passages up in"),
    (["--workdir=OTHER", "--task=sentiment", "--templates={folder}/twice.json"], "label 'a' stands 2 times among 2"),
    (["--workdir=OTHER", "--task=summarise", "--examples={folder}/rows.jsonl"], "row 2: no reference under"),
    (["--workdir=OTHER", "--task=summarise", "--eval={folder}/rows.jsonl"], "row 2: no reference under 'reference'"),
    (["--workdir=OTHER", "--task=sentiment", "--eval={folder}/rows.tsv"], "reference '1' is none of the labels"),
    (["--workdir=OTHER", "--task=sentiment", "--eval=a", "--input=b"], "--eval reads its inputs"),
    (["--workdir=OTHER", "--task=sentiment", "--eval=a.tsv", "--columns=input"], "--columns=input is not of the form"),
    (["--workdir=OTHER", "--task=sentiment", "--eval=a.tsv", "--labels=0=a,0=b"], "--labels names '0' twice"),
    (["--workdir=OTHER", "--task=sentiment", "--shots=2"], "--shots=2 without examples"),
    (["--workdir=RUN", "--task=answer", "--choices=a", "--choices=a"], "choice 'a' stands 2 times among 2"),
    (["--workdir=RUN", "--task=summarise", "--set=num_beam=2"], "did you mean 'num_beams'"),
    (["--workdir=RUN", "--task=summarise", "--language=de"], "language='de' has no template"),
    (["--workdir=RUN", "--task=summarise", "--passages={folder}/notes"], "task 'summarise' takes no passages"),
    (["--workdir=RUN", "--task=translate", "--input={folder}/long.txt"], "context holds 128; task 'translate' needs"),
    (["--task=sentiment", "--make_pairs=x"], "--make_pairs takes its rows from a file"),
])
def test_bad_input_is_one_line_and_exit_code_2(ask, folder, arguments, message):
    (folder / "long.txt").write_text("Hello there. " * 99)
    code, out, err = ask(*arguments, stdin=b"Who?")
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
