"""Check what a card says of runs that lack files, and the errors of folders that are not runs."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from mtnlg_jax.evaluate.card.card import build_card
from mtnlg_jax.evaluate.card.run_files import (
    command_without,
    command_without_folders,
    read_run,
    without_folders,
)

OLD = Path(__file__).resolve().parents[2] / "train/fixtures/old_run.tar.xz"


@pytest.fixture
def old(tmp_path):
    """Return the folder of a run of version 0.2.0, which wrote neither starts nor times."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"


def test_a_run_of_an_old_version_has_a_card(old, monkeypatch):
    monkeypatch.chdir(old)
    card = build_card("run", "run")
    facts = card.facts
    assert facts["steps"].value == 4 and facts["tokens"].value == 256
    assert not facts["device_hours"].known and not facts["energy"].known
    # The folder of the data is still there, and its tokens are those of the run.
    assert facts["source_0_train_tokens"].value == 1173
    assert facts["source_0_train_tokens"].file == "folders of the data"
    for words in ("Device-hours: unknown", "Energy: unknown", "does not record its environment"):
        assert words in card.above


def test_counts_of_other_data_are_not_taken(old, monkeypatch):
    monkeypatch.chdir(old)
    path = old / "data/prepared.json"
    info = json.loads(path.read_text())
    info["train"]["sha256"] = "0" * 64
    path.write_text(json.dumps(info))
    card = build_card("run", "run")
    assert "does not record counts of its data" in card.above
    assert not [fact for fact in card.facts if fact.name.startswith("source_0")]


def test_the_device_hours_of_a_run_without_times_are_estimated(run):
    for name in ("metrics.jsonl", "starts.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        for row in rows:
            for key in ("time", "reached"):
                row.pop(key, None)
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = build_card(str(run), str(run))
    facts = card.facts
    tokens = facts["tokens"].value / facts["tokens_per_second"].value
    assert facts["device_hours"].value == pytest.approx(8 * tokens / 3600)
    assert "Device-hours, estimated: " in card.above


def test_a_start_that_wrote_no_record_counts_no_time(run):
    last = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])
    later = last | {"date": "2999-01-01T00:00:00+00:00"}
    with (run / "starts.jsonl").open("a") as file:
        file.write(json.dumps(later) + "\n")
    card = build_card(str(run), str(run))
    assert not card.facts["seconds_3"].known and card.facts["resumes"].value == 2
    assert "Starts without a recorded time or devices are not counted." in card.above


def test_a_damaged_line_is_told(run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    (run / "metrics.jsonl").write_bytes(b"\n".join([lines[0], b'{"kind": "tr', *lines[1:]]))
    card = build_card(str(run), str(run))
    assert "Lines of metrics.jsonl that could not be read and are left out: 2." in card.above
    assert card.facts["steps"].value == 6


@pytest.mark.parametrize("name", ["audit.json", "bias.json", "evaluations/tasks_6.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_damaged_file_of_results_is_refused(run, name, content):
    (run / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} is damaged .*; write it again with launch/"):
        read_run(str(run))


def test_results_without_their_keys_are_tolerated(run, put):
    put(run / "evaluations/tasks_6.json", {"tasks": {"boolq": {"metrics": {"acc": 0.5}}, "x": 3}})
    put(run / "audit.json", {"extraction": None, "canaries": [], "membership": {"auc": None}})
    put(run / "bias.json", {})
    put(run / "evaluations/other.json", {"kind": "longtext", "step": 2, "distinct": {"1": 0.75}})
    card = build_card(str(run), str(run))
    assert "| boolq | unknown | unknown | unknown | acc | 0.5 |  | unknown |" in card.above
    assert "the checkpoint is unknown" in card.above and "| distinct: 1 | 0.75 |" in card.above


def test_a_damaged_checkpoint_is_told(run):
    (run / "checkpoints/6/record.json").write_text("junk\n{}")
    card = build_card(str(run), str(run))
    assert "A checkpoint is damaged" in card.above
    assert card.facts["newest_step"].value == 4


def test_a_run_without_checkpoints_counts_its_records(run):
    shutil.rmtree(run / "checkpoints")
    card = build_card(str(run), str(run))
    assert card.facts["samples"].value == 48
    assert "No checkpoint of the run is kept." in card.above


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda run: shutil.rmtree(run), "does not exist"),
        (lambda run: (run / "config.json").unlink(), "is not a run folder .no config.json."),
        (lambda run: (run / "metrics.jsonl").unlink(), "is not a run folder .no metrics.jsonl."),
        (lambda run: (run / "metrics.jsonl").write_text(""), "has no finished step"),
        (lambda run: (run / "config.json").write_text("{"), "config.json is damaged"),
    ],
)
def test_folders_that_are_not_runs_are_refused(run, make, words):
    make(run)
    with pytest.raises((ValueError, OSError), match=words):
        read_run(str(run))


def test_a_run_elsewhere_is_refused():
    with pytest.raises(ValueError, match="gs://b/run is not on this machine; copy"):
        read_run("gs://b/run")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/data", "data"),
        ("/home/me/data/", "data"),
        ("/data", "data"),
        ("data/web", "data/web"),
        ("gs://bucket/a/b", "gs://bucket/a/b"),
        ("org/model", "org/model"),
    ],
)
def test_absolute_paths_show_their_last_name(text, shown):
    assert without_folders(text) == shown


def test_a_command_hides_the_values_of_settings():
    command = "python p.py --set=train.seed=7 --set train.seed=8 --set=train.steps=9"
    hidden = {"train.seed", "optimizer.dp_secret"}
    assert command_without(command, hidden) == (
        "python p.py --set=train.seed=... --set train.seed=... --set=train.steps=9"
    )
    assert command_without(command, {"optimizer.dp_secret"}) == command


def test_a_command_shows_the_last_names_of_paths():
    command = (
        "/home/me/.venv/bin/python launch/pretrain.py --workdir=/r/x '--set=data.path=/a b/c d' "
        "--set=data.blend='((\"/p/q\", 1.0),)' --config=~/c.py --init=gs://b/run"
    )
    assert command_without_folders(command) == (
        "python launch/pretrain.py --workdir=x '--set=data.path=c d' "
        "'--set=data.blend=((\"q\", 1.0),)' --config=c.py --init=gs://b/run"
    )
