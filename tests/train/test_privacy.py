"""Check what differentially private runs report, how they resume, and what is refused."""

import dataclasses
import json
import math
import sys

import dp_accounting
import jax
import numpy as np
import pytest
from dp_accounting import pld, rdp

from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
    validate,
)
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import adapt, inputs, loop, privacy
from mtnlg_jax.train.checkpoint import load_run
from mtnlg_jax.train.metrics import MetricsLog, read_metrics
from mtnlg_jax.train.privacy import Ledger, Part

WORDS = "the whale swam north while nobody on the ship dared to wake the old captain".split()


@pytest.fixture(scope="module")
def prepared(prepared_words):
    return prepared_words(WORDS)


@pytest.fixture(scope="module", autouse=True)
def one_device(compiled_once):
    make = loop.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda mesh: make(mesh, jax.devices()[:1]))
        patch.setattr(MetricsLog, "plot", lambda log: None)  # takes longer than six steps
        yield


def config_of(path, optimizer=(), **train):
    train = {"steps": 6, "eval_every": 6, "save_every": 3, "eval_batches": 2} | train
    return Config(
        model=ModelConfig(
            num_layers=1,
            hidden_size=32,
            num_attention_heads=8,
            max_position_embeddings=32,
            normalization="rmsnorm",
            add_bias=False,
        ),
        mesh=MeshConfig(data=1),
        data=DataConfig(path=path),
        optimizer=OptimizerConfig(
            **{"learning_rate": 3e-3, "dp_noise_multiplier": 1.0, **dict(optimizer)}
        ),
        train=TrainConfig(**{"global_batch_size": 8, "compute_dtype": "float32", **train}),
    )


def by_hand(parts, delta, accountant):
    """Return epsilon, of a fresh accountant of dp_accounting."""
    for steps, probability, noise in parts:
        gaussian = dp_accounting.GaussianDpEvent(noise)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(probability, gaussian), steps)
    return accountant.get_epsilon(delta)


# --- accounting


def ledger_of(parts, delta=1e-5, **optimizer):
    return Ledger(config_of("", optimizer), [Part(*part) for part in parts], delta, 1000)


def test_epsilon_equals_dp_accounting_by_hand():
    parts = [(40, 0.02, 0.9), (60, 0.01, 1.3)]
    ledger = ledger_of(parts)
    assert ledger.epsilon(100) == by_hand(parts, 1e-5, pld.PLDAccountant())
    assert ledger.until(70) == (Part(*parts[0]), Part(30, 0.01, 1.3))
    moments = ledger_of(parts, dp_accountant="rdp")
    assert moments.epsilon(100) == by_hand(parts, 1e-5, rdp.RdpAccountant())
    assert ledger.epsilon(100) < moments.epsilon(100)
    # The chance of more units than a batch has room for is added to delta.
    assert 1e-5 < ledger.total_delta(100, 2.0) < 1e-5 * (1 + 1e-9)


def test_live_epsilon_is_a_close_upper_bound_and_exact_at_the_end():
    ledger = ledger_of([(1000, 0.01, 1.0)])
    live = [ledger.row(done)["epsilon"] for done in (63, 517, 998, 1000)]
    exact = [ledger.epsilon(done) for done in (63, 517, 998, 1000)]
    assert all(a <= b + 5e-5 and b < 1.02 * a for a, b in zip(exact, live, strict=True))
    assert live == sorted(live) and live[-1] == pytest.approx(exact[-1], rel=1e-3)


def test_settings_without_an_epsilon_are_infinite_and_take_no_time():
    for part in (Part(10**6, 1.0, 0.01), Part(10, 0.5, 1e-9), Part(6, 0.02, 0.01)):
        for kind in ("pld", "rdp"):
            assert privacy.epsilon_of([part], 1e-5, kind) == math.inf
    # Below what rounding leaves of the distribution.
    assert privacy.epsilon_of([Part(10, 0.01, 1.0)], 1e-30) == math.inf


