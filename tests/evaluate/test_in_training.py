"""Check scores of tasks during training: equal to those of the saved checkpoint, on every mesh and
after a resume, and errors before any work."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    StageConfig,
    TrainConfig,
    validate,
)
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.evaluate.in_training import RESAMPLES, RunTasks, TaskScorer
from mtnlg_jax.evaluate.why.states import kept_steps
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import loop
from mtnlg_jax.train.checkpoint import load_run
from mtnlg_jax.train.curve import text_curve
from mtnlg_jax.train.metrics import read_metrics

pytest.importorskip("lm_eval")
ROOT = Path(__file__).resolve().parents[2]
WORDS = "the whale sang over a grey sea and boats came home before dark".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of a prepared text and the folder of the rows of three tasks."""
    root = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)

    def words(count):
        return " ".join(rng.choice(WORDS, count))

    (root / "text.txt").write_text("\n".join(words(60) + "." for _ in range(60)))
    prepare(root / "text.txt", root / "data", vocab_size=300, heldout=0.1, progress=False)
    rows = {
        "lambada_openai_test": [{"text": words(12)} for _ in range(9)],
        "piqa_valid": [
            {"goal": words(4), "sol1": words(3), "sol2": words(5), "label": n % 2} for n in range(9)
        ],
        "boolq_dev": [
            {"passage": words(9), "question": words(4), "answer": n % 3 == 0, "label": n % 3 == 0}
            for n in range(9)
        ],
    }
    (root / "rows").mkdir()
    for name, made in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in made)
        (root / "rows" / f"{name}.jsonl").write_text(lines)
    return str(root / "data"), str(root / "rows")


def config_of(folders, mesh=None, **train):
    data, rows = folders
    settings = {
        "steps": 4,
        "global_batch_size": 8,
        "eval_every": 0,
        "eval_batches": 1,
        "save_every": 2,
        "compute_dtype": "float32",
        "eval_tasks": ("lambada_openai", "piqa", "boolq"),
        "eval_tasks_every": 2,
        "eval_tasks_rows": 8,
        "eval_tasks_data": rows,
    }
    config = Config(
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=128
        ),
        mesh=mesh or MeshConfig(data=8),
        data=DataConfig(path=data, sequence_length=32),
        train=TrainConfig(**settings | train),
    )
    validate(config)
    return config


def scores_in(workdir):
    records = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    return {
        record["step"]: {name: value for name, value in record.items() if "/" in name}
        for record in records
        if record["kind"] == "tasks"
    }


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("run"))
    config = config_of(folders)
    return loop.train(config, workdir, False, tasks=RunTasks(config))


@pytest.fixture(scope="module")
def of_checkpoint(folders, trained):
    """Return the results of the tasks on the last checkpoint, on one device."""
    from mtnlg_jax.evaluate.harness import MtnlgLM
    from mtnlg_jax.evaluate.harness_tasks.run import run_tasks

    run, decoder = load_decoder(trained.workdir, "last")
    lm = MtnlgLM.of(decoder, run.tokenizer)
    train = config_of(folders).train
    options = {"task_data": train.eval_tasks_data, "limit": 8, "bootstraps": RESAMPLES}
    found = run_tasks(lm, train.eval_tasks, **options)["tasks"]
    values = {}
    for name, entry in found.items():
        values[f"{name}/rows"] = entry["rows"]
        for metric, result in entry["metrics"].items():
            values[f"{name}/{metric}"] = result["value"]
            values[f"{name}/{metric}_stderr"] = result["stderr"]
    values["boolq/balanced_accuracy"] = found["boolq"]["balanced_accuracy"]
    return values


def test_scores_equal_those_of_the_checkpoint_of_the_step(trained, of_checkpoint):
    scores = scores_in(trained.workdir)
    assert list(scores) == [2, 4]
    assert scores[4] == pytest.approx(of_checkpoint, rel=1e-4)
    assert scores[4]["lambada_openai/perplexity"] < scores[2]["lambada_openai/perplexity"]
    assert {"piqa/acc", "piqa/acc_norm", "piqa/acc_stderr"} <= set(scores[4])
    assert trained.tasks["step"] == 4 and 0 < trained.tasks_cost[1] < 1
    assert "tasks at step 4: lambada_openai perplexity" in trained.scored
    assert "of this start" in trained.scored


def test_scores_are_in_the_plots_and_in_tensorboard(trained):
    curve = text_curve(os.path.join(trained.workdir, "metrics.jsonl"))
    assert "piqa acc" in curve and "boolq acc" in curve
    board = Path(trained.workdir) / "tensorboard"
    written = b"".join(path.read_bytes() for path in board.iterdir())
    assert b"tasks/piqa/acc" in written and b"tasks/seconds" in written


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, tensor=4), MeshConfig(data=8, zero=3)])
def test_scores_are_equal_on_other_meshes(folders, trained, of_checkpoint, mesh):
    config = config_of(folders, mesh)
    here = make_mesh(mesh)
    run = load_run(trained.workdir, "last", here, mesh.zero, vocab_padding=0)
    config = dataclasses.replace(config, model=run.config.model)
    score = RunTasks(config).start(config, here, run.tokenizer)
    assert score(run.params) == pytest.approx(of_checkpoint, rel=1e-4)


