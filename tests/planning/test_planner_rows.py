"""The planner's seconds on TPUs beside the predictions that benchmarks/planner.py kept."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from mtnlg_jax.config import load_config
from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.planning.cost import Job
from mtnlg_jax.planning.layout import Layout
from mtnlg_jax.planning.search import measured_efficiency

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/planner.py"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def kept(script):
    return json.loads(script["RESULT"].read_text())["rows"]


# This step fills 98 % of the memory. The compiler runs no collective over tensor beside products.
FURTHER = {"v5p-310.1b": 0.22}


def test_seconds_are_within_15_percent_of_those_of_the_schedule(script, kept):
    assert kept.keys() == script["ROWS"].keys()
    for name, row in kept.items():
        estimate = script["estimate_of"](name)
        near = FURTHER.get(name, 0.15)
        assert estimate.step_seconds == pytest.approx(row["seconds"], rel=near), name
        assert estimate.step_seconds == pytest.approx(row["sums"], rel=1e-3), name


def test_the_table_of_the_docs_is_that_of_the_script(script, kept):
    docs = (ROOT / "docs/predicted_step.md").read_text()
    for name, row in kept.items():
        assert script["line_of"](name, row) in docs


@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e"])
def test_a_run_calibrates_the_share_of_products_alone(kind):
    job = Job(load_config(str(ROOT / "configs/ladder.py:7.5b"), []), CHIPS[kind])
    layout = Layout(1, 64, 1, 1, 3, "circular", 1, None, 8, "full")
    estimate = job.estimate(layout)
    found = measured_efficiency(job, layout, estimate.step_seconds)
    assert found == pytest.approx(CHIPS[kind].products)
    slower = Job(job.config, job.chip, found / 2).estimate(layout)
    assert slower.seconds["element-wise"] == estimate.seconds["element-wise"] > 0
    assert estimate.seconds["compute"] < slower.seconds["compute"] < 2 * estimate.seconds["compute"]


def test_small_micro_batches_hide_less():
    job = Job(load_config(str(ROOT / "configs/ladder.py:7.5b"), []), CHIPS["v6e"])
    layout = Layout(1, 256, 1, 1, 3, "circular", 1, None, 2, "full")
    large = job.estimate(layout)
    small = job.estimate(layout._replace(micro_batch_size=1))
    assert small.seconds["data"] > 1.9 * large.seconds["data"]
    assert small.hidden == pytest.approx(large.hidden, rel=0.05)


def test_no_more_tensor_traffic_hides_than_the_backward_pass_lasts():
    job = Job(load_config(str(ROOT / "configs/ladder.py:1.7b"), []), CHIPS["v5p"])
    estimate = job.estimate(Layout(1, 64, 1, 8, 1, "circular", 1, None, 8, "none"))
    assert 0 < estimate.hidden <= estimate.seconds["compute"] * 2 / 3


@pytest.mark.parametrize("share", [2, 8])
def test_kernels_skip_scores_outside_windows_and_above_the_diagonal(share):
    # Products take no time, so kernels are all there is.
    chip = dataclasses.replace(CHIPS["v5e"], link=0.0, memory_speed=1e30)
    full = load_config(str(ROOT / "configs/ladder.py:7.5b"), [])
    window = full.sequence_length // share
    windowed = load_config(
        str(ROOT / "configs/ladder.py:7.5b"), [f"model.layer_pattern=[{{'window': {window}}}]"]
    )
    layout = Layout(1, 64, 1, 1, 3, "circular", 1, None, 8, "none")
    long, short = (Job(each, chip, 1e9).seconds(layout)[0]["compute"] for each in (full, windowed))
    assert short / long == pytest.approx((2 - 1 / share) / share, rel=1e-3)