# --- whole runs


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    said = []
    config = config_of(
        prepared, {"dp_noise_multiplier": 0.0, "dp_target_epsilon": 3.0, "dp_delta": 1e-4}
    )
    loop.train(config, str(workdir), show_progress=False, announce=said.append)
    return workdir, config, said


def leaves(workdir):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_run(workdir, "last").params)]


def report_of(workdir):
    return json.loads((workdir / "privacy.json").read_text())


def test_a_run_reaches_its_target_and_reports_what_it_spent(whole):
    workdir, _, said = whole
    report = report_of(workdir)
    assert report["kind"] == "privacy" and report["steps"] == report["step"] == 6
    assert report["unit"] == "example" and report["accountant"] == "pld"
    assert 2.97 < report["epsilon"] <= 3.0
    probability = 8 / report["units"]
    assert report["sampling_probability"] == pytest.approx(probability)
    part = (6, report["sampling_probability"], report["noise_multiplier"])
    assert report["epsilon"] == by_hand([part], 1e-4, pld.PLDAccountant())
    assert "epsilon 3 at delta 0.0001 after 6 steps" in said[0] and "dp_secret" in said[0]


def test_an_adapter_records_what_its_run_spent(whole, tmp_path):
    # launch/adapt.py removes the run's folder.
    report = report_of(whole[0])
    assert adapt._spent(str(whole[0])) == {
        "privacy_epsilon": report["epsilon"],
        "privacy_delta": report["delta"],
        "privacy_unit": "example",
        "privacy_units": report["units"],
    }
    assert adapt._spent(str(tmp_path)) == {}


