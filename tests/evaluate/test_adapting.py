"""Adapt a tiny run to a person's texts: the file, what it gains, and what is refused."""

import dataclasses
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from mtnlg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.decode.adapters import for_rows, stack
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.errors import Preempted
from mtnlg_jax.evaluate import adapting
from mtnlg_jax.evaluate.adapting import adapt, describe, output_of
from mtnlg_jax.evaluate.perplexity import evaluate_text
from mtnlg_jax.interop import registry
from mtnlg_jax.train import adapt as training
from mtnlg_jax.train import adapter_file, loop, manifest
from mtnlg_jax.train.adapt import AdaptSettings, Texts, config_of, out_of_patience
from mtnlg_jax.train.checkpoint import load_run

PERSON = "my dear friend the garden is green and the tea is cold and my dear friend sleeps".split()
OTHERS = "the old whale swam north past a red ship and nobody woke in the storm at sea".split()
SETTINGS = AdaptSettings(rank=2, steps=24, learning_rate=2e-2)


def lines_of(words, seed, count=250):
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(words) - 4, (count, 2))
    return [" ".join([*words[a : a + 4], *words[b : b + 4]]) for a, b in starts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on everybody's text, and texts of a person, all on one device."""
    folder = tmp_path_factory.mktemp("person")
    both = [*lines_of(OTHERS, 0), *lines_of(PERSON, 1, 20)]
    (folder / "book.txt").write_text(".\n".join(both))
    (folder / "person").mkdir()
    (folder / "person" / "letters.txt").write_text(".\n".join(lines_of(PERSON, 2)))
    prepare(folder / "book.txt", folder / "data", vocab_size=300, heldout=0.1, progress=False)
    model = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=32,
        position_embedding_type="rotary",
    )
    config = Config(
        model=model,
        data=DataConfig(path=str(folder / "data")),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(steps=40, global_batch_size=8, compute_dtype="float32", eval_batches=1),
    )
    make = loop.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: make(config, jax.devices()[:1]))
        loop.train(config, str(folder / "run"), show_progress=False)
        yield folder


@pytest.fixture(scope="module")
def adapted(folder):
    output = output_of(str(folder / "run"), "me", None, overwrite=False)
    texts = Texts(str(folder / "person"))
    return adapt(str(folder / "run"), texts, output, SETTINGS, progress=False)


def test_an_adapter_gains_on_the_persons_text_and_is_one_file(folder, adapted):
    assert adapted.person.after < 0.9 * adapted.person.before
    assert adapted.others.before < adapted.person.before
    assert os.listdir(folder / "run" / "adapters") == ["me.safetensors"]
    found = adapter_file.load_adapter(folder / "run", "me")
    assert found.trained["bits_per_byte"] == list(adapted.person[:2])
    assert found.trained["documents"] == 1 and found.trained["bytes"] > 5000
    assert "bits per byte before" in describe(adapted, "me")


def test_the_figures_are_those_of_the_merged_model_on_the_held_out_end(folder, adapted):
    run, decoder = load_decoder(folder / "run")
    registry.register()
    registry.adapt(str(folder / "run"), "me")
    try:
        merged_run, merged = load_decoder(folder / "run")
        loaded = load_run(folder / "run")
    finally:
        registry._READER.adapted.clear()
    assert merged_run.step == run.step
    stacked = for_rows(
        stack(decoder, {"me": adapter_file.load_adapter(folder / "run", "me")}), ["me"]
    )
    # Nearly all of the held-out end; the first words may be cut off.
    text = (folder / "person" / "letters.txt").read_text()[-adapted.person.bytes :]
    found = [evaluate_text(each, run.tokenizer, text) for each in (decoder, merged, stacked)]
    assert found[0].bits_per_byte == pytest.approx(adapted.person.before, abs=1e-3)
    assert found[1].bits_per_byte == pytest.approx(adapted.person.after, abs=1e-3)
    assert found[2].bits_per_byte == pytest.approx(found[1].bits_per_byte, abs=1e-5)
    matrix = np.asarray(loaded.params["blocks"]["mlp"]["w_in_DF"][...])
    plain = np.asarray(load_run(folder / "run").params["blocks"]["mlp"]["w_in_DF"][...])
    assert np.abs(matrix - plain).max() > 1e-3


def test_an_interrupted_call_goes_on_and_gives_the_same_adapter(folder, adapted, monkeypatch):
    workdir = str(folder / "run")
    output = output_of(workdir, "again", None, overwrite=False)
    given = (workdir, Texts(str(folder / "person")), output, SETTINGS)
    batch_at = loop.batch_at
    steps = []

    def stopping(config, mesh, data, step, samples):
        steps.append(step)
        if step == 9:
            signal.raise_signal(signal.SIGTERM)
        return batch_at(config, mesh, data, step, samples)

    monkeypatch.setattr(loop, "batch_at", stopping)
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(Preempted, match="the same command resumes"):
        adapt(*given, progress=False)
    assert not os.path.exists(output)
    adapt(*given, progress=False)
    assert steps.count(9) == 1 and 10 in steps and len(steps) < 2 * SETTINGS.steps
    one, other = (load_file(adapter_file.path_of(workdir, name)) for name in ("me", "again"))
    for name, factor in one.items():
        np.testing.assert_array_equal(factor, other[name])
    os.remove(output)
    assert os.listdir(folder / "run" / "adapters") == ["me.safetensors"]


