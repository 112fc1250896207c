"""Check names of described accelerators, and the environment of a compiling process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.planning import topology
from mtnlg_jax.planning.topology import (
    GPUS,
    Topology,
    card,
    check_installed,
    environment,
    mesh_over,
    parse,
)


@pytest.mark.parametrize(
    ("text", "topology", "chips", "platform"),
    [
        ("v5p:8x8x16", Topology("v5p", (8, 8, 16)), 1024, "tpu"),
        ("v5e:16x16", Topology("v5e", (16, 16)), 256, "tpu"),
        ("V6E:16x16*4", Topology("v6e", (16, 16), 4), 1024, "tpu"),
        ("v4:4x4x8", Topology("v4", (4, 4, 8)), 128, "tpu"),
        ("h100:280x8", Topology("H100", (280, 8)), 2240, "cuda"),
        ("B200:2x8*3", Topology("B200", (2, 8), 3), 48, "cuda"),
        ("cpu:8", Topology("cpu", (8,)), 8, "cpu"),
    ],
)
def test_a_name_is_read_and_written_back(text, topology, chips, platform):
    read = parse(text)
    assert (read, read.chips, read.platform) == (topology, chips, platform)
    assert str(read).lower() == text.lower()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v9:2x2", "unknown topology.*v5p:8x8x16.*KIND is one of v4, v5e"),
        ("v5p", "unknown topology"),
        ("v5p:8x8", "v5p has 3 sizes.*v5p:2x2x2"),
        ("v5e:2x2x2", "v5e has 2 sizes"),
        ("H100:16", "H100 has 2 sizes"),
        ("v5e:0x4", "at least 1"),
        ("v5e:4x4*0", "at least 1"),
        ("cpu:4*2", "write cpu:8"),
    ],
)
def test_an_unknown_name_raises_an_error(text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_only_the_environment_of_the_child_changes(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_force_host_platform_device_count=4")
    before = dict(os.environ)
    assert (
        environment(parse("cpu:6"))["XLA_FLAGS"]
        == "--xla_dump_to=x --xla_force_host_platform_device_count=6"
    )
    tpu = environment(parse("v5p:2x2x1"))
    assert tpu["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1" and tpu["JAX_PLATFORMS"] == "cpu"
    assert dict(os.environ) == before


def test_a_missing_compiler_raises_an_error_with_its_package(monkeypatch):
    monkeypatch.setattr(topology, "APART", Path("nowhere"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"compiling for v5e needs libtpu.*\[ahead\]"):
        check_installed(parse("v5e:2x2"))
    check_installed(parse("cpu:2"))


@pytest.mark.parametrize("kind", GPUS)
def test_every_gpu_is_described(kind):
    text = card(parse(f"{kind}:1x8"))
    assert 'platform_name: "CUDA"' in text and "device_memory_size: " in text and kind in text
    assert text.count("{") == text.count("}")


def test_a_given_description_replaces_the_default(tmp_path):
    (tmp_path / "card.txtpb").write_text("device_memory_size: 7")
    assert card(parse("H100:1x8"), str(tmp_path / "card.txtpb")) == "device_memory_size: 7"


def test_the_mesh_is_built_and_checked_like_that_of_a_run():
    mesh = mesh_over(MeshConfig(tensor=2), parse("cpu:8"), jax.devices())
    assert dict(mesh.shape) == {"pipe": 1, "data": 4, "expert": 1, "context": 1, "tensor": 2}
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        mesh_over(MeshConfig(tensor=3, data=2), parse("cpu:8"), jax.devices())


# --- the torus


@pytest.mark.parametrize(
    ("text", "wrap"),
    [
        ("v5p:4x4x4", (True, True, True)),
        ("v5p:8x8x16", (True, True, True)),
        ("v4:4x4x12", (True, True, True)),
        ("tpu7x:4x8x8", (True, True, True)),
        ("v5p:8x8x8*2", (True, True, True)),
        ("v5p:2x2x1", (False, False, False)),
        ("v4:2x2x4", (False, False, False)),  # parts of a cube
        ("v5p:2x4x4", (False, False, False)),
        ("v5p:8x14x20", (False, False, False)),
        ("v5e:16x16", (True, True, False)),
        ("v5e:8x16", (False, True, False)),
        ("v6e:16x8", (True, False, False)),
        ("v6e:8x8", (False, False, False)),
        ("v6e:16x16*4", (True, True, False)),
        ("v5e:4x4", (False, False, False)),
    ],
)
def test_a_slice_is_described_with_its_real_links(text, wrap, monkeypatch):
    asked = []
    from jax.experimental import topologies

    monkeypatch.setattr(
        topologies,
        "get_topology_desc",
        lambda **given: asked.append(given) or SimpleNamespace(devices=[]),
    )
    topology.devices(parse(text))
    assert [given["wrap"] for given in asked] == [wrap]


# The algorithms that the compiler chooses for groups of a described slice, one line each.
_ALGORITHMS = r"""
import json, os, re, sys
import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from mtnlg_jax.planning.topology import devices, mesh_over, parse
from mtnlg_jax.config import MeshConfig

for text, data, tensor in json.loads(sys.argv[1]):
    described = devices(parse(text))
    mesh = mesh_over(MeshConfig(pipe=1, data=data, tensor=tensor), parse(text), described)
    found = [len(described)]
    for send, out in ((lax.all_gather, P()), (lax.psum_scatter, P("data"))):
        region = jax.shard_map(
            lambda x: send(x, "data", tiled=True),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=out,
            check_vma=False,
        )
        x = jax.ShapeDtypeStruct((8192, 4096), "bfloat16", sharding=NamedSharding(mesh, P("data")))
        written = jax.jit(region).lower(x).compile().as_text()
        found += re.findall(r'"emitter":"(\w*AllGather\w*)"|(Strategy\w*)\{', written)[:1]
    print(json.dumps(found))
"""


def test_the_compiler_uses_two_dims_of_the_torus_for_a_group():
    described = parse("v5p:4x4x4")
    try:
        check_installed(described)
    except ValueError as error:
        pytest.skip(str(error))
    # 16 chips of 64 as a plane with wraparound links; of 32, which have none, as one ring
    # through all. A v4 has one device a chip.
    asked = [["v5p:4x4x4", 16, 4], ["v5p:2x4x4", 16, 2], ["v4:4x4x4", 16, 4], ["v5e:8x16", 16, 8]]
    done = subprocess.run(
        [sys.executable, "-c", _ALGORITHMS, json.dumps(asked)],
        env=environment(described),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr
    closed, open_, v4, flat = [json.loads(line) for line in done.stdout.splitlines()]
    assert closed[0] == v4[0] == 64 and open_[0] == 32 and flat[0] == 128
    for found in (closed, v4):
        assert found[1][0].startswith("2DAllGather") and found[2][1] == "StrategySubgroupND"
    assert open_[1][0].startswith("1DAllGather") and open_[2][1] == "StrategyRing"
    assert flat[1][0].startswith("1DAllGather")