def test_its_log_marks_what_is_not_private(whole):
    rows = [r for r in read_metrics(whole[0] / "metrics.jsonl") if r["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 7))
    spent = [row["epsilon"] for row in rows]
    assert spent == sorted(spent) and spent[-1] == pytest.approx(
        report_of(whole[0])["epsilon"], 1e-3
    )
    for row in rows:
        assert row["delta"] == 1e-4 and row["sequences"] == 8  # the mean, not the sample
        assert row["nonprivate_loss"] > 0 and 0 <= row["nonprivate_clipped"] <= 1
        assert "loss" not in row
        # The norm is that of the noised mean: almost all of it is noise.
        noise = report_of(whole[0])["noise_multiplier"] / 8
        assert row["grad_norm"] > 0.9 * noise * math.sqrt(17_000)


def test_a_killed_run_resumes_bit_for_bit(whole, tmp_path, monkeypatch):
    workdir, config, _ = whole

    class Stop(Exception):
        pass

    real = loop.batch_at

    def failing(config, mesh, data, step, samples):
        if step == 4:
            raise Stop
        return real(config, mesh, data, step, samples)

    monkeypatch.setattr(loop, "batch_at", failing)
    with pytest.raises(Stop):
        loop.train(config, str(tmp_path), show_progress=False)
    half = report_of(tmp_path)
    assert half["steps"] == 3 and half["epsilon"] < half["epsilon_at_end"] <= 3.0
    monkeypatch.undo()
    loop.train(config, str(tmp_path), show_progress=False)
    for one, other in zip(leaves(tmp_path), leaves(workdir), strict=True):
        np.testing.assert_array_equal(one, other)
    volatile = ("created",)
    one, other = (
        {k: v for k, v in report_of(w).items() if k not in volatile} for w in (tmp_path, workdir)
    )
    assert one == other


def test_a_loss_that_is_not_finite_skips_no_step(whole, tmp_path, monkeypatch):
    """That a step was skipped would tell that the example was in it."""
    real = loop.batch_at

    def poisoned(config, mesh, data, step, samples):
        batch, count, sequences = real(config, mesh, data, step, samples)
        weights = batch["weights"].at[0, 0, 0].set(np.inf if step == 1 else 0.0)
        return batch | {"weights": weights}, count, sequences

    monkeypatch.setattr(loop, "batch_at", poisoned)
    summary = loop.train(whole[1], str(tmp_path), show_progress=False)
    assert summary.skipped == 0
    rows = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert [row["nonprivate_nonfinite"] for row in rows] == [0, 1, 0, 0, 0, 0]
    assert all(math.isfinite(row["nonprivate_loss"]) for row in rows)


def test_a_resume_with_other_noise_is_composed(whole, prepared):
    first = report_of(whole[0])
    config = config_of(prepared, {"dp_noise_multiplier": 2.0, "dp_delta": 1e-4}, steps=8)
    samplers = inputs.load_data(config).samplers
    meta = load_run(whole[0], "last").meta
    report = privacy.start(config, samplers, meta, 6, 48)[1].report(8)
    probability = report["sampling_probability"]
    parts = [(6, probability, first["noise_multiplier"]), (2, probability, 2.0)]
    recorded = [(part["steps"], part["probability"], part["noise"]) for part in report["parts"]]
    assert recorded == parts
    assert report["epsilon"] == by_hand(parts, 1e-4, pld.PLDAccountant())


def test_each_run_of_a_secret_has_noise_of_its_own(prepared):
    """Of two runs with the same noise the difference would be without any."""

    def key(prints=("a",), optimizer=(), tensor=1, **train):
        config = config_of(prepared, optimizer, **train)
        config = dataclasses.replace(config, mesh=MeshConfig(data=1, tensor=tensor))
        return privacy.noise_key(config, dict(enumerate(prints))).tobytes()

    same = [key(), key(tensor=2), key(log_every=3, micro_batch_size=1)]
    others = [
        key(("b",)),
        key(optimizer={"dp_noise_multiplier": 2.0}),
        key(optimizer={"dp_clip_norm": 2.0}),
        key(optimizer={"learning_rate": 1e-3}),
        key(global_batch_size=4),
        key(steps=7),
        key(seed=1),
    ]
    assert len(set(same)) == 1 and len({same[0], *others}) == 1 + len(others)


def test_a_run_does_not_become_another_kind(prepared):
    config = config_of(prepared, steps=9)
    samplers = inputs.load_data(config).samplers
    spent = {"privacy": {"parts": [[5, 0.02, 1.0]], "unit": "example"}}

    def start(optimizer, meta, first=5, samples=40):
        given = config_of(prepared, optimizer, steps=9)
        return privacy.start(given, samplers, meta, first, samples)

    for optimizer, meta, message in (
        ({}, {}, "the 5 steps of this run so far had no differential privacy"),
        ({"dp_noise_multiplier": 0.0}, spent, "the 5 steps .* had differential privacy, which"),
        ({"dp_unit": "source"}, spent, "dp_unit was example"),
        ({"dp_noise_multiplier": 0.0, "dp_target_epsilon": 0.1}, spent, "is spent: "),
    ):
        with pytest.raises(ValueError, match=message):
            start(optimizer, meta)
    assert start({"dp_noise_multiplier": 0.0}, {})[1] is None
    # Parameters alone are another start: their 5 steps are not of this run.
    ledger = start({}, {}, samples=0)[1]
    assert [part.steps for part in ledger.parts] == [4] and not ledger.until(5)


def test_a_model_of_the_same_data_is_refused(whole, prepared, tmp_path):
    config = config_of(prepared, init=str(whole[0]))
    with pytest.raises(ValueError, match="was trained on source 0 of these data"):
        loop.train(config, str(tmp_path), show_progress=False)
    privacy.refuse_known_data(config, {"source 0": "of other data"})
    plain = config_of(prepared, {"dp_noise_multiplier": 0.0}, init=str(whole[0]))
    privacy.refuse_known_data(plain, inputs.load_data(plain).fingerprints)


def test_processes_with_other_secrets_are_refused(prepared, tmp_path, monkeypatch):
    def differing(parts):
        return "they differ" if "hash of optimizer.dp_secret" in parts else None

    monkeypatch.setattr(loop.processes, "disagreement", differing)
    with pytest.raises(ValueError, match="they differ; give all processes the same file"):
        loop.train(config_of(prepared), str(tmp_path), show_progress=False)


# --- batches


def test_masks_of_a_row_follow_the_row_and_not_its_neighbors(prepared):
    """The masked objective: a window has the same masks whatever else joins the step."""
    stages = (StageConfig("masked", masked=1.0),)
    config = config_of(prepared, stages=stages)
    data = inputs.load_data(config)
    config = inputs.resolve(config, data.tokenizer)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    few, in_use, sequences = inputs.batch_at(config, mesh, data, 1, 8)
    units = data.samplers[0].joining(1, 8.0)
    assert int(in_use) == len(units) and int(sequences) == 8
    used = np.asarray(few["weights"]).sum(-1)[:, 0] > 0
    assert used.sum() == len(units) and used[: len(units)].all()
    assert np.asarray(few["rows"])[: len(units), 0].tolist() == units.tolist()
    # Without the first unit the others have the same tokens and masks, one slot earlier.
    sampler = data.samplers[0]
    sampler.joining = lambda step, expected: units[1:]
    less, _, _ = inputs.batch_at(config, mesh, data, 1, 8)
    for name in ("tokens", "labels", "weights", "rows"):
        np.testing.assert_array_equal(
            np.asarray(less[name])[: len(units) - 1], np.asarray(few[name])[1 : len(units)]
        )
    sampler.joining = lambda step, expected: units[:0]
    none, in_use, _ = inputs.batch_at(config, mesh, data, 1, 8)
    assert int(in_use) == 0 and not np.asarray(none["weights"]).any()


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"reduce_dtype": "bfloat16"}}, "reduce_dtype=bfloat16 rounds clipped"),
        ({"train": {"stages": (StageConfig(distill="RUN"),)}}, "a teacher passes on"),
        (
            {"model": {"moe": MoEConfig(num_moe_experts=4, moe_router_enable_expert_bias=True)}},
            "expert_bias moves with the loads",
        ),
        (
            {"model": {"moe": MoEConfig(num_moe_experts=4)}, "mesh": {"expert": 2}},
            "mesh.expert=2 with differential privacy",
        ),
        ({"optimizer": {"dp_source_rows": 2}}, "dp_source_rows=2 is for whole sources"),
        (
            {"optimizer": {"dp_source_rows": 9, "dp_unit": "source"}},
            "global_batch_size=8 is less than",
        ),
        ({"optimizer": {"dp_clip_norm": 0.0}}, "dp_clip_norm=0.0 is outside"),
        ({"optimizer": {"dp_delta": 1.0}}, "dp_delta=1.0 is outside"),
        (
            {"optimizer": {"dp_noise_multiplier": 0.0, "dp_clip_norm": 2.0}},
            "dp_clip_norm=2.0 is for differential privacy",
        ),
    ],
)
def test_what_breaks_the_guarantee_is_refused(change, message):
    config = config_of("")
    for section, values in change.items():
        part = dataclasses.replace(getattr(config, section), **values)
        config = dataclasses.replace(config, **{section: part})
    with pytest.raises(ValueError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("optimizer", "train", "message"),
    [
        ({"dp_noise_multiplier": 0.01}, {}, "no epsilon up to 1000 can be computed"),
        ({"dp_delta": 1e-30}, {}, "no epsilon up to 1000 can be computed"),
        ({"dp_delta": 0.5}, {}, r"dp_delta=0.5 is 1 / \d+ units or more"),
        ({"dp_unit": "source"}, {}, "have 1 unit of privacy"),
        ({"dp_target_epsilon": 8.0}, {}, "are both set; keep one"),
        ({}, {"global_batch_size": 4096}, "of privacy, and its share of a step is 4096"),
        ({"dp_secret": "/nowhere"}, {}, "/nowhere cannot be read"),
    ],
)
def test_settings_without_an_epsilon_are_refused_before_any_work(
    prepared, tmp_path, optimizer, train, message
):
    config = config_of(prepared, optimizer)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    with pytest.raises(ValueError, match=message):
        loop.train(config, str(tmp_path / "run"), show_progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_the_package_one_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    privacy._library.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'mtnlg_jax\[privacy\]'"):
        privacy.epsilon_of([Part(1, 0.1, 1.0)], 1e-5)
    monkeypatch.undo()
    privacy._library.cache_clear()
