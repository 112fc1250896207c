"""launch/task.py on inputs longer than the context, and its errors."""

import json

import pytest

from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.tasks.templates import TASKS

SENTENCES = "The whale swam north. The captain slept in the cabin. The cook was afraid.\n\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    (folder / "long.txt").write_text(SENTENCES * 12)
    (folder / "two.txt").write_text("The whale.\n\n- The cook.\n")
    (folder / "reference.txt").write_text("鲸鱼。\n\n厨师。\n")
    (folder / "terms.tsv").write_text("whale\t鲸鱼\n")
    (folder / "wrong.tsv").write_text("whale\t鲸鱼\ncook\t厨师\nWhale\t大鱼\n")
    (folder / "question.txt").write_text("Where is the captain?")
    (folder / "rows.tsv").write_text(f"{SENTENCES.strip() * 12}\tThe whale.\n".replace("\n\n", " "))
    return folder


@pytest.fixture(scope="module")
def ask(answering, folder):
    texts = [SENTENCES, "鲸鱼船长厨师害怕北睡觉。\n"]
    for task in TASKS.values():
        for template in task.templates.values():
            texts.append(template.instruction + template.prompt + template.passage + "\n")
            texts.append("".join(word for _, word in template.labels) + "\n")
    texts.append("Is each claim supported, contradicted or not said by its text? Claim: By the\n")
    train_tokenizer(texts * 9, 460).save(folder / "tokenizer")
    answer = answering("task.py", folder / "tokenizer", positions=256, new_tokens=8)
    return lambda *arguments: answer(
        "--workdir=RUN",
        "--set=max_new_tokens=4",
        "--set=num_beams=1",
        *(each.replace("{folder}", str(folder)) for each in arguments),
    )


def test_a_document_is_translated_and_compared(ask):
    asked = (
        "--task=translate",
        "--input={folder}/two.txt",
        "--glossary={folder}/terms.tsv",
        "--reference={folder}/reference.txt",
        "--round_trip",
    )
    code, out, err = ask(*asked)
    assert code == 0, err
    assert "\n\n- " in out and "against the reference: 2 aligned paragraphs" in out
    assert "against the source after translation back" in out
    assert "(parts: 2 parts, 4 calls of the model" in err
    work = json.loads(ask(*asked, "--json")[1])["work"]
    assert work["terms"][0]["asked"] == 1 and len(work["comparisons"]) == 2
    assert [each["groups"] for each in work["paragraphs"]] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "printed", "method"),
    [
        (("--task=summarise", "--length=short", "--kind=news"), "", "hierarchical"),
        (("--task=summarise", "--method=refine"), "", "refine"),
        (("--task=sentiment", "--aspects=cook,price"), "price: not mentioned", "parts"),
    ],
)
def test_a_long_text_is_read_by_parts(ask, arguments, printed, method):
    code, out, err = ask(*arguments, "--input={folder}/long.txt")
    assert code == 0 and printed in out and f"({method}: " in err, err
    assert "shortened" not in err


def test_an_answer_is_cited_from_a_document(ask):
    asked = (
        "--task=answer",
        "--input={folder}/question.txt",
        "--document={folder}/long.txt",
        "--cite",
    )
    code, out, err = ask(*asked)
    assert code == 0, err
    assert "[1] document, characters " in out
    assert json.loads(ask(*asked, "--json")[1])["work"]["method"] == "passages"


def test_rows_to_score_are_cut_unless_asked(ask):
    asked = ("--task=summarise", "--eval={folder}/rows.tsv", "--json")
    assert json.loads(ask(*asked)[1])["shortened"] == 1
    assert json.loads(ask(*asked, "--long=parts")[1])["shortened"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task=translate", "--glossary={folder}/wrong.tsv"), "line 1 translates 'whale' as"),
        (("--task=sentiment", "--glossary={folder}/terms.tsv"), "an option of task 'translate'"),
        (("--task=translate", "--long=cut", "--round_trip"), "use mode='parts' (--long=parts)"),
        (("--task=summarise", "--length=many"), "length='many' is neither short, medium, long"),
        (("--task=summarise", "--make_pairs=x", "--length=short"), "leave --length out"),
        (("--task=answer", "--document={folder}/absent.txt"), "absent.txt"),
    ],
)
def test_invalid_flags_end_in_one_line(ask, arguments, message):
    code, out, err = ask(*arguments, "--input={folder}/two.txt")
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
