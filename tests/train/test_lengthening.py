"""Check resumes with another train.steps: the steps so far keep their learning rates, or it is
refused."""

import dataclasses
import json
import os
import re

import jax
import numpy as np
import pytest

from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    override,
    to_json,
)
from mtnlg_jax.train import changes, loop
from mtnlg_jax.train.metrics import MetricsLog, read_metrics
from mtnlg_jax.train.schedule import learning_rate, samples_before

# 40 steps of 4 sequences, 160 in all; a warm-up of 15 by its share of 0.096, rounded. The decay of
# wsd begins after 120 of them, 30 steps.
WSD = Config(
    optimizer=OptimizerConfig(
        learning_rate=1.0, lr_decay_style="wsd", warmup_fraction=0.096, wsd_decay_fraction=0.25
    ),
    train=TrainConfig(steps=40, global_batch_size=4),
)


def of_style(style, **settings):
    plain = {"wsd_decay_fraction": OptimizerConfig().wsd_decay_fraction}
    settings = {"lr_decay_style": style} | plain | settings
    return dataclasses.replace(WSD, optimizer=dataclasses.replace(WSD.optimizer, **settings))


def resume(before, step, *settings, samples=None):
    """Return the config with which a run resumes from the checkpoint of ``step``, or raise."""
    samples = samples_before(before.train, step) if samples is None else samples
    meta = {"config": json.loads(to_json(before)), "samples": samples}
    config = override(before, *settings)
    changes.refuse_changes(meta, step, False, config)
    return changes.kept_warmup(meta, step, samples, config)


def rates(config, step):
    samples = np.ones(2000, np.int32)  # one size, for which each operation is compiled once
    samples[:step] = [samples_before(config.train, each + 1) for each in range(step)]
    total = samples_before(config.train, config.train.steps)
    return np.asarray(learning_rate(config, samples, total))[:step]


# The decay of 80 steps begins after 60, that of 36 after 27.
@pytest.mark.parametrize(("step", "steps"), [(30, 80), (3, 80), (20, 1000), (27, 36), (30, 41)])
def test_a_wsd_run_grows_until_its_decay_begins(step, steps):
    longer = resume(WSD, step, f"train.steps={steps}")
    assert longer.optimizer.warmup_samples == 15
    np.testing.assert_array_equal(rates(longer, step), rates(WSD, step))
    # Those of a run that had this length from its start.
    np.testing.assert_array_equal(
        rates(longer, steps), rates(override(longer, "optimizer.warmup_fraction=0.5"), steps)
    )
    # A second time.
    again = resume(longer, step, "optimizer.warmup_samples=None", f"train.steps={2 * steps}")
    np.testing.assert_array_equal(rates(again, step), rates(WSD, step))


def test_the_ramp_of_a_wsd_run_grows_with_it():
    ramp = override(WSD, "train.micro_batch_size=1", "train.rampup_batch_size=(1, 1, 60)")
    longer = resume(ramp, 25, "train.steps=80")
    np.testing.assert_array_equal(rates(longer, 25), rates(ramp, 25))


@pytest.mark.parametrize(
    ("before", "step", "steps", "words"),
    [
        # 31 x 4 = 124, 4 of 40 sequences down: 2 x 2^-0.1 - 1 = 0.8661 of the way to 0.1.
        (
            WSD,
            31,
            80,
            "the decay of .*=wsd has begun, .* 124 sequences .* been 1 instead of 0.879;",
        ),
        (WSD, 40, 80, "after 160 seq.* been 1 instead of 0.1; set optimizer.decay_samples=160 to"),
        # The decay of 32 steps would have begun after 24.
        (WSD, 30, 32, "train.steps was 40 up to checkpoint 30 and is 32: the decay of .* 120 seq"),
        # 80 of 160 sequences: 65 / 145 of the decay in place of 65 / 305.
        (of_style("linear"), 20, 80, "after 80 .* been 0.808 instead of 0.597; set .*_samples=160"),
        (of_style("linear"), 20, 39, "follows the length of the run, so .* after 80 sequences"),
        (of_style("cosine"), 20, 80, "lr_decay_style=cosine follows the length of the run, so the"),
        (of_style("cosine"), 40, 41, "or start from this run by --init in another --workdir"),
        (of_style("linear", lr_cycles=2), 10, 80, "follows the length of the run, so .* after 40 "),
        (of_style("wsd", lr_cycles=4), 30, 80, "wsd has begun, so the learning rate after"),
    ],
)
def test_a_length_that_changes_earlier_rates_is_refused(before, step, steps, words):
    with pytest.raises(ValueError, match=words) as error:
        resume(before, step, f"train.steps={steps}")
    assert "\n" not in str(error.value) and f"and is {steps}: " in str(error.value)
    # The way out keeps the curve.
    kept = re.search(r"set (optimizer.decay_samples=\d+)", str(error.value))
    if step < steps:
        longer = resume(before, step, f"train.steps={steps}", kept[1])
        np.testing.assert_allclose(rates(longer, step), rates(before, step), rtol=3e-2)
        assert float(learning_rate(longer, max(160, 4 * steps))) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("before", "steps", "words"),
    [
        # 80 sequences of warm-up, in runs of 80 and of 84 sequences.
        (of_style("constant", warmup_fraction=0.5), 20, "a warm-up of 80 .* within the 80 of"),
        (of_style("wsd", warmup_fraction=0.5), 21, "a warm-up of 80 .* exceed the 84 of the curve"),
    ],
)
def test_a_warmup_that_does_not_fit_a_shorter_run_is_refused(before, steps, words):
    with pytest.raises(ValueError, match=f"and is {steps}, and the warm-up keeps .*{words}"):
        resume(before, 3, f"train.steps={steps}")
    assert resume(before, 3, "train.steps=30").optimizer.warmup_samples == 80


