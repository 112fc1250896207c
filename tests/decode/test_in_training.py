"""Watch a whole run: samples on several devices, trackers, profiler, goodput and the page."""

import dataclasses
import os
import signal
import sys

import jax
import pytest

from mtnlg_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.in_training import RunSamples
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.train import goodput, loop
from mtnlg_jax.train.course import Course
from mtnlg_jax.train.metrics import read_metrics
from mtnlg_jax.train.report import files

PROMPTS = ("the whale swam", "nobody")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    text = "the whale swam north while the old captain slept and nobody dared to wake him.\n" * 300
    (folder / "book.txt").write_text(text)
    prepare(folder / "book.txt", folder / "data", vocab_size=290, heldout=0.1, progress=False)
    return str(folder / "data")


def config_of(prepared, mesh=None, **train):
    settings = {
        "steps": 4,
        "global_batch_size": 8,
        "eval_every": 0,
        "eval_batches": 1,
        "save_every": 2,
        "compute_dtype": "float32",
        "sample_prompts": PROMPTS,
        "sample_every": 2,
        "sample_tokens": 8,
        "profile_steps": (2, 2),
    }
    return Config(
        model=ModelConfig(
            num_layers=1, hidden_size=32, num_attention_heads=4, max_position_embeddings=32
        ),
        mesh=mesh or MeshConfig(data=1),
        data=DataConfig(path=prepared),
        # A rate that does not follow the length of a run, which is made longer.
        optimizer=OptimizerConfig(warmup_fraction=0.0, lr_decay_style="constant"),
        train=TrainConfig(**settings | train),
    )


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Give runs one device unless their config asks for more, because that compiles faster."""
    make = loop.make_mesh

    def made(mesh):
        return make(mesh, jax.devices()[:1] if mesh == MeshConfig(data=1) else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", made)
        yield


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """Return the folder of a run that was started again after its end, to lengthen it."""
    workdir = str(tmp_path_factory.mktemp("run"))
    none = {"sample_prompts": (), "sample_every": 200, "sample_tokens": 48}
    first = loop.train(config_of(prepared, steps=2, **none), workdir, False)
    assert first.time.startswith("time of this start") and "since" not in first.time
    config = config_of(prepared)

    def refuse(path):
        raise AssertionError("the records are in memory, and may be many")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "read_metrics", refuse)
        second = loop.train(config, workdir, False, samples=RunSamples(config))
    assert "since the first start" in second.time
    return workdir


def records_of(run, kind):
    records = read_metrics(os.path.join(run, "metrics.jsonl"))
    return [record for record in records if record["kind"] == kind]


def assert_samples_of_checkpoint(run, record):
    saved, decoder = load_decoder(run, "last")
    decode = DecodeConfig(max_new_tokens=8)
    expected = generate(decoder, saved.tokenizer, PROMPTS, decode)
    assert [each["prompt"] for each in record["texts"]] == list(PROMPTS)
    assert [each["text"] for each in record["texts"]] == [each.text for each in expected]
    assert all(each["text"] for each in record["texts"])


def test_samples_are_those_of_the_checkpoint(run):
    # Those of step 2 are of the second start, which made up for them, as after a signal.
    caught_up, found = records_of(run, "samples")
    assert (caught_up["step"], found["step"]) == (2, 4)
    assert_samples_of_checkpoint(run, found)


@pytest.mark.slow  # tests/decode/test_from_training.py compares the decoders on these meshes
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, tensor=4), MeshConfig(data=8, zero=3)])
def test_samples_on_a_mesh_are_those_of_one_device(prepared, tmp_path, mesh):
    config = config_of(prepared, mesh, profile_steps=None)
    loop.train(config, str(tmp_path), False, samples=RunSamples(config))
    found = records_of(str(tmp_path), "samples")
    assert [record["step"] for record in found] == [2, 4]
    assert_samples_of_checkpoint(str(tmp_path), found[-1])


def test_goodput_adds_up_over_both_starts(run):
    last = {record["start"]: record for record in records_of(run, "goodput")}
    assert sorted(last) == [0, 1]
    for record in last.values():
        assert sum(record[name] for name in goodput.CLASSES) == pytest.approx(1, abs=1e-4)
        assert record["compile"] > 0 and record["steps"] > 0 and record["evaluation"] > 0
    everything = {name: last[1][f"run_{name}"] for name in (*goodput.CLASSES, "down")}
    assert sum(everything.values()) == pytest.approx(1, abs=1e-4)
    assert last[1]["restore"] > 0 and everything["lost"] == pytest.approx(0, abs=0.02)
    assert last[1]["run_seconds"] >= last[0]["seconds"] + last[1]["seconds"] - 0.1


def test_the_profiler_and_the_page_leave_their_files(run):
    (folder,) = os.listdir(os.path.join(run, "profile"))
    assert folder == "step_000002_process_0"
    traces = [name for _, _, names in os.walk(os.path.join(run, "profile")) for name in names]
    assert any(name.endswith(".xplane.pb") for name in traces)
    with open(os.path.join(run, "report.html"), encoding="utf-8") as file:
        page = file.read()
    assert "the whale swam" in page and "start 2" in page


def test_a_window_holds_no_save_and_ends_with_a_run_that_fails(prepared, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: done.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: done.append("stop"))
    real = loop.batch_at

    def batch_at(config, mesh, data, step, samples):
        if step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)  # a window of the next five steps
        if step == 2:
            raise ValueError("no more data")
        return real(config, mesh, data, step, samples)

    monkeypatch.setattr(loop, "batch_at", batch_at)
    monkeypatch.setattr(Course, "_evaluate_and_save", lambda *_: done.append("save"))
    none = {"sample_prompts": (), "sample_every": 200, "sample_tokens": 48}
    config = config_of(prepared, profile_steps=(1, 1), profile_signal="SIGUSR1", **none)
    with pytest.raises(ValueError, match="no more data"):
        loop.train(config, str(tmp_path), False)
    assert done == ["start", "stop", "save", "start", "save", "stop"]


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        ({"sample_prompts": ("one two " * 40,)}, True, "tokens, and the model reads 32, of which"),
        ({}, False, "needs what continues them: from Python call train"),
        ({"sample_prompts": ("",)}, True, "has an empty text"),
        ({"sample_tokens": 32}, True, "leaves no room for a prompt in the 32 tokens"),
        ({"sample_prompts": ()}, True, "sample_every=2 is for samples"),
        ({"trackers": ("wandb",)}, True, 'pip install "mtnlg_jax\\[wandb\\]"'),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    prepared, tmp_path, monkeypatch, change, given, message
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = config_of(prepared, **change)
    samples = RunSamples(config) if given else None
    with pytest.raises(ValueError, match=message):
        loop.train(config, str(tmp_path / "run"), False, samples=samples)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_model_without_a_causal_stage_is_not_asked_to_continue(prepared):
    from mtnlg_jax.config import StageConfig, validate

    config = config_of(prepared, stages=(StageConfig("masked", 1.0, masked=1.0),))
    with pytest.raises(ValueError, match="no stage of this run learns to continue"):
        validate(dataclasses.replace(config))
