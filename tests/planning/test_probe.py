"""Check the small program used to try flags: it has the same collectives as a run, on the same
axes."""

import math

import pytest

from mtnlg_jax import xla_flags
from mtnlg_jax.config import MeshConfig
from mtnlg_jax.planning.probe import lower, sizes_of
from mtnlg_jax.planning.topology import parse

# The name of each kind in a program before compilation.
WRITTEN = {
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-reduce": "all_reduce",
    "all-to-all": "all_to_all",
    "collective-permute": "collective_permute",
}
MESHES = {
    "one device": MeshConfig(pipe=1, data=1, tensor=1),
    "zero 0": MeshConfig(pipe=1, data=-1, tensor=1, zero=0),
    "zero 3, tensor": MeshConfig(pipe=1, data=-1, tensor=4, zero=3),
    "pipeline": MeshConfig(pipe=4, data=1, tensor=1),
    "ring": MeshConfig(pipe=1, data=1, tensor=1, context=4, context_mode="ring"),
    "all axes": MeshConfig(pipe=2, data=-1, context=2, tensor=4, zero=1),
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("devices", [8, 64, 128])
def test_axes_without_traffic_have_one_device(mesh, devices):
    sent = xla_flags.collectives_of(mesh)
    sizes = sizes_of(sent, devices)
    assert math.prod(sizes.values()) == devices
    if sent and devices > 8:
        assert {axis for axis, size in sizes.items() if size > 1} == {axis for _, axis in sent}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_the_program_has_every_collective_of_the_run(mesh):
    sent = {kind for kind, _ in xla_flags.collectives_of(mesh)}
    text = lower(parse("cpu:8"), xla_flags.collectives_of(mesh)).as_text()
    found = {kind for kind, name in WRITTEN.items() if f"stablehlo.{name}" in text}
    # The loss is one sum over all devices on every mesh; the transpose of a sum may be a gather.
    assert sent <= found | {"all-reduce"} and found <= sent | {
        "all-reduce",
        "all-gather",
        "reduce-scatter",
    }
    assert "stablehlo.while" in text