def test_a_call_interrupted_behind_its_training_trains_no_more(folder, adapted, monkeypatch):
    workdir = str(folder / "run")
    output = output_of(workdir, "later", None, overwrite=False)
    given = (workdir, Texts(str(folder / "person")), output, SETTINGS)
    monkeypatch.setattr(training, "out_of_patience", lambda found: len(found) >= 2)
    steps = []
    batch_at = loop.batch_at
    monkeypatch.setattr(loop, "batch_at", lambda *args: steps.append(args[3]) or batch_at(*args))
    with monkeypatch.context() as patch:
        patch.setattr(adapting, "load_decoder", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            adapt(*given, progress=False)
    adapt(*given, progress=False)
    assert steps == [0, 1, 2, 3]
    os.remove(output)


def test_adapters_of_other_models_are_refused_with_what_differs(folder, adapted, tmp_path):
    run, stored = adapter_file.open_base(folder / "run")
    base = adapter_file.identity_of(run, stored)
    found = adapter_file.load_adapter(folder / "run", "me")

    class Changed:
        def read(self, name, index=None):
            array = stored.read(name, index)
            return array * 1.001 if name.endswith("w_out_FD") else array

    others = {
        r"model\.hidden_size is 32 there and 48 here": (
            dataclasses.replace(run.config.model, hidden_size=48),
            base | {"model": base["model"] | {"hidden_size": 48}},
        ),
        "its tokenizer is .* there and abc here": (run.config.model, base | {"tokenizer": "abc"}),
        r"the weights differ \(checkpoint of step 40 there, of step 40 here\)": (
            run.config.model,
            adapter_file.identity_of(run, Changed()),
        ),
    }
    for message, (model, identity) in others.items():
        adapter = adapter_file.read(adapted.path, model)
        with pytest.raises(ValueError, match=message):
            adapter_file.check_fits(adapter, identity, "OTHER")
    adapter_file.check_fits(found, base, "RUN")


def test_a_run_with_another_checkpoint_of_that_step_has_other_weights(folder, tmp_path):
    copy = shutil.copytree(folder / "run", tmp_path / "run")
    before = adapter_file.weights_of(folder / "run", "best", 40)
    assert adapter_file.weights_of(copy, "best", 40) == before
    path = copy / "checkpoints" / "40"
    record = manifest.read_record(epath.Path(path))[0]
    (path / "params" / "more").write_bytes(b"x")
    manifest.write_record(epath.Path(path), record)
    assert adapter_file.weights_of(copy, "best", 40) != before


def test_damaged_and_other_files_are_refused(folder, adapted, tmp_path):
    model = load_decoder(folder / "run")[0].config.model
    path = tmp_path / "a.safetensors"
    path.write_bytes(Path(adapted.path).read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        adapter_file.read(path, model)
    save_file({"x": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="not an adapter of launch/adapt.py"):
        adapter_file.read(path, model)
    found = adapter_file.read(adapted.path, model)
    factors = {name: each[:, :1] for name, each in found.factors.items()}
    adapter_file.write(str(path), dataclasses.replace(found, factors=factors))
    with pytest.raises(ValueError, match=r"is damaged: lora_a_\w+ is \(2, 1"):
        adapter_file.read(path, model)
    for name in ("you", "away/you.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"has no adapter '{name}': it has me"):
            adapter_file.find(folder / "run", name)
    with pytest.raises(ValueError, match=r"book.txt is no adapter's file, whose name ends with"):
        adapter_file.find(folder / "run", str(folder / "book.txt"))


def test_bad_names_and_existing_files_are_refused(folder, adapted, tmp_path):
    run = str(folder / "run")
    with pytest.raises(ValueError, match="--adapter=a/b is not a name"):
        output_of(run, "a/b", None, False)
    with pytest.raises(ValueError, match=r"exists; .*--overwrite"):
        output_of(run, "me", None, False)
    assert output_of(run, "me", None, True) == adapted.path
    with pytest.raises(ValueError, match=r"must end with \.safetensors"):
        output_of(run, "me", str(tmp_path / "me"), False)
    registry.register()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"is not a run here.*--output=FILE"):
        output_of(str(tmp_path), "me", None, False)


def test_too_little_text_is_refused(folder, tmp_path):
    (tmp_path / "short.txt").write_text("my dear friend")
    output = str(tmp_path / "me.safetensors")
    with pytest.raises(ValueError, match=r"tokens to train on, and one row has 33"):
        adapt(str(folder / "run"), Texts(str(tmp_path / "short.txt")), output, progress=False)
    with pytest.raises(FileNotFoundError):
        adapt(str(folder / "run"), Texts(str(tmp_path / "none.txt")), output, progress=False)
    assert os.listdir(tmp_path) == ["short.txt"]


def test_training_ends_when_the_held_out_loss_stops_falling():
    losses = [3.0, 2.0, 2.5, 1.9, 2.0, 1.9]
    found = [{"causal_loss": loss} for loss in losses]
    ends = [out_of_patience(found[:count], 2) for count in range(7)]
    assert ends == [False] * 6 + [True]
    assert out_of_patience([{"causal_loss": None}] * 3, 2)


def test_steps_follow_the_size_of_the_texts(folder):
    class Sized:
        def __init__(self, size):
            self.size = size

        def __len__(self):
            return self.size

    base = load_decoder(folder / "run")[0].config
    steps = [
        config_of(base, "RUN", "DATA", Sized(size), AdaptSettings()).train.steps
        for size in (500, 8 * 32 * 10, 10**9)
    ]
    assert steps == [20, 60, 600]
