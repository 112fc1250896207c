"""Check the planner's memory and time of moments and activations that wait on the host."""

import json
from pathlib import Path

import pytest

from mtnlg_jax.config import load_config
from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.parallel.mesh import AXES
from mtnlg_jax.planning import suggest
from mtnlg_jax.planning.cost import Job
from mtnlg_jax.planning.layout import layout_of
from mtnlg_jax.planning.moments import moments_of
from mtnlg_jax.planning.tensor_table import tensor_table
from mtnlg_jax.planning.topology import parse

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
COMPILED = json.loads((ROOT / "benchmarks/results/offload.json").read_text())


def config(*settings):
    return load_config(str(ROOT / COMPILED["config"]), [*COMPILED["layout"], *settings])


def job(*settings):
    return Job(config(*settings), CHIPS["v5e"]), layout_of(config(*settings), 8)


@pytest.mark.parametrize("row", COMPILED["rows"], ids=lambda row: " ".join(row["set"]))
def test_plans_are_near_what_the_compiler_says(row):
    planner, layout = job(*row["set"])
    needed = sum(planner.memory(layout).values()) / GIB
    assert 0.8 * row["needed_gib"] < needed < 1.1 * row["needed_gib"]
    host = sum(planner.host(layout).values()) / GIB
    assert host == pytest.approx(row["host_gib_per_device"], rel=0.01)
    assert row["fits"] == any("offload=moments" in each or "both" in each for each in row["set"])


def test_moments_cross_the_link_twice_a_step():
    planner, layout = job("train.offload=moments")
    seconds = planner.seconds(layout)[0]
    # m and v of the matrices in float32, of 8 devices; vectors are a thousandth.
    expected = 2 * 8 * planner.config.model.parameter_count() / 8 / 12.5e9
    assert seconds["host"] == pytest.approx(expected, rel=2e-3)
    assert job()[0].seconds(layout)[0]["host"] == 0
    eighth = job("train.offload=moments", "optimizer.moments_dtype=int8")[0].seconds(layout)[0]
    assert eighth["host"] < 0.3 * seconds["host"]


EXPERTS = ["model.moe.num_moe_experts=8", "model.moe.moe_shared_expert_intermediate_size=192"]


@pytest.mark.parametrize(
    "settings",
    [
        [*EXPERTS, "model.moe.moe_shared_expert_gate=True"],
        ["model.prefix.image_size=64", "model.prefix.width=512"],
    ],
    ids=["experts", "prefix"],
)
def test_matrices_without_blocks_are_counted(settings):
    whole, packed = (
        moments_of(config(*settings, f"optimizer.moments_dtype={dtype}"), dict.fromkeys(AXES, 1), 0)
        for dtype in ("float32", "int8")
    )
    assert packed.device < 0.3 * whole.device


def test_activations_cost_time_only_beyond_the_products():
    few = job("train.offload=activations", "train.recompute=full")
    assert few[0].seconds(few[1])[0]["host"] == 0
    many, layout = job("train.offload=activations", "train.recompute=none")
    assert many.seconds(layout)[0]["host"] > 0
    plain = job("train.recompute=none")[0].memory(layout)["layers"]
    assert many.memory(layout)["layers"] < 0.1 * plain
    assert many.host(layout)["activations"] == pytest.approx(plain, rel=0.1)


def test_activations_of_every_chunk_of_a_stage_cross_the_link():
    planner, layout = job("train.offload=activations", "train.recompute=none")
    layout = layout._replace(data=2, pipe=4, zero=1)
    on_link = []
    for chunks in (1, 2, 4):
        seconds = planner.seconds(layout._replace(virtual_pipe=chunks))[0]
        assert seconds["host"] > 0
        # Products hide the rest of it.
        on_link.append(seconds["host"] + seconds["compute"] + seconds["recompute"])
    assert on_link == pytest.approx([on_link[0]] * 3)


def test_offload_of_both_is_suggested_where_one_part_is_on_the_host():
    for part in ("activations", "moments"):
        started = config(f"train.offload={part}", "optimizer.moments_dtype=bfloat16")
        found = suggest.suggest(started, parse("v5e:2x4"), 8, 20 * GIB, 19 * GIB, "train")
        flags = [" ".join(change.flags) for change in found]
        assert "--set=train.offload=both" in flags
        assert "--set=train.offload=moments" not in flags


def test_offload_is_suggested_as_a_way_out():
    changes = suggest.suggest(config(), parse("v5e:2x4"), 8, int(20.93 * GIB), 15 * GIB, "train")
    flags = [" ".join(change.flags) for change in changes]
    assert flags[:2] == ["--set=train.offload=moments", "--set=train.offload=both"]


def test_the_table_of_tensors_names_types_and_the_host():
    table = tensor_table(config("train.offload=moments", "optimizer.moments_dtype=bfloat16"))
    assert "GiB of its host for each device: moments 3.48\n" in table
    assert "moments are bfloat16, masters and gradients are float32" in table


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.ffn_hidden_size=16400"], "ffn_hidden_size=16400 is not a multiple of 64"),
        (
            ["model.ffn_hidden_size=16448", "mesh.tensor=16", "mesh.data=1"],
            "ffn_hidden_size=16448, in blocks of 8 .*=2056 is not divisible by mesh.tensor=16",
        ),
        (
            [*EXPERTS, "mesh.tensor=16", "mesh.data=1"],
            "shared_expert_intermediate_size=192, in blocks of 8 .*=24 is not divisible by mesh.te",
        ),
        (
            ["optimizer.lora_rank=8", "train.init=runs/other"],
            "factors of optimizer.lora_rank=8 have no blocks; set it to bfloat16",
        ),
        (
            ["optimizer.name=soap", "train.offload=both"],
            "offload=both takes .* one parameter after the other, and optimizer.name=soap",
        ),
        (["optimizer.moments_dtype=int4"], "moments_dtype='int4'; choose one of float32, bfloat16"),
        (["train.offload=weights"], "offload='weights'; choose one of none, moments"),
    ],
)
def test_what_cannot_work_is_an_error(settings, words):
    with pytest.raises(ValueError, match=words):
        config("optimizer.moments_dtype=int8", *settings)
