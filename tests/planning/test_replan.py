"""Plan the mesh of what is left of a run."""

import dataclasses

import pytest

from mtnlg_jax.config import Config, ModelConfig, TrainConfig, override, validate, validate_batch
from mtnlg_jax.planning import replan
from mtnlg_jax.planning.cost import Job
from mtnlg_jax.planning.layout import layout_of
from mtnlg_jax.planning.search import lean_layouts, with_layout

CONFIG = Config(
    name="small",
    model=ModelConfig(
        num_layers=6,
        hidden_size=384,
        num_attention_heads=4,
        vocab_size=1024,
        max_position_embeddings=256,
    ),
    train=TrainConfig(global_batch_size=12),
)


@pytest.mark.parametrize(
    ("devices", "node", "nodes"),
    [
        (12, 4, 3),
        (8, 4, 2),
        (4, 4, 1),
        (28, 4, 6),  # 7 divides neither layers nor batch nor heads: one node stays idle
        (10, 2, 4),
    ],
)
def test_the_mesh_fills_whole_nodes_and_takes_the_batch(devices, node, nodes):
    found, layout, _ = replan.replan(CONFIG, devices, node, None)
    assert found == nodes and layout.devices == nodes * node
    config = with_layout(CONFIG, layout)
    validate(config)
    validate_batch(config, layout.rows)
    assert config.train.global_batch_size == CONFIG.train.global_batch_size
    line, told = replan.line_of(CONFIG, found, layout)
    number, *flags = line.split()
    assert int(number) == nodes and f"{nodes} nodes, {layout.devices} devices: pipe" in told
    # The flags give the config of the layout.
    assert override(CONFIG, *(flag.removeprefix("--set=") for flag in flags)) == config


def test_where_no_mesh_fits_numbers_that_would_do_are_named():
    with pytest.raises(
        ValueError, match=r"no mesh of 7 devices .* 6, 4, 3, 2 of them would do, in"
    ):
        replan.replan(CONFIG, 7, 7, None)


def test_memory_is_a_limit_where_the_kind_of_chip_is_known():
    model = dataclasses.replace(CONFIG.model, num_layers=47, hidden_size=8192)
    large = dataclasses.replace(CONFIG, model=dataclasses.replace(model, num_attention_heads=64))
    assert replan.replan(large, 8, 4, None)[0] == 2
    with pytest.raises(ValueError, match=r"no mesh of 8 H100 chips in nodes of 4 .* would do"):
        replan.replan(large, 8, 4, "H100")
    with pytest.raises(ValueError, match="unknown kind of chip 'H1'; choose one of"):
        replan.replan(large, 8, 4, "H1")


@pytest.mark.parametrize("data", [-1, 16])
def test_without_a_kind_the_mesh_takes_no_more_memory_than_the_config_s_own(data):
    mesh = dataclasses.replace(CONFIG.mesh, data=data, zero=3)
    train = dataclasses.replace(
        CONFIG.train, global_batch_size=64, micro_batch_size=4, recompute="mlp"
    )
    config = dataclasses.replace(CONFIG, mesh=mesh, train=train)
    job = Job(config, None)
    own = job.bytes(layout_of(config, 16))
    fastest = replan.replan(config, 8, 4, "H100")[1]
    nodes, layout, note = replan.replan(config, 8, 4, None, 16)
    assert nodes == 2 and not note
    assert job.bytes(layout) <= own < job.bytes(fastest)


def test_without_a_kind_the_leanest_mesh_is_the_last_resort():
    mesh = dataclasses.replace(CONFIG.mesh, data=12, zero=3)
    train = dataclasses.replace(CONFIG.train, micro_batch_size=1, recompute="full")
    config = dataclasses.replace(CONFIG, mesh=mesh, train=train)
    nodes, layout, note = replan.replan(config, 3, 1, None)
    job = Job(config, None)
    least = min(map(job.bytes, (each for each in lean_layouts(job, 3) if each.devices == 3)))
    assert nodes == 3 and job.bytes(layout) == least > job.bytes(layout_of(config))
    assert note.startswith("; no mesh takes as little memory as the config's own, ")
    assert replan.line_of(config, nodes, layout, note)[1].endswith("--kind=CHIP gives the limit")
    # 5 devices do not take the batch by mesh.data alone, so nothing is known of their memory.
    mesh = dataclasses.replace(mesh, data=-1)
    config = dataclasses.replace(config, mesh=mesh)
    assert "the memory is not known" in replan.replan(config, 5, 1, None)[2]


def test_the_mesh_has_replicas_where_the_run_compares_them():
    train = dataclasses.replace(CONFIG.train, verify_every=10, global_batch_size=2)
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(train, verify_every=0))
    assert replan.replan(config, 6, 1, "H100")[1].data == 1
    config = dataclasses.replace(CONFIG, train=train)
    for kind in ("H100", None):
        assert replan.replan(config, 6, 1, kind)[1].data == 2
    with pytest.raises(ValueError, match="and the replicas of train.verify_every=10 of small; 2,"):
        replan.replan(config, 1, 1, None)
