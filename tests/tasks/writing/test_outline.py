"""Check the reading of outlines, and the outlines that a model writes."""

import dataclasses
import json

import pytest

from mtnlg_jax.tasks.writing.outline import read_outline, sections_for, write_outline
from mtnlg_jax.tasks.writing.request import Request, composer_of
from mtnlg_jax.tasks.writing.scores import Scorer


@pytest.mark.parametrize(
    ("name", "text", "headings"),
    [
        ("o.txt", "The sea\n\nThe  storm \n", ["The sea", "The storm"]),
        ("o.md", "# Title\n\n## The sea\n## The storm\n", ["The sea", "The storm"]),
        ("o.md", "# The sea\n# The storm\n", ["The sea", "The storm"]),
        (
            "o.md",
            "1. The sea\n2) The storm\n- 1815 began\n",
            ["The sea", "The storm", "1815 began"],
        ),
        ("o.txt", "\ufeff一、大海\n二、风暴\n第三天\n", ["大海", "风暴", "第三天"]),
        ("o.txt", "3.5 miles\n", ["3.5 miles"]),
        ("o.json", '["The sea", "The storm"]', ["The sea", "The storm"]),
        ("o.json", '{"sections": [{"heading": "The sea"}]}', ["The sea"]),
        ("o.json", '{"headings": ["大海"]}', ["大海"]),
    ],
)
def test_an_outline_is_read(tmp_path, name, text, headings):
    (tmp_path / name).write_text(text)
    assert list(read_outline(str(tmp_path / name))) == headings


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("o.md", "## The sea\n\n##\n", "line 3: the section '##' is empty"),
        ("o.txt", "1. The sea\n2.\n3. The end\n", "line 2: the section '2.' is empty"),
        ("o.txt", "The sea\n---\n", "line 2"),
        ("o.txt", " \n\n", "no headings"),
        ("o.json", '["The sea", " "]', "section 2 is empty"),
        ("o.json", '[{"heading": "a"}, {}]', "section 2 is empty"),
        ("o.json", '{"a": 1}', "no list of headings"),
        ("o.json", "[", "not valid JSON"),
    ],
)
def test_a_bad_outline_is_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="o\\.") as caught:
        read_outline(str(tmp_path / name))
    assert words in str(caught.value)


def test_an_outline_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "o.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8 at byte 0"):
        read_outline(str(tmp_path / "o.txt"))
    with pytest.raises(FileNotFoundError):
        read_outline(str(tmp_path / "none.txt"))


def test_the_number_of_sections_follows_the_words():
    assert [sections_for(words) for words in (1, 250, 2000, 99999)] == [1, 1, 8, 12]


def test_the_best_of_several_outlines_is_kept(model):
    request = Request("story", "the whale and Anna", 500, "en", candidates=2)
    composer = composer_of(request, model.tokenizer, model.decoder.context)
    scorer = Scorer(*model, request.weights)
    found = write_outline(model.decoder, composer, scorer, 4, 2, request.decode)
    texts = [each["text"] for each in found["candidates"]]
    assert len(set(texts)) == 2 and all(len(text.split("\n")) == 4 for text in texts)
    scores = [each["score"] for each in found["candidates"]]
    assert found["chosen"] == scores.index(max(scores))
    assert found["headings"] == texts[found["chosen"]].split("\n") and found["calls"] == 4
    assert set(found["candidates"][0]["parts"]) == {"logprob", "outline", "repetition", "span"}
    json.dumps(found)
    again = write_outline(
        model.decoder,
        composer,
        scorer,
        4,
        2,
        dataclasses.replace(request.decode, seed=1),
    )
    assert again["headings"] != found["headings"]
