"""What is said of a predicted step, and what is refused."""

import dataclasses
import json

import kept_programs
import pytest

from mtnlg_jax.config import Config, ModelConfig, TrainConfig
from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.planning import aot, hlo_cost, prediction, prediction_report, topology


@pytest.fixture(params=["v5e", "v5p", "v6e"], scope="module")
def program(request):
    return kept_programs.simulated(request.param)


def test_committed_programs_have_the_counted_flops(program):
    timeline, _, said = program
    counted = hlo_cost.cost_of(timeline.program, said["mesh"], kept_programs.trips_of(said))
    assert sum(timeline.step.flops.values()) == counted.flops > 0


def test_classes_of_computing_fill_the_step(program):
    timeline, _, said = program
    step = timeline.step
    assert sum(step.classes.values()) == pytest.approx(step.seconds, rel=1e-3)
    assert step.seconds == pytest.approx(said["seconds"], rel=1e-6)
    assert {"products", "attention kernels", "optimizer"} <= step.classes.keys()


def test_waits_name_axes_and_lines_of_the_package(program):
    timeline, _, said = program
    waits = sorted(timeline.step.waits.values(), key=lambda wait: -wait.seconds)
    assert waits and waits[0].bytes > 0
    assert any(axis in waits[0].label for axis in said["mesh"])
    assert any(wait.source.startswith("mtnlg_jax/") for wait in waits[:5])
    # No product reaches more than the peak.
    products = timeline.step.flops["products"] / timeline.step.classes["products"]
    assert products < CHIPS[topology.parse(said["topology"]).kind].flops


CONFIG = Config(
    name="small",
    model=ModelConfig(vocab_size=1000, num_layers=2, hidden_size=64, num_attention_heads=2),
    train=TrainConfig(global_batch_size=8),
)


def measured(**more) -> aot.Measurement:
    found = prediction.Prediction(
        rules=1,
        seconds=2.0,
        tokens_per_second=1e5,
        mfu=0.5,
        hfu=0.6,
        classes={"products": 1.5, "wait all-gather data": 0.499, "optimizer": 0.001},
        flops={"products": 1.5 * 0.8 * CHIPS["v5p"].flops},
        waits=[["wait all-gather data", "mtnlg_jax/model/mlp.py:42", 0.499, 36, 2**20]],
        assumed_kernels=["attention_forward"],
    )
    mesh = {"pipe": 1, "data": 64, "expert": 1, "context": 1, "tensor": 1}
    return aot.Measurement(
        "v5p:4x4x4", 64, mesh, "train", 1, "libtpu 0", 2**36, predicted=found, **more
    )


def test_report_shows_classes_waits_and_what_is_not_known():
    rows = prediction_report.prediction_rows(measured())
    text = "\n".join(f"{name} {row}" for name, row in rows)
    assert "2 s a step, 100,000 tokens/s; MFU 50.0%, HFU 60.0%" in text
    assert "75.0%  products, at 80% of peak" in text
    assert "optimizer" not in text  # a twentieth of a percent
    assert "36     1.00 MiB  wait all-gather data  mtnlg_jax/model/mlp.py:42" in text
    assert "attention_forward: taken at half of peak" in text and "throttling" in text
    assert prediction_report.prediction_rows(dataclasses.replace(measured(), predicted=None)) == []


def test_prediction_beyond_what_is_published_stands_in_parentheses():
    m = measured()
    m.predicted.mfu = 0.75
    assert prediction_report.prediction_rows(m)[0][1] == (
        "(2 s a step, 100,000 tokens/s; MFU 75.0%, HFU 60.0%) beyond the best published MFU of "
        "v5p, 71.5%"
    )


def test_prediction_survives_json():
    written = json.loads(aot.to_text(measured()))
    assert aot.from_dict(written).predicted == measured().predicted


@pytest.mark.parametrize("kind", ["tpu7x:2x2x1", "cpu:8"])
def test_chips_without_figures_are_refused_before_compiling(kind):
    with pytest.raises(ValueError, match="no figures of the clock.*choose one of A100,.*v5e, v5p"):
        prediction.check(topology.parse(kind), "train")


def test_other_steps_are_refused():
    with pytest.raises(ValueError, match="--time predicts train steps, not --step=decode"):
        prediction.check(topology.parse("v5p:4x4x4"), "decode")


def test_program_without_estimates_is_refused():
    with pytest.raises(ValueError, match="wrote no estimates"):
        prediction.simulate("HloModule m", topology.parse("v5p:2x2x1"), [], {}, lambda depth: 1)


@pytest.mark.parametrize(
    "text, named",
    [
        ("v5p:3x5x7", "v5p:4x4x4 and v5p:4x4x8"),
        ("v5e:4x16", "v5e:8x8 and v5e:8x16"),
        ("v5p:8x14x20", "v5p:4x20x28 and v5p:12x12x16"),
    ],
)
def test_dims_of_no_slice_are_refused_with_the_nearest(text, named):
    with pytest.raises(ValueError, match="no slice has these dims; the nearest have") as error:
        prediction.check(topology.parse(text), "train")
    assert str(error.value).endswith(named)


def test_slices_that_exist_are_taken():
    for text in ("v5p:2x2x1", "v5p:8x8x16", "v5e:16x16", "v6e:2x4", "v4:4x4x8", "H100:280x8"):
        prediction.check(topology.parse(text), "train")
    assert str(topology.slice_of("v5p", 1024)) == "v5p:8x8x16"
    assert str(topology.slice_of("v6e", 256)) == "v6e:16x16"
    with pytest.raises(ValueError, match="no v6e slice has 100 chips; the nearest have 64 and 128"):
        topology.slice_of("v6e", 100)
