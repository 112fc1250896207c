"""Hold the planner's links of a mesh axis against those of the simulated schedule."""

import numpy as np
import pytest

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.parallel.mesh import AXES, ROWS, make_mesh
from mtnlg_jax.planning import prediction
from mtnlg_jax.planning.layout import Layout
from mtnlg_jax.planning.timeline import Transfer
from mtnlg_jax.planning.topology import parse
from mtnlg_jax.planning.traffic import Network


def laid(described_tpus, slice_, config):
    """Return (chip, mesh, torus) of a described slice."""
    topology = parse(slice_)
    chip = CHIPS[topology.kind]
    described = described_tpus(chip.kinds[-1], (*topology.dims, 1)[:3])
    made = make_mesh(config, described)
    places = [device.coords for device in made.devices.flat]
    return chip, made, prediction.torus_between(topology, places, chip)


# (pipe, data, context, tensor)
@pytest.mark.parametrize(
    ("slice_", "mesh"),
    [
        ("v5p:4x4x4", (1, 64, 1, 1)),
        ("v5p:4x4x4", (1, 16, 1, 4)),
        ("v5p:4x4x4", (1, 32, 1, 2)),
        ("v5p:4x4x4", (1, 32, 2, 1)),
        ("v5p:8x8x16", (1, 128, 1, 8)),
        ("v5p:8x8x16", (1, 8, 2, 64)),
        ("v5p:8x8x16", (1, 8, 8, 16)),
        ("v5e:16x16", (1, 128, 1, 2)),
        ("v5e:16x16", (1, 64, 1, 4)),
        ("v6e:16x16", (8, 32, 1, 1)),
        ("v6e:8x8", (1, 64, 1, 1)),
    ],
)
def test_axes_have_the_links_of_the_mesh(described_tpus, slice_, mesh):
    pipe, data, context, tensor = mesh
    config = MeshConfig(pipe=pipe, data=data, context=context, tensor=tensor)
    chip, made, links = laid(described_tpus, slice_, config)
    layout = Layout(*mesh, 1, "circular", 1, None, 1, "none")
    numbers = np.arange(made.devices.size).reshape(made.devices.shape)
    for place, size in enumerate(made.devices.shape):
        if size == 1:
            continue
        group = np.moveaxis(numbers, place, -1).reshape(-1, size)[0]
        attributes = f"replica_groups={{{{{','.join(map(str, group))}}}}}"
        gather = Transfer("all-gather", AXES[place], size, 2**30, attributes)
        speed = Network(chip).speed(layout.sizes, AXES[place])
        assert links.seconds(gather) == pytest.approx(gather.sent / speed)


@pytest.mark.parametrize(
    ("slice_", "data", "expert"), [("v5p:4x4x4", 1, 64), ("v5p:4x4x8", 16, 8), ("v5p:4x4x4", 2, 32)]
)
def test_rows_have_the_links_of_data_and_expert(described_tpus, slice_, data, expert):
    chip, _, links = laid(described_tpus, slice_, MeshConfig(data=data, expert=expert))
    size = data * expert
    gather = Transfer(
        "all-gather",
        "rows",
        size,
        2**30,
        f"replica_groups={{{{{','.join(map(str, range(size)))}}}}}",
    )
    seconds = Network(chip).seconds((1, data, expert, 1, 1), ROWS)
    assert links.seconds(gather) == pytest.approx(2**30 * size * seconds)


# (pipe, data, context, tensor)
@pytest.mark.parametrize(
    ("slice_", "mesh", "axis"),
    [
        ("v5e:8x8", (8, 8, 1, 1), "pipe"),
        ("v5e:16x16", (8, 32, 1, 1), "pipe"),
        ("v5p:8x8x16", (8, 16, 1, 8), "pipe"),
        ("v5p:4x4x4", (16, 4, 1, 1), "pipe"),
        ("v6e:4x4", (4, 2, 1, 2), "pipe"),
        ("v5e:8x8", (1, 8, 8, 1), "context"),
    ],
)
def test_a_step_to_the_next_has_the_hops_of_the_mesh(described_tpus, slice_, mesh, axis):
    pipe, data, context, tensor = mesh
    config = MeshConfig(pipe=pipe, data=data, context=context, tensor=tensor)
    chip, made, links = laid(described_tpus, slice_, config)
    numbers = np.arange(made.devices.size).reshape(made.devices.shape)
    place = AXES.index(axis)
    start = np.moveaxis(numbers, place, -1).reshape(-1, made.devices.shape[place])[0]
    pairs = zip(start, np.roll(start, -1), strict=True)
    attributes = f"source_target_pairs={{{','.join(f'{{{a},{b}}}' for a, b in pairs)}}}"
    permute = Transfer("collective-permute", axis, 2**30, 2**30, attributes)
    sizes = Layout(*mesh, 1, "circular", 1, None, 1, "none").sizes
    assert links.seconds(permute) == pytest.approx(2**30 * Network(chip).hop(sizes, axis))
