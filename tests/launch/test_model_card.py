"""launch/model_card.py from end to end: a card of an old run, and its errors."""

import tarfile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

RUN = Path(__file__).resolve().parents[1] / "train/fixtures/old_run.tar.xz"


def unpacked(folder):
    with tarfile.open(RUN) as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


@pytest.fixture
def old(tmp_path):
    return unpacked(tmp_path)


@pytest.fixture(scope="module")
def ask(answering, tmp_path_factory):
    """(*arguments) -> (exit code, standard output, standard error)."""
    run = unpacked(tmp_path_factory.mktemp("model_card"))
    return answering("model_card.py", run / "tokenizer", positions=16, new_tokens=1)


def test_the_script_writes_a_card_that_the_hub_reads(ask, old):
    code, out, err = ask(f"--workdir={old}", "--license=mit")
    assert (code, err) == (0, "")
    assert out.startswith(f"{old}/README.md: ") and "\n  Device-hours\n" in out
    data = ModelCard.load(old / "README.md").data
    assert data.license == "mit" and data.eval_results
    # Again, over its own card.
    assert ask(f"--workdir={old}", "--license=mit") == [code, out, err]


def test_flags_reach_the_card(ask, old):
    path = old / "CARD.md"
    about = old / "about.md"
    about.write_text("## Contact\n\nThe crew.\n")
    given = (f"--about={about}", "--language=en,zh", "--intended_use=Tests.", "--pue=1.25")
    code, out, err = ask(f"--workdir={old}", f"--output={path}", *given)
    assert (code, err) == (0, "") and out.startswith(str(path))
    text = path.read_text()
    assert "## Contact\n\nThe crew." in text and "## Intended use\n\nTests." in text
    assert "| 1.25 |" in text and ModelCard.load(path).data.language == ["en", "zh"]
    assert not (old / "README.md").exists()


def test_a_card_of_somebody_else_is_kept(ask, old):
    (old / "README.md").write_text("mine")
    code, _, err = ask(f"--workdir={old}")
    assert code == 2 and "was not written by launch/model_card.py" in err
    assert (old / "README.md").read_text() == "mine"
    assert ask(f"--workdir={old}", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir={run}/none"], "none does not exist"),
        (["--workdir={run}/checkpoints"], "is not a run folder"),
        (["--workdir={run}", "--output={run}/none/CARD.md"], "create it first"),
        (["--workdir={run}", "--license=Apache License"], "is not an identifier of the Hub"),
        (["--workdir={run}", "--about={run}/none.yaml"], "No such file"),
        (["--workdir={run}", "--pue=0.9"], "--pue=0.9 must be at least 1"),
        (["--workdir={run}", "--pue=nan"], "--pue=nan must be at least 1"),
        (["--workdir={run}", "--watts_per_device=0"], "must be above 0"),
        (["--workdir={run}", "--carbon_kg_per_kwh=-1"], "must be at least 0"),
    ],
)
def test_bad_input_is_one_line(ask, old, arguments, words):
    code, out, err = ask(*(each.replace("{run}", str(old)) for each in arguments))
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
    assert not (old / "README.md").exists()
