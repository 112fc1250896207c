"""The points of benchmarks/gpu_calibration.py, their kept results and their table in the docs."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest

from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.planning import topology

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu_calibration.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def kept(script):
    return json.loads(script["RESULT"].read_text())["points"]


def test_points_are_steps_of_known_gpus(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, point in script["POINTS"].items():
        config = script["config_of"](point)
        chips = topology.parse(point.described).chips
        sizes = script["sizes_of"](point)
        assert math.prod(sizes.values()) == chips, name
        rows = sizes["data"] * config.train.micro_batch_size
        assert config.train.global_batch_size % rows == 0, name
        assert 8 <= chips <= 1024, name


def test_published_seconds_follow_from_what_is_stated(script):
    # The page states 2,973 tokens/s and 58.2 % of the peak, by 6 N + 12 L H Q T.
    point = script["POINTS"]["titan-8b"]
    tokens = 64 * 8192
    flops = tokens * (6 * 8.03e9 + 12 * 32 * 4096 * 8192)
    share = flops / 64 / script["published_seconds"](point) / CHIPS["A100-80"].flops
    assert share == pytest.approx(0.582, abs=0.001)
    # Narayanan 2021: 137 TFLOP/s are 44 % of the peak, with the recomputed pass.
    rungs = script["POINTS"]["megatron-1.7b"]
    layers = 24
    width = 2304
    tokens = 512 * 2048
    flops = 8 * tokens * (12 * layers * width**2 + 2 * layers * width * 2048)
    flops += 6 * tokens * width * 51200
    share = flops / 32 / script["published_seconds"](rungs) / CHIPS["A100-80"].flops
    assert share == pytest.approx(0.44, abs=0.005)


def test_every_point_is_kept_and_stands_in_the_docs(script, kept, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert list(kept) == list(script["POINTS"])
    docs = (ROOT / "docs/predicted_step.md").read_text()
    for name, row in zip(kept, script["table"](kept).splitlines(), strict=True):
        assert row in docs, name
    for name, found in kept.items():
        assert found["command"] == script["about"](script["POINTS"][name])["command"], name


def test_unknown_point_is_one_line(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--points=gpt5"])
    with pytest.raises(SystemExit, match="^--points=gpt5 is not a point; choose from megatron-"):
        script["main"]()


@pytest.mark.parametrize("lacking", ["point", "settings", "program"])
def test_again_without_a_kept_point_is_one_line(script, kept, lacking, tmp_path, monkeypatch):
    points = {"mpt-7b": dict(kept["mpt-7b"]), "mpt-13b": kept["mpt-13b"]}
    if lacking == "point":
        del points["mpt-7b"]
    if lacking == "settings":
        points["mpt-7b"]["command"] = points["mpt-13b"]["command"]
    if lacking != "program":
        (tmp_path / "mpt-7b.hlo").touch()
    output = tmp_path / "result.json"
    output.write_text(json.dumps({"points": points}))
    flags = ["--points=mpt-7b", f"--output={output}", f"--again={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    wanted = "^--again needs mpt-7b .*; compile it first, with --points=mpt-7b --keep="
    with pytest.raises(SystemExit, match=wanted):
        script["main"]()
