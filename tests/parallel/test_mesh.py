"""Check which dim is split over which axis, and the errors if sizes do not fit."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import MeshConfig, ModelConfig
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel import mesh
from mtnlg_jax.parallel.mesh import (
    AXES,
    ROWS,
    axes_in,
    dims_of,
    make_mesh,
    plan_table,
    shardings_of,
    spec_of,
    specs_of,
)

SMALL = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "vocab_size": 24,
    "max_position_embeddings": 12,
}
EVERY_SWITCH = ModelConfig(**SMALL, activation="swiglu", num_query_groups=2, tie_embeddings=False)


@pytest.mark.parametrize(
    ("dims", "zero", "spec"),
    [
        ("VD", 1, P("tensor", ROWS)),
        ("VD", 0, P("tensor", None)),
        ("VD", 3, P("tensor", ROWS)),
        ("LDNH", 1, P("pipe", ROWS, "tensor", None)),
        ("LDKH", 1, P("pipe", ROWS, "tensor", None)),
        ("LNHD", 1, P("pipe", "tensor", None, ROWS)),
        ("LDF", 1, P("pipe", ROWS, "tensor")),
        ("LEDF", 1, P("pipe", "expert", "data", "tensor")),
        ("LEFD", 0, P("pipe", "expert", "tensor", None)),
        ("LDE", 1, P("pipe", ROWS, None)),  # a router
        ("LF", 0, P("pipe", "tensor")),
        ("PD", 1, P(None, ROWS)),
        ("D", 1, P(ROWS)),
        ("D", 0, P(None)),
        ("LHPR", 1, P("pipe", None, None, None)),
        ("", 1, P()),
    ],
)
def test_the_table_gives_the_spec(dims, zero, spec):
    assert spec_of(dims, zero) == spec


@pytest.mark.parametrize(
    ("dims", "axis"),
    [("VF", "tensor"), ("NK", "tensor"), ("FHF", "tensor"), ("DD", "data"), ("EED", "expert")],
)
def test_an_axis_used_twice_raises_an_error(dims, axis):
    with pytest.raises(
        ValueError, match=f"'{dims}' would use mesh axis '{axis}' twice; name its dims differently"
    ):
        spec_of(dims)


def test_two_widths_are_allowed_if_width_is_not_split():
    assert spec_of("DD", zero=0) == P(None, None)


@pytest.mark.parametrize("dims", ["DX", "d", "D_"])
def test_a_dim_outside_the_plan_raises_an_error(dims):
    with pytest.raises(
        ValueError, match=f"of '{dims}' is not in the plan; add a row to AXIS_OF or UNSPLIT"
    ):
        spec_of(dims)


def test_parameter_names_match_the_plan_and_their_dims():
    params = abstract_model(EVERY_SWITCH)[1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dims = dims_of(path)
        assert len(dims) == leaf.ndim and dims.startswith("L") == (
            "blocks" in jax.tree_util.keystr(path)
        )
        sizes = {"L": 2, "D": 16, "N": 4, "K": 2, "H": 4, "F": 64, "V": 24, "P": 12}
        assert tuple(sizes[dim] for dim in dims) == leaf.shape


def test_moments_are_split_like_their_parameters():
    params = abstract_model(EVERY_SWITCH)[1]
    state = {"params": params, "opt_state": [{"mu": params, "nu": params}], "step": jnp.int32(0)}
    specs = specs_of(state, zero=1)
    assert specs["opt_state"][0]["mu"] == specs["params"] == specs_of(params, zero=1)
    assert specs["step"] == P()


def test_an_indivisible_size_raises_an_error_with_a_remedy():
    params = abstract_model(EVERY_SWITCH)[1]
    for shape, zero, words in [
        (
            (1, 3, 1, 1, 1),
            1,
            r": D=16 is not divisible by data=3; try mesh.data=2 or 4, or mesh.zero=0$",
        ),
        (
            (1, 2, 3, 1, 1),
            1,
            r": D=16 is not divisible by data x expert=6; try mesh.data x mesh.expert=4 or 8, or "
            "mesh.zero=0$",
        ),
        ((1, 1, 1, 1, 3), 1, r"b_k_KH: K=2 is not divisible by tensor=3; try mesh.tensor=1 or 2$"),
    ]:
        with pytest.raises(ValueError, match=words):
            shardings_of(params, AbstractMesh(shape, AXES), zero)
    shardings_of(params, AbstractMesh((1, 3, 1, 1, 2), AXES), zero=0)  # the suggested setting works


def test_shardings_place_each_part_on_its_device():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    params = abstract_model(ModelConfig(**SMALL))[1]
    for leaf, sharding in zip(
        jax.tree.leaves(params), jax.tree.leaves(shardings_of(params, mesh)), strict=True
    ):
        share = math.prod(leaf.shape) / math.prod(sharding.shard_shape(leaf.shape))
        assert share == math.prod(
            mesh.shape[axis] for entry in sharding.spec for axis in axes_in(entry)
        )


def test_the_plan_table_accounts_for_every_byte():
    config = ModelConfig(**SMALL)
    rows = plan_table(abstract_model(config)[1], dict(zip(AXES, (2, 2, 1, 3, 4), strict=True)))
    assert sum(math.prod(row.shape) for row in rows) == config.parameter_count()
    table = {row.path: row for row in rows}
    assert table["blocks.mlp.w_in_DF"] == (
        "blocks.mlp.w_in_DF",
        "LDF",
        (2, 16, 64),
        P("pipe", ROWS, "tensor"),
        (1, 8, 16),
        4 * 8 * 16,
    )
    assert table["final_norm.bias_D"].bytes == 4 * 16 // 2


# --- make_mesh


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1, 1, 1)),
        (MeshConfig(tensor=4), (1, 2, 1, 1, 4)),
        (MeshConfig(data=1, tensor=8), (1, 1, 1, 1, 8)),
        (MeshConfig(data=4, tensor=2), (1, 4, 1, 1, 2)),
        (MeshConfig(expert=4), (1, 2, 4, 1, 1)),
        (MeshConfig(pipe=2, context=2, tensor=2), (2, 1, 1, 2, 2)),
    ],
)
def test_a_mesh_uses_all_devices_with_explicit_axis_types(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES and tuple(mesh.shape.values()) == sizes
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_of_some_devices():
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[2:6])
    assert tuple(mesh.shape.values()) == (1, 2, 1, 1, 2)
    assert set(mesh.devices.flat) == set(jax.devices()[2:6])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            MeshConfig(data=3),
            r"data=3 .*tensor=1 does not fit 8 devices; their product must be 8 \(data=-1",
        ),
        (MeshConfig(data=4, tensor=4), "data=4 .*tensor=4 does not fit 8 devices"),
        (MeshConfig(data=2, tensor=2), "does not fit 8 devices"),
        (MeshConfig(tensor=3), "tensor=3 does not fit 8 devices"),
        (MeshConfig(tensor=16), "tensor=16 does not fit 8 devices"),
        (MeshConfig(pipe=3), "pipe=3 .* does not fit 8 devices"),
        (MeshConfig(context=4, data=4), "context=4 .* does not fit 8 devices"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_raise_an_error(config, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(config)


def test_the_parallelism_page_shows_the_table():
    table = [line for line in mesh.__doc__.splitlines() if line.startswith("|")]
    page = (Path(__file__).resolve().parents[2] / "docs/parallelism.md").read_text().splitlines()
    start = page.index(table[0])
    assert len(table) > 8 and page[start : start + len(table)] == table


@pytest.mark.parametrize(
    ("kind", "extent", "data", "tensor"),
    [("TPU v6 lite", (16, 16, 1), 128, 2), ("TPU v5p", (4, 4, 4), 32, 2)],
)
def test_axes_share_a_dim_of_the_torus(described_tpus, kind, extent, data, tensor):
    found = make_mesh(MeshConfig(data=data, tensor=tensor), described_tpus(kind, extent))
    assert found.shape["data"] == data
    neighbors = [device.coords for device in found.devices[0, 0, 0, 0]]
    assert sum(abs(a - b) for a, b in zip(*neighbors, strict=True)) == 1
