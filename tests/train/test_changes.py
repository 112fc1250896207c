"""Check which config keys may change when a run resumes: each is refused, reported or free."""

import dataclasses
import json

import pytest

from mtnlg_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig, override, to_json
from mtnlg_jax.data.batches import SAMPLE_ORDER
from mtnlg_jax.train import changes
from mtnlg_jax.train.schedule import learning_rate, samples_at_end, samples_before

BASE = Config(
    data=DataConfig(path="/data/one"),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.1),
    train=TrainConfig(steps=20, global_batch_size=8),
)


def keys_of(kind=Config, path=""):
    for field in dataclasses.fields(kind):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default):
            yield from keys_of(type(default), f"{path}{field.name}.")
        else:
            yield path + field.name


def report(config, base=BASE, step=10, samples=80):
    return changes.report_changes(_meta(json.loads(to_json(base))), step, samples, config)


def _meta(saved, order=SAMPLE_ORDER):
    return {"config": saved, "order_of_samples": order}


def test_every_key_has_one_kind():
    kinds = [changes.IDENTITY, changes.REFUSED, changes.REPORTED, changes.START, changes.FREE]
    for key in keys_of():
        found = sum(key in kind for kind in kinds) + key.startswith(
            tuple(f"{s}." for s in changes.FREE_SECTIONS)
        )
        assert found == 1, (
            f"{key}: define in train/changes.py what a resumed run does where it differs"
        )
    assert set.union(*kinds) <= set(keys_of())