def test_prompts_are_formed_and_programs_compiled_once(folders, trained, monkeypatch):
    from mtnlg_jax.decode import group_scoring
    from mtnlg_jax.evaluate.harness_tasks.task import LocalTask

    formed = []
    real = LocalTask.fewshot_context

    def counted(self, doc, *given, **options):
        formed.append(doc)
        return real(self, doc, *given, **options)

    monkeypatch.setattr(LocalTask, "fewshot_context", counted)
    config = config_of(folders, MeshConfig(data=1))
    here = make_mesh(config.mesh, jax.devices()[:1])
    run = load_run(trained.workdir, "last", here)
    config = dataclasses.replace(config, model=run.config.model)
    score = RunTasks(config).start(config, here, run.tokenizer)
    first = score(run.params)
    programs = group_scoring._score._cache_size()
    other = jax.tree.map(lambda x: 1.5 * x, run.params)
    second = score(other)
    assert second["lambada_openai/perplexity"] != first["lambada_openai/perplexity"]
    assert score(run.params) == first
    assert group_scoring._score._cache_size() == programs
    assert len(formed) == 3 * 8
    # The decoder is not kept.
    assert score._lm.decoder.params == ()


def test_a_resumed_run_writes_the_same_scores(folders, trained, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def failing(self, params):
        raise Stop

    config = config_of(folders)
    monkeypatch.setattr(TaskScorer, "__call__", failing)
    with pytest.raises(Stop):
        loop.train(config, str(tmp_path), False, tasks=RunTasks(config))
    monkeypatch.undo()
    # The state was saved and not scored, as after a signal.
    assert kept_steps(str(tmp_path)) == [2] and not scores_in(tmp_path)
    loop.train(config, str(tmp_path), False, tasks=RunTasks(config))
    assert scores_in(tmp_path) == scores_in(trained.workdir)


@pytest.mark.slow
def test_two_processes_write_the_scores_of_one(folders, trained, tmp_path):
    config = config_of(folders)
    settings = {
        "data.path": config.data.path,
        "data.sequence_length": config.sequence_length,
        "model.hidden_size": 32,
        "model.max_position_embeddings": 128,
        "optimizer.learning_rate": config.optimizer.learning_rate,
        "optimizer.warmup_fraction": config.optimizer.warmup_fraction,
        **{
            f"train.{name}": getattr(config.train, name)
            for name in ("steps", "eval_every", "eval_batches", "save_every", "eval_tasks")
        },
        "train.eval_tasks_every": 2,
        "train.eval_tasks_rows": 8,
        "train.eval_tasks_data": config.train.eval_tasks_data,
    }
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "launch/cluster/launch.py"),
            *("--cluster=local", "--nodes=2", "--local_devices=4"),
            f"--config={ROOT / 'configs/tiny.py'}",
            f"--workdir={tmp_path}",
            *(f"--set={key}={value}" for key, value in settings.items()),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tasks at step 4") == 1
    there = scores_in(tmp_path)
    for step, here in scores_in(trained.workdir).items():
        assert there[step] == pytest.approx(here, rel=1e-4)


# --- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # The names of all tasks of the harness take seconds to read.
        pytest.param(
            {"eval_tasks": ("piqaa",)},
            "train.eval_tasks=piqaa is not a task.*did you mean piqa",
            marks=pytest.mark.slow,
        ),
        ({"eval_tasks_data": "/nowhere"}, "/nowhere"),
        ({"eval_tasks": ("wic",)}, "train.eval_tasks_data=.*no file for the task wic"),
        ({"eval_tasks_data": ""}, "train.eval_tasks_data=FOLDER"),
        ({"eval_tasks_fewshot": 9}, "train.eval_tasks_fewshot=9 needs 10 rows of the task"),
    ],
)
def test_bad_tasks_raise_before_any_work(folders, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        RunTasks(config_of(folders, **settings))


def test_a_folder_without_rows_raises(folders, tmp_path):
    (tmp_path / "piqa_valid.jsonl").write_text("\n")
    config = config_of(folders, eval_tasks=("piqa",), eval_tasks_data=str(tmp_path))
    with pytest.raises(ValueError, match="piqa_valid.jsonl has no rows"):
        RunTasks(config)


def test_a_choice_longer_than_the_context_raises_before_the_first_step(folders, tmp_path):
    row = {"goal": "a", "sol1": "whale " * 300, "sol2": "b", "label": 0}
    (tmp_path / "piqa_valid.jsonl").write_text(json.dumps(row) + "\n")
    config = config_of(folders, eval_tasks=("piqa",), eval_tasks_data=str(tmp_path))
    with pytest.raises(ValueError, match="row 1: choice 1 of the task piqa has .* context of 128"):
        loop.train(config, str(tmp_path / "run"), False, tasks=RunTasks(config))
    assert not os.path.exists(tmp_path / "run" / "checkpoints")


def test_the_extra_is_named_where_the_harness_is_missing(folders, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name)
    )
    with pytest.raises(ValueError, match=r"pip install 'mtnlg_jax\[eval\]'"):
        RunTasks(config_of(folders))


def test_train_without_what_scores_says_what_to_pass(folders, tmp_path):
    with pytest.raises(ValueError, match=r"in_training.RunTasks\(config\)"):
        loop.train(config_of(folders), str(tmp_path / "run"), False)
    assert not os.path.exists(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": (StageConfig(masked=1.0),)}, "no stage of this run learns to continue"),
        ({"eval_tasks": ("piqa", "piqa")}, "names a task twice"),
        ({"eval_tasks": ()}, "train.eval_tasks_every=2 is for tasks"),
        ({"eval_tasks_rows": 0}, "train.eval_tasks_rows=0 is outside"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folders, settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(folders, **settings)
