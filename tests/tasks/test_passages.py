"""Check that retrieval finds a planted passage and reports its exact range."""

import numpy as np
import pytest

from mtnlg_jax.data.read.documents import Document
from mtnlg_jax.tasks.passages import Retriever, read_passages, split


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    filler = "The ship sailed on. Nobody spoke of it. The sea was grey. " * 8
    (folder / "log").mkdir()
    (folder / "log" / "may.txt").write_text(
        f"{filler}\r\n\r\nThe captain keeps his parrot in the galley. {filler}", newline=""
    )
    (folder / "zh.md").write_text(
        "海是灰色的。" * 20 + "船长把鹦鹉养在厨房里。" + "没有人说话。" * 20
    )
    (folder / "rows.jsonl").write_text(
        '{"text": "Nothing here."}\n{"text": "The cook has one wooden leg."}\n'
    )
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    return folder


@pytest.mark.parametrize(
    ("question", "source", "words"),
    [
        ("Where is the parrot?", "log/may.txt", "The captain keeps his parrot in the galley."),
        ("鹦鹉在哪里？", "zh.md", "船长把鹦鹉养在厨房里。"),
        ("Which leg is WOODEN", "rows.jsonl:2", "The cook has one wooden leg."),
    ],
)
def test_a_planted_passage_is_found_with_its_range(folder, question, source, words):
    best = read_passages(folder, size=120).best(question, 2)
    assert best[0].source == source and words in best[0].text and len(best[0].text) <= 120
    assert best[0].score > 0 and all(best[0].score >= each.score for each in best)
    if source.endswith(("txt", "md")):
        whole = (folder / source).read_text()  # with universal line ends, as the readers have it
        assert whole[best[0].start : best[0].end] == best[0].text


def test_best_passages_come_first_and_at_most_count():
    retriever = Retriever(
        [Document("same words here", "a"), Document("same words here", "b"), Document("other", "c")]
    )
    assert [each.source for each in retriever.best("same words", 5)] == ["a", "b"]
    assert len(retriever.best("same words", 1)) == 1
    assert retriever.best("unknown", 3) == [] and retriever.best("?!", 3) == []


def test_splitting_keeps_all_text_except_white_space():
    rng = np.random.default_rng(1)
    for _ in range(200):
        text = "".join(
            rng.choice(["word", "好", " ", ". ", "。", "\n\n", "x" * 30], rng.integers(1, 60))
        )
        size = int(rng.integers(1, 50))
        passages = split(Document(text, "a"), size)
        assert all(
            each.text == text[each.start : each.end] and each.text == each.text.strip()
            for each in passages
        )
        assert all(1 <= len(each.text) <= size for each in passages)
        assert "".join("".join(each.text for each in passages).split()) == "".join(text.split())


def test_a_source_without_text_raises_an_error(folder, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no text .*put any of .txt"):
        read_passages(tmp_path)
    (tmp_path / "a.txt").write_text("?! ...")
    with pytest.raises(
        ValueError, match="no text to retrieve passages from; give documents with words"
    ):
        read_passages(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_passages("nowhere")
    with pytest.raises(ValueError, match="size=0"):
        read_passages(folder, size=0)