def other(value):
    """Return another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, str):
        pairs = {"float32": "bfloat16", "bfloat16": "float32", "cosine": "linear"}
        pairs |= {"exponential": "linear"}
        return pairs.get(value, value + "/other")
    return value * 2 + 0.25 if isinstance(value, float) else value + 1


@pytest.mark.parametrize(
    "key", sorted(changes.REPORTED - {"data.blend", "train.stages", "train.rampup_batch_size"})
)
def test_changes_that_affect_the_next_steps_are_reported_with_both_values(key):
    *sections, name = key.split(".")
    nodes = [BASE]
    for part in sections:
        nodes.append(getattr(nodes[-1], part))
    old = getattr(nodes[-1], name)
    changed = other(getattr(nodes[-1], name))
    new = changed
    for node, part in zip(reversed(nodes), [name, *reversed(sections)], strict=True):
        changed = dataclasses.replace(node, **{part: changed})
    line = report(changed)
    assert (
        line.startswith("from step 11 on, settings differ from checkpoint 10: ")
        and "\n" not in line
    )
    assert f"{key} {'null' if old is None else old} -> {new}" in line


@pytest.mark.parametrize(
    "setting",
    [
        "mesh.tensor=2",
        "train.micro_batch_size=2",
        "train.save_every=3",
        "train.keep_last=9",
        "name=other",
        "train.log_every=5",
        "decode.temperature=0.5",
        "data.path=/moved/one",
        "train.device_flops=1e12",
    ],
)
def test_changes_of_speed_and_output_are_not_reported(setting):
    assert report(override(BASE, setting)) is None


def test_changes_of_batch_and_steps_report_the_learning_rate():
    for setting in (
        "train.global_batch_size=4",
        "train.steps=40",
        "train.rampup_batch_size=(4, 4, 100)",
    ):
        config = override(BASE, "train.micro_batch_size=1", setting)
        total = samples_at_end(config.train, 10, 80)
        size = 4 if "steps" not in setting else 8
        rates = [
            float(learning_rate(BASE, 88, 160)),
            float(learning_rate(config, 80 + size, total)),
        ]
        assert f"learning rate of step 11 {rates[0]:.3g} -> {rates[1]:.3g}" in report(config)


def test_a_schedule_counts_the_samples_that_were_read():
    ramp = dataclasses.replace(BASE.train, rampup_batch_size=(2, 2, 60))
    for train in (BASE.train, ramp, dataclasses.replace(ramp, steps=3)):
        for step in range(train.steps + 1):
            assert samples_at_end(train, step, samples_before(train, step)) == samples_before(
                train, train.steps
            )
    assert (
        samples_at_end(dataclasses.replace(BASE.train, global_batch_size=4), 10, 80) == 80 + 10 * 4
    )
    # However small the batch gets, the run ends at its floor.
    config = override(BASE, "train.global_batch_size=4")
    assert float(learning_rate(config, 120, 120)) == pytest.approx(1e-4)


STAGED = override(BASE, 'train.stages=[{"name": "masked", "masked": 1.0}, {"name": "causal"}]')


def test_stages_that_move_are_reported():
    line = report(override(STAGED, "train.steps=40"), STAGED)
    assert (
        "stages end at steps 10, 20 -> 20, 40" in line
        and "step 11 is in stage causal -> masked" in line
    )
    line = report(
        override(STAGED, 'train.stages=[{"name": "masked", "masked": 0.5}, {"name": "causal"}]'),
        STAGED,
    )
    assert "train.stages[0].masked 1.0 -> 0.5" in line
    one = override(STAGED, 'train.stages=[{"name": "causal"}]')
    assert "train.stages masked, causal -> causal" in report(one, STAGED)
    renamed = 'train.stages=[{"name": "first", "masked": 1.0}, {"name": "second"}]'
    assert report(override(STAGED, renamed), STAGED) is None


@pytest.mark.parametrize(
    ("blend", "words"),
    [
        ((("/a", 3.0), ("/b", 3.0)), None),  # the same shares
        ((("/x/a", 1.0), ("/x/b", 1.0)), None),  # moved: the identity compares what is in them
        (
            (("/a", 1.0), ("/b", 3.0)),
            "data.blend 0.5 of source 0 + 0.5 of source 1 -> 0.25 of source 0 + 0.75 of source 1",
        ),
        ((("/a", 1.0),), "-> 1 of source 0"),
    ],
)
def test_a_blend_is_compared_by_its_shares(blend, words):
    old = dataclasses.replace(BASE, data=DataConfig(blend=(("/a", 1.0), ("/b", 1.0))))
    line = report(dataclasses.replace(BASE, data=DataConfig(blend=blend)), old)
    assert line is None if words is None else words in line


def refuse(config, base=BASE, step=10, alone=False):
    changes.refuse_changes({"config": json.loads(to_json(base))}, step, alone, config)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "train.init=/nonexistent",
            "train.init=/nonexistent is not what this run started from .no other run.",
        ),
        ("data.sequence_length=64", "data.sequence_length was 2048 up to checkpoint 10 and is 64"),
        ("optimizer.name=muon", "optimizer.name was adamw up to checkpoint 10 and is muon"),
        ("train.steps=9", "train.steps=9 is below the checkpoint's step 10"),
    ],
)
def test_changes_that_invalidate_the_state_raise_an_error(setting, words):
    with pytest.raises(ValueError, match=words):
        refuse(override(BASE, setting))
    refuse(BASE)


def test_the_record_keeps_the_initial_run(tmp_path):
    started = override(BASE, f"train.init={tmp_path}/old")
    refuse(started, started)
    refuse(override(BASE, f"train.init={tmp_path}/./old"), started)
    refuse(BASE, started)  # left out
    assert changes.kept_init({"config": json.loads(to_json(started))}, BASE) == started
    with pytest.raises(
        ValueError, match="started from .*/old.*; leave --init out, or give another --workdir"
    ):
        refuse(override(BASE, "train.init=/other"), started)
    with pytest.raises(
        ValueError, match="started from"
    ):  # parameters alone, as of a converted model
        refuse(override(BASE, "train.init=/other"), alone=True)


def test_spellings_of_one_initial_model_are_equal(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    local = ["model", "./model", "model/", "other/../model", "link", "model/config.json"]
    local.append(f"{tmp_path}/model")
    remote = ["gs://bucket/model", "gs://bucket/model/"]
    for spellings, others in (
        (local, ["other", "model/other", "other/config.json", *remote]),
        (remote, ["gs://bucket/other", "gs://other/model", "bucket/model", *local]),
    ):
        for one in spellings:
            started = override(BASE, f"train.init={one}")
            for same in spellings:
                refuse(override(BASE, f"train.init={same}"), started)
            for other in others:
                with pytest.raises(ValueError, match="is not what this run started from"):
                    refuse(override(BASE, f"train.init={other}"), started)


def test_a_record_without_newer_keys_uses_their_defaults():
    saved = json.loads(to_json(BASE))
    del (
        saved["train"]["device_flops"],
        saved["optimizer"]["muon_momentum"],
        saved["data"]["masking"],
    )
    saved["train"]["stages"] = [{"name": "causal"}]
    saved["train"]["of_another_version"] = 1
    assert changes.report_changes(_meta(saved), 10, 80, BASE) is None
    line = changes.report_changes(
        _meta(saved), 10, 80, override(BASE, "optimizer.muon_momentum=0.9")
    )
    assert "optimizer.muon_momentum 0.95 -> 0.9" in line


def test_an_older_order_of_samples_is_reported():
    saved = json.loads(to_json(BASE))
    for meta in ({"config": saved}, _meta(saved, "1")):  # version 0.1.0 recorded none
        line = changes.report_changes(meta, 10, 80, BASE)
        assert "checkpoint 10: order of samples 1 -> 2" in line
    assert changes.report_changes(_meta(saved), 10, 80, BASE) is None


def test_changes_that_no_longer_act_are_reported_as_such():
    assert "(it only acts at a fresh start)" in report(override(BASE, "model.init_method_std=0.5"))
    line = report(override(BASE, "train.seed=3"), step=20, samples=160)
    assert line == "step 20 was the last, so these changes do nothing: train.seed 0 -> 3"
