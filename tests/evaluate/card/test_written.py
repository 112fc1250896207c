"""Check that a card replaces only a card of its own, and keeps the authors' notes."""

import pytest
from huggingface_hub import ModelCard

from mtnlg_jax.evaluate.card.card import build_card
from mtnlg_jax.evaluate.card.written import check_output, write_card

NOTE = "The authors have added no notes."


@pytest.fixture
def card(run):
    return build_card(str(run), str(run))


@pytest.fixture
def path(card, tmp_path):
    path = tmp_path / "CARD.md"
    write_card(card, str(path))
    return path


def test_a_rewrite_changes_nothing(card, path):
    before = path.read_bytes()
    check_output(str(path), overwrite=False)
    write_card(card, str(path))
    assert path.read_bytes() == before


def test_the_notes_are_kept(card, path):
    path.write_text(path.read_text().replace(NOTE, "Ask 3 whales.\n\n- first"))
    check_output(str(path), overwrite=False)
    text = write_card(card, str(path))
    assert "Ask 3 whales.\n\n- first" in text and path.read_text() == text
    assert ModelCard.load(path).data.model_name == "quickstart"


def test_edits_elsewhere_are_not_lost(card, path):
    edited = path.read_text().replace("## Bias", "## Bias and fairness").replace(NOTE, "Mine.")
    path.write_text(edited)
    with pytest.raises(FileExistsError, match="edited outside the authors' notes; .*--overwrite"):
        check_output(str(path), overwrite=False)
    check_output(str(path), overwrite=True)
    assert "fairness" not in write_card(card, str(path)) and "Mine." in path.read_text()


def test_a_file_of_somebody_else_is_refused(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# mine\n")
    with pytest.raises(FileExistsError, match="was not written by launch/model_card.py"):
        check_output(str(path), overwrite=False)
    check_output(str(path), overwrite=True)


def test_places_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder that does not exist; create it first"):
        check_output(str(tmp_path / "none/CARD.md"), overwrite=False)
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        check_output(str(tmp_path), overwrite=False)
