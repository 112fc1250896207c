"""Count the collectives of a step in the compiled program, with the trip counts of its loops."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import axes_in, make_mesh, specs_of
from mtnlg_jax.planning.hlo import Program
from mtnlg_jax.planning.hlo_cost import cost_of
from mtnlg_jax.train.batch import abstract_batch
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.state import abstract_state

# Without biases, which are not split over tensor and take a third longer to compile.
MODEL = ModelConfig(
    num_layers=8,
    hidden_size=32,
    num_attention_heads=4,
    vocab_size=128,
    max_position_embeddings=32,
    normalization="rmsnorm",
    add_bias=False,
)
MICRO_BATCHES = 8
SCHEDULES = {"circular": {}, "interleaved": {"virtual_pipe": 2}, "1f1b": {"schedule": "1f1b"}}


@functools.cache
def collectives(recompute="elementwise", **mesh):
    """Return {(kind, axes, in a loop): count} of loss and gradients on a mesh of 8 devices."""
    config = Config(
        model=MODEL,
        mesh=MeshConfig(data=2, **mesh),
        train=TrainConfig(
            global_batch_size=2 * MICRO_BATCHES,
            micro_batch_size=1,
            compute_dtype="float32",
            recompute=recompute,
        ),
    )
    on = make_mesh(config.mesh)
    key = jax.random.key_data(jax.random.key(0))
    step = jax.jit(make_loss_and_gradients(config, on, causal=True))
    params = abstract_state(config, on).params
    batch = abstract_batch(config, on)
    compiled = step.lower(params, batch, jnp.int32(MICRO_BATCHES), key).compile()
    # Only the loop over micro-batches has a traced trip count; 1F1B also fills and drains in it.
    trips = MICRO_BATCHES + (2 * (on.shape["pipe"] - 1) if config.mesh.schedule == "1f1b" else 0)
    rows = cost_of(Program(compiled.as_text()), dict(on.shape), lambda depth: trips).collectives
    counts = {}
    for row in rows:
        counts[row.kind, row.axes, row.depth] = (
            counts.get((row.kind, row.axes, row.depth), 0) + row.count
        )
    return counts


# Slow: circular, which is interleaved with one round.
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"pipe": 2, "tensor": 2}, marks=pytest.mark.slow),
        {"pipe": 2, "tensor": 2, **SCHEDULES["interleaved"]},
        pytest.param({"pipe": 2, "tensor": 2, **SCHEDULES["1f1b"]}, marks=pytest.mark.slow),
        {"tensor": 4},
        pytest.param({"context": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_zero_gathers_weights_once_and_scatters_gradients_once(mesh):
    counts = collectives(**{"zero": 1} | mesh)
    assert not [key for key in counts if "data" in key[1] and key[2] > 0]
    split = sum(
        any("data" in axes_in(entry) for entry in spec)
        for spec in jax.tree.leaves(
            specs_of(abstract_model(MODEL)[1]), is_leaf=lambda x: isinstance(x, P)
        )
    )
    assert counts["all-gather", ("data",), 0] == counts["reduce-scatter", ("data",), 0] == split


def test_zero_3_gathers_and_scatters_every_layer():
    counts = collectives("full", tensor=4, zero=3)
    assert counts["all-gather", ("data",), 2] > 8 * MICRO_BATCHES
    assert counts["reduce-scatter", ("data",), 2] > 8 * MICRO_BATCHES


# The stage of ZeRO changes what is sent over data alone. Slow: policies between elementwise and
# full, and one that keeps more than elementwise.
@pytest.mark.parametrize(
    ("recompute", "zero", "gathers", "scatters"),
    [
        ("elementwise", 1, 6, 4),
        ("full", 3, 6, 5),
        *(
            pytest.param(name, 1, 6, 4, marks=pytest.mark.slow)
            for name in ("none", "mlp", "projections")
        ),
    ],
)
def test_a_layer_gathers_and_scatters_the_documented_number_of_times(
    recompute, zero, gathers, scatters
):
    counts = collectives(recompute, tensor=4, zero=zero)
    layers = 8 * MICRO_BATCHES
    assert (
        counts["all-gather", ("tensor",), 2] / layers == gathers
    )  # forward 2, again for the backward 2, backward 2
    assert (
        counts["reduce-scatter", ("tensor",), 2] / layers == scatters
    )  # forward 2, again 0 or 1, backward 2


# A ring has a permute for each other device.
@pytest.mark.parametrize(
    ("recompute", "zero", "rings"),
    [
        ("full", 3, 9),  # forward 4, again 3, backward 2
        pytest.param("elementwise", 1, 6, marks=pytest.mark.slow),
    ],
)
def test_rings_take_the_place_of_gathers_and_sums_over_tensor(recompute, zero, rings):
    counts = collectives(recompute, tensor=4, zero=zero, tp_comm_overlap=True)
    layers = 8 * MICRO_BATCHES
    assert counts["collective-permute", ("tensor",), 2] / layers == 3 * rings
    assert counts["all-gather", ("tensor",), 2] / layers == 4  # backward, for gradients of weights
    assert ("reduce-scatter", ("tensor",), 2) not in counts


@pytest.mark.parametrize(
    ("schedule", "ticks"),
    [pytest.param("circular", 9, marks=pytest.mark.slow), ("interleaved", 17)],
)
def test_collectives_of_a_flushing_pipeline(schedule, ticks):
    counts = collectives(pipe=2, tensor=2, **SCHEDULES[schedule])
    layers = ticks * 8 // 2 // (2 if schedule == "interleaved" else 1)
    assert counts["all-gather", ("tensor",), 2] / layers == 8
    assert counts["reduce-scatter", ("tensor",), 2] / layers == 6
    assert counts["collective-permute", ("pipe",), 1] == 4 * ticks


def test_1f1b_sends_once_a_tick_in_each_direction():
    assert collectives(pipe=2, tensor=2, schedule="1f1b")[
        "collective-permute", ("pipe",), 1
    ] == 2 * (MICRO_BATCHES + 2)
