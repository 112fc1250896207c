"""The settings of each step, from the starts that a run recorded."""

import json

import pytest

from mtnlg_jax.config import Config, override, to_json
from mtnlg_jax.evaluate.why.run_why import Question, answer
from mtnlg_jax.evaluate.why.settings import Settings


def _write(folder, starts):
    config = Config()
    lines = [{"step": 0, "folder": "/elsewhere", "config": json.loads(to_json(config))}]
    for step, changed in starts:
        before = {
            key: [getattr(config.train, key.split(".")[1]), now] for key, now in changed.items()
        }
        lines.append({"step": step, "folder": str(folder), "changed": before})
        config = override(config, *(f"{key}={now}" for key, now in changed.items()))
    (folder / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(to_json(config))


def test_a_step_has_the_settings_of_the_last_start_that_ran_it(tmp_path):
    _write(
        tmp_path,
        [(10, {"train.global_batch_size": 16}), (30, {"train.seed": 5}), (20, {"train.seed": 7})],
    )
    settings = Settings(str(tmp_path))
    found = {step: settings.at(step).train for step in (9, 10, 19, 20, 30, 40)}
    default = Config().train
    assert found[9].global_batch_size == default.global_batch_size
    assert found[10].global_batch_size == found[40].global_batch_size == 16
    assert found[19].seed == default.seed
    # The start at 20 ran step 30 again.
    assert [found[step].seed for step in (20, 30, 40)] == [7, 7, 7]
    assert [settings.begins(step) for step in (0, 10, 20, 21, 30)] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_torn_line_leaves_the_other_starts(tmp_path):
    _write(tmp_path, [(10, {"train.seed": 5}), (20, {"train.seed": 7})])
    first, *later = (tmp_path / "starts.jsonl").read_bytes().splitlines(keepends=True)
    torn = '{"step": 10, "command": "鲸'.encode()[:-1] + b"\n"
    (tmp_path / "starts.jsonl").write_bytes(b"".join([first, torn, *later]))
    settings = Settings(str(tmp_path))
    assert [settings.at(step).train.seed for step in (0, 10, 20)] == [Config().train.seed, 5, 7]


def test_damaged_starts_leave_the_last_settings(tmp_path):
    _write(tmp_path, [(10, {"train.seed": 5})])
    (tmp_path / "starts.jsonl").write_text('{"step": 0')
    assert Settings(str(tmp_path)).at(3).train.seed == 5


def test_paths_are_found_from_the_folder_of_the_start(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    _write(tmp_path, [(10, {"train.seed": 5})])
    lines = (tmp_path / "starts.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first["config"]["data"]["path"] = "data"
    (tmp_path / "starts.jsonl").write_text(json.dumps(first) + "\n" + lines[1] + "\n")
    assert Settings(str(tmp_path)).at(12).data.path == f"{tmp_path}/data"
    assert Settings(str(tmp_path)).at(3).data.path == "data"  # it is nowhere
    given = Settings(str(tmp_path), ["data.path=/moved", "mesh.data=2"]).at(12)
    assert given.data.path == "/moved" and given.mesh.data == 2


def test_other_settings_and_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run"):
        Settings(str(tmp_path))
    with pytest.raises(ValueError, match="train.seed=3 would make another step"):
        Settings(str(tmp_path), ["train.seed=3"])


def test_a_private_run_is_refused(tmp_path):
    """Its steps are no mean over a batch, and its rows are a sample of their own."""
    config = override(Config(), "optimizer.dp_noise_multiplier=1")
    (tmp_path / "config.json").write_text(to_json(config))
    for step in (None, 5):
        with pytest.raises(ValueError, match="trained with differential privacy: each row is"):
            answer(Question(str(tmp_path), step))
