"""Names of described accelerators, and the environment of a process that compiles for them."""

import importlib.util
import os
from pathlib import Path

import jax
import pytest

from mtnlg_jax.ahead import topology
from mtnlg_jax.ahead.topology import GPUS, Topology, card, check_installed, environment, mesh_over, parse
from mtnlg_jax.config import MeshConfig


@pytest.mark.parametrize(("text", "topology", "chips", "platform"), [
    ("v5p:8x8x16", Topology("v5p", (8, 8, 16)), 1024, "tpu"),
    ("v5e:16x16", Topology("v5e", (16, 16)), 256, "tpu"),
    ("V6E:16x16*4", Topology("v6e", (16, 16), 4), 1024, "tpu"),
    ("h100:280x8", Topology("H100", (280, 8)), 2240, "cuda"),
    ("B200:2x8*3", Topology("B200", (2, 8), 3), 48, "cuda"),
    ("cpu:8", Topology("cpu", (8,)), 8, "cpu"),
])
def test_a_name_is_read_and_written_back(text, topology, chips, platform):
    read = parse(text)
    assert (read, read.chips, read.platform) == (topology, chips, platform)
    assert str(read).lower() == text.lower()


@pytest.mark.parametrize(("text", "says"), [
    ("v9:2x2", "not known.*v5p:8x8x16.*KIND is one of v5e"),
    ("v5p", "not known"),
    ("v5p:8x8", "v5p has 3 sizes.*v5p:2x2x2"),
    ("v5e:2x2x2", "v5e has 2 sizes"),
    ("H100:16", "H100 has 2 sizes"),
    ("v5e:0x4", "at least 1"),
    ("v5e:4x4*0", "at least 1"),
    ("cpu:4*2", "write cpu:8"),
])
def test_a_name_that_means_nothing_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_the_environment_is_the_childs_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_force_host_platform_device_count=4")
    before = dict(os.environ)
    assert environment(parse("cpu:6"))["XLA_FLAGS"] == "--xla_dump_to=x --xla_force_host_platform_device_count=6"
    tpu = environment(parse("v5p:2x2x1"))
    assert tpu["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1" and tpu["JAX_PLATFORMS"] == "cpu"
    assert dict(os.environ) == before


def test_a_missing_compiler_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(topology, "APART", Path("nowhere"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"compiling for v5e needs libtpu.*\[ahead\]"):
        check_installed(parse("v5e:2x2"))
    check_installed(parse("cpu:2"))


@pytest.mark.parametrize("kind", GPUS)
def test_every_card_is_described(kind):
    text = card(parse(f"{kind}:1x8"))
    assert 'platform_name: "CUDA"' in text and "device_memory_size: " in text and kind in text
    assert text.count("{") == text.count("}")


def test_another_description_takes_the_cards_place(tmp_path):
    (tmp_path / "card.txtpb").write_text("device_memory_size: 7")
    assert card(parse("H100:1x8"), str(tmp_path / "card.txtpb")) == "device_memory_size: 7"


def test_the_mesh_is_the_projects_own_and_its_sizes_are_checked():
    mesh = mesh_over(MeshConfig(tensor=2), parse("cpu:8"), jax.devices())
    assert dict(mesh.shape) == {"pipe": 1, "data": 4, "context": 1, "tensor": 2}
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        mesh_over(MeshConfig(tensor=3, data=2), parse("cpu:8"), jax.devices())