def test_a_warmup_that_was_kept_is_checked_with_another_curve():
    # An earlier start made the run shorter: 80 + 30 of 120 sequences.
    before = of_style("wsd", warmup_fraction=0.5, warmup_samples=80, wsd_decay_fraction=0.25)
    before = override(before, "train.steps=30")
    given = ("optimizer.warmup_samples=None", "optimizer.wsd_decay_fraction=")
    assert resume(before, 3, given[0], given[1] + "0.3").optimizer.warmup_samples == 80
    words = (
        "^the warm-up keeps the length that it has in checkpoint 3: .* of 80 .* exceed the 120 of"
    )
    with pytest.raises(ValueError, match=words):
        resume(before, 3, given[0], given[1] + "0.4")


@pytest.mark.parametrize("style", ["cosine", "linear", "wsd"])
def test_other_batches_with_the_same_samples_are_no_other_length(style):
    half = ("train.steps=60", "train.global_batch_size=2")  # 80 sequences by 4, 80 by 2
    found = resume(of_style(style), 20, *half)
    assert found.optimizer.warmup_samples is None
    # As many by a ramp.
    ramp = ("train.micro_batch_size=1", "train.rampup_batch_size=(2, 2, 120)", "train.steps=50")
    assert resume(of_style(style), 20, *ramp).optimizer.warmup_samples is None
    with pytest.raises(ValueError, match="has begun|follows the length"):
        resume(of_style(style), 20, "train.steps=22", "train.global_batch_size=2")


def test_a_decay_that_began_after_larger_batches_is_seen():
    # 30 steps of 4, then of 1: 125 of 160 sequences after 35 steps, and the decay began at 120.
    before = override(WSD, "train.global_batch_size=1", "train.steps=70")
    assert resume(before, 30, "train.steps=100", samples=120)
    with pytest.raises(ValueError, match="has begun, so the learning rate after 125 sequences"):
        resume(before, 35, "train.steps=100", samples=125)


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_a_curve_of_fixed_length_grows_at_any_time(style):
    """The warm-up, 15.36 sequences by its share, is whole ones."""
    before = of_style(style, decay_samples=160)
    longer = resume(before, 20, "train.steps=80")
    np.testing.assert_array_equal(rates(longer, 20), rates(before, 20))


@pytest.mark.parametrize("style", ["constant", "inverse_square_root"])
def test_curves_without_an_end_grow_at_any_time(style):
    before = of_style(style)
    for step in (2, 20, 40):
        longer = resume(before, step, "train.steps=80")
        np.testing.assert_array_equal(rates(longer, step), rates(before, step))


def test_who_asks_for_another_curve_gets_it():
    before = of_style("cosine")
    for setting in ("optimizer.decay_samples=320", "optimizer.lr_decay_style=constant"):
        config = resume(before, 20, "train.steps=80", setting)
        assert changes.report_changes({"config": json.loads(to_json(before))}, 20, 80, config)
    # The same length, or other settings alone, change nothing.
    assert resume(before, 20) == before
    assert resume(before, 20, "optimizer.warmup_fraction=0.2", "train.steps=80")
    assert resume(before, 20, "optimizer.learning_rate=0.5").optimizer.warmup_samples is None


@pytest.fixture(scope="module")
def prepared(prepared_words):
    return prepared_words("one two three four five six".split())


def test_a_run_that_grew_equals_one_that_was_longer(prepared, tmp_path, monkeypatch, compiled_once):
    monkeypatch.setattr(MetricsLog, "plot", lambda log: None)  # takes longer than the steps
    make = loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: make(mesh, jax.devices()[:1]))
    train = {"global_batch_size": 4, "eval_every": 3, "save_every": 3, "eval_batches": 1}
    short = Config(
        model=ModelConfig(
            num_layers=1, hidden_size=16, num_attention_heads=2, max_position_embeddings=16
        ),
        mesh=MeshConfig(data=1),
        data=DataConfig(path=prepared),
        optimizer=OptimizerConfig(
            learning_rate=1e-2, lr_decay_style="wsd", warmup_fraction=0.4, wsd_decay_fraction=0.4
        ),
        train=TrainConfig(steps=5, compute_dtype="float32", **train),
    )
    longer = override(short, "train.steps=6")

    def records(name, config, most=9):
        folder = str(tmp_path / name)
        loop.train(config, folder, False, enough=lambda evaluations: len(evaluations) >= most)
        rows = read_metrics(os.path.join(folder, "metrics.jsonl"))
        keys = ("step", "loss", "learning_rate")
        return [tuple(r[key] for key in keys) for r in rows if r["kind"] == "train"]

    assert len(records("grown", short, most=1)) == 3  # where the decay begins
    # Two of five steps, which --set=train.steps=6 alone would have made 2.4.
    whole = records("whole", override(longer, "optimizer.warmup_samples=8"))
    assert records("grown", longer) == whole
    # The same command again has nothing left to do, also with the samples of the warm-up kept.
    assert records("grown", longer) == whole
    with pytest.raises(ValueError, match="train.steps was 6 up to checkpoint 6 and is 9"):
        records("grown", override(longer, "train.steps=9"))
