"""Compare time and memory of a layout with published step times and with this repository's own
step."""

import collections
import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mtnlg_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
    load_config,
    override,
)
from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.model.hooks import RECOMPUTE
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.planning.cost import CIRCULAR_COPIES, Job
from mtnlg_jax.planning.layout import POLICIES, Layout, layout_of
from mtnlg_jax.planning.tiles import padded_size
from mtnlg_jax.train.batch import BATCH_KEYS
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.state import abstract_state

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
A100 = CHIPS["A100-80"]
PAPERS = Layout(
    35, 8, 1, 8, 0, "1f1b", 1, None, 1, "elementwise"
)  # a pipeline's stage is recomputed as a whole


@pytest.fixture(scope="module")
def mtnlg():
    return load_config(str(CONFIGS / "mtnlg_530b.py"), ["train.rampup_batch_size=None"])


# --- published step times


@pytest.mark.parametrize(("data", "seconds"), [(8, 60.1), (10, 50.2), (12, 44.4)])
def test_step_times_of_mtnlg_from_one_constant(mtnlg, data, seconds):
    assert Job(mtnlg, A100).estimate(PAPERS._replace(data=data)).step_seconds == pytest.approx(
        seconds, rel=0.03
    )


# Narayanan 2021, Table 1, TFLOP/s per GPU with the forward pass computed twice. Stages are
# interleaved if they can be divided.
@pytest.mark.parametrize(
    ("name", "rounds", "teraflops"),
    [
        ("1.7b", 1, 137),
        ("3.6b", 1, 138),
        ("7.5b", 1, 142),
        ("18.4b", 1, 135),
        ("39.1b", 4, 138),
        ("76.1b", 5, 140),
        ("145.6b", 5, 148),
        ("310.1b", 3, 155),
        ("529.6b", 3, 163),
        ("1008b", 2, 163),
    ],
)
def test_throughput_of_the_ladder_within_a_fifth(name, rounds, teraflops):
    config = load_config(str(CONFIGS / f"ladder.py:{name}"))
    layout = layout_of(config)
    if layout.pipe > 1:
        layout = layout._replace(virtual_pipe=rounds)
    job = Job(config, A100)
    flops = job.batch * job.sequence * (job.flops + config.model.num_layers * job.forward)
    seconds = job.estimate(layout).step_seconds
    assert flops / seconds / layout.devices / 1e12 == pytest.approx(teraflops, rel=0.2)


def test_utilization_equals_that_of_the_products(mtnlg):
    estimate = Job(mtnlg, A100).estimate(PAPERS)
    tokens = 1920 * 2048
    assert estimate.tokens_per_second == pytest.approx(tokens / estimate.step_seconds)
    assert estimate.mfu == pytest.approx(
        estimate.tokens_per_second * Job(mtnlg, A100).flops / (2240 * 312e12), rel=1e-12
    )
    # Narayanan's 96 B s l h^2 (1 + s/(6h) + V/(16 l h)) over PaLM's count, which has biases and
    # norms too.
    h = 20480
    s = 2048
    layers = 105
    vocabulary = 51200
    done = 96 * tokens * layers * h * h * (1 + s / (6 * h) + vocabulary / (16 * layers * h))
    assert estimate.hfu / estimate.mfu == pytest.approx(done / estimate.model_flops, rel=1e-3)


def test_the_bubble_equals_narayanan(mtnlg):
    for rounds in (1, 3):
        estimate = Job(mtnlg, A100).estimate(
            PAPERS._replace(schedule="circular", virtual_pipe=rounds)
        )
        # Micro-batches are padded to a multiple of the pipe; the head is outside.
        taken = 245
        used = 240
        ticks = taken + 34 / rounds
        inside = sum(
            estimate.seconds[name] for name in ("recompute", "tensor", "bubble", "compute")
        )
        assert estimate.seconds["bubble"] / inside == pytest.approx(
            (ticks - used) / ticks, rel=0.01
        )


# --- what the step does

WIDTH = 256
LENGTH = 64
LAYERS = 8
SMALL = Config(
    model=ModelConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=8,
        vocab_size=128,
        max_position_embeddings=LENGTH,
        attention_impl="xla",
    ),
    train=TrainConfig(global_batch_size=4, micro_batch_size=1),
)


def _count(jaxpr, times, found):
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        params = equation.params
        if name in ("all_gather", "reduce_scatter") and "tensor" in params["axis_name"]:
            found["collectives"] += times
        if name == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            size = math.prod(equation.outvars[0].aval.shape)
            found["flops"] += (
                times * 2 * size * math.prod(equation.invars[0].aval.shape[dim] for dim in summed)
            )
        for value in params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    _count(inner, times * params["length"] if name == "scan" else times, found)


def test_every_recompute_policy_has_a_cost():
    assert POLICIES.keys() == RECOMPUTE.keys()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(1, 1, 1, 2), MeshConfig(2, 1, 1, 2, schedule="1f1b")],
    ids=["plain", "piped"],
)
def test_collectives_and_products_of_a_layer_equal_the_step(mesh, policy):
    config = override(dataclasses.replace(SMALL, mesh=mesh), f"train.recompute={policy}")
    devices = make_mesh(mesh, jax.devices()[: mesh.pipe * 2])
    batch = {
        key: jax.ShapeDtypeStruct((4, 1, LENGTH), jnp.float32 if key == "weights" else jnp.int32)
        for key in BATCH_KEYS
    } | {"rows": jax.ShapeDtypeStruct((4, 1), jnp.int32)}
    step = make_loss_and_gradients(config, devices, causal=True)
    found = collections.Counter()
    piped = mesh.pipe > 1
    key_data = jax.random.key_data(jax.random.key(0))
    program = jax.make_jaxpr(step)(abstract_model(config.model)[1], batch, 4, key_data)
    _count(program.jaxpr, 1, found)  # of one micro-batch or tick

    job = Job(config, A100)
    once = LENGTH * job.forward / 2
    layers = LAYERS / mesh.pipe
    again = sum(job.layer[name] for name in POLICIES[policy].again) / job.forward + piped
    head = LENGTH * job.head / 2
    # XLA's own attention may count scores once more or less than a kernel: 4 % of a layer here.
    assert (found["flops"] - head) / (layers * once) == pytest.approx(3 + again, abs=0.05)
    # Outside the layers: the scatter of the look-up, the gather of the head, and their transposes.
    outside = found["collectives"] - layers * (POLICIES[policy].collectives + 4 * piped)
    assert 4 <= outside <= 5


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "soap"])
@pytest.mark.parametrize(
    ("mesh", "zero"), [((2, 2, 1, 2), 1), ((1, 4, 1, 2), 3), ((1, 2, 2, 2), 0)]
)
def test_master_weights_and_moments_equal_the_state(optimizer, mesh, zero):
    config = dataclasses.replace(
        SMALL, mesh=MeshConfig(*mesh, zero=zero), optimizer=OptimizerConfig(name=optimizer)
    )
    state = abstract_state(config, make_mesh(config.mesh))
    sizes = {
        key: sum(
            4 * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(getattr(state, key))
            if leaf.ndim
        )
        for key in ("params", "opt_state")
    }
    memory = Job(config, None).memory(layout_of(config))
    assert (memory["masters"], memory["moments"]) == (sizes["params"], sizes["opt_state"])


# --- memory


def test_memory_of_the_paper(mtnlg):
    # Megatron-LM's 20 bytes a parameter: float32 master, moments and gradient, bf16 weight and
    # gradient.
    memory = Job(mtnlg, A100).memory(PAPERS)
    parts = sum(memory[name] for name in ("masters", "moments", "weights", "gradients"))
    numbers = memory["masters"] / 4
    assert parts / numbers == pytest.approx(20, rel=0.03)
    assert numbers == pytest.approx(529.6e9 / 280, rel=0.1)  # every stage holds the embeddings


# Peak memory of this repository's train steps according to the real compilers, with the flags of a
# run and the torus of a slice.
COMPILED = [
    row
    for row in json.loads((ROOT / "benchmarks/results/compile_ahead.json").read_text())["rows"]
    if row["step"] == "train"
]


@pytest.mark.parametrize(
    "row", COMPILED, ids=lambda row: " ".join([row["config"], row["topology"], *row["set"]])
)
def test_memory_of_compiled_steps(row):
    config = load_config(f"{CONFIGS}/{row['config']}", row["set"])
    chip = CHIPS[row["topology"].partition(":")[0]]
    predicted = sum(Job(config, chip).memory(layout_of(config, row["devices"])).values()) / 2**30
    assert (
        row["fits"] and 0.9 * row["peak_gib"] < predicted < 1.2 * row["peak_gib"]
    )  # a tenth of memory is left free


def test_stage_inputs_grow_with_the_flush_but_not_under_1f1b(mtnlg):
    job = Job(mtnlg, A100)
    unit = 2 * 2048 * 20480 / 8
    longer = Job(override(mtnlg, "train.global_batch_size=3840"), A100)
    for layout, slope in [
        (PAPERS, 0),
        (PAPERS._replace(schedule="circular"), CIRCULAR_COPIES + 4 / 35),
        (PAPERS._replace(schedule="circular", virtual_pipe=3), 3 * CIRCULAR_COPIES + 4 / 35),
        (PAPERS._replace(schedule="circular", flush=35), 0),
    ]:
        grown = longer.memory(layout)["stage inputs"] - job.memory(layout)["stage inputs"]
        taken = [j.micro_batches(layout)[1] for j in (job, longer)]
        assert grown / (taken[1] - taken[0]) == pytest.approx(slope * unit)


@pytest.mark.parametrize(
    ("shape", "waste"),
    [
        ((3, 2560, 16, 160), 1),
        ((3, 2560, 4, 160), 1),
        ((3, 16, 160, 2560), 1),
        ((3, 2560, 4, 64), 1),
        ((3, 80, 16, 160), 1.6),
        ((105, 80, 16, 160), 128 / 105),
        ((3, 16, 160), 1.6),
        ((105, 20480), 112 / 105),
        ((3, 2500), 4 / 3 * 2560 / 2500),
        ((7,), 1),
    ],
)
def test_tiles_of_a_tpu(
    shape, waste
):  # bytes of an argument compiled for v5p (libtpu 0.0.50.1) over those of its values
    assert padded_size(shape) == pytest.approx(waste * math.prod(shape))


def test_head_width_160_pads_tpu_state_only_if_zero_splits_it_small(mtnlg):
    for data, padded in ((8, False), (256, True)):  # 20480 / 256 = 80 is less than a tile
        layout = Layout(1, data, 1, 8, 1, "circular", 1, None, 1, "none")
        config = override(mtnlg, "train.global_batch_size=2048")
        tpu, gpu = (Job(config, CHIPS[chip]).memory(layout)["masters"] for chip in ("v5p", "H100"))
        assert (tpu > 1.05 * gpu) == padded


# --- experts

MOE = dataclasses.replace(
    SMALL,
    model=dataclasses.replace(SMALL.model, num_layers=2, moe=MoEConfig(4, 2), activation="swiglu"),
)


@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, expert=2), MeshConfig(1, 1, 1, 2, expert=2)])
def test_what_is_sent_for_experts_equals_the_step(mesh):
    config = dataclasses.replace(MOE, mesh=mesh)
    devices = make_mesh(mesh, jax.devices()[: 2 * mesh.tensor])
    batch = {
        key: jax.ShapeDtypeStruct((2, 2, LENGTH), jnp.float32 if key == "weights" else jnp.int32)
        for key in BATCH_KEYS
    } | {"rows": jax.ShapeDtypeStruct((2, 2), jnp.int32)}
    step = make_loss_and_gradients(config, devices, causal=True)
    program = jax.make_jaxpr(step)(
        abstract_model(config.model)[1], batch, 2, jax.random.key_data(jax.random.key(0))
    )
    sent = _sent_over_expert(program.jaxpr, 1)
    job = Job(config, A100)
    layout = layout_of(config)
    expected = job.seconds(layout)[0]["expert"] * job.network.speed(layout.sizes, "expert")
    assert sent == pytest.approx(expected / job.micro_batches(layout)[0])


def _sent_over_expert(jaxpr, times):
    """Return the bytes of activations (..., WIDTH) that a device sends in one micro-batch."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("all_gather", "reduce_scatter") and "expert" in equation.params["axis_name"]:
            # The smaller side is one device's part; there are two of them.
            parts = [var.aval for var in (*equation.invars, *equation.outvars)]
            part = min(parts, key=lambda aval: aval.size)
            # Smaller ones are biases of experts.
            if part.shape[-1] == WIDTH and part.size > 4 * WIDTH and part.dtype == jnp.bfloat16:
                total += times * part.size * part.dtype.itemsize
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    more = equation.params["length"] if name == "scan" else 1
                    total += _sent_over_expert(inner, times * more)
    return total


def test_a_device_holds_its_part_of_the_experts():
    mixtral = load_config(str(CONFIGS / "mixtral_8x7b.py"))
    job = Job(mixtral, CHIPS["H100"])
    own = layout_of(mixtral)
    alone = own._replace(data=128, expert=1)
    experts = 32 * 8 * 3 * 4096 * 14336
    assert job.held(alone, gathered=True).experts == experts
    held = job.held(own, gathered=True)
    assert held.experts == experts // 8 and held.blocks - held.experts < 0.05 * experts
    # Sharded, both hold 1/128 of nearly everything.
    assert sum(job.held(own)[:2]) == sum(job.held(alone)[:2])
    assert job.seconds(alone)[0]["expert"] == 0 < job.seconds(own)[0]["expert"]


# --- network


@pytest.mark.parametrize(
    ("mesh", "axis", "speed"),
    [
        ((1, 2, 1, 8), "tensor", 300e9),  # inside a node
        ((1, 2, 1, 8), "data", 25e9),  # one card each
        ((1, 16, 1, 1), "data", 200e9),  # eight cards of a node for one ring
        ((1, 64, 1, 2), "data", 100e9),
        ((1, 4, 1, 2), "data", 300e9),
        ((1, 1, 1, 16), "tensor", 200e9),
        ((2, 1, 4, 2), "pipe", 25e9),
        ((2, 1, 4, 2), "context", 300e9),
    ],
)
def test_an_axis_has_the_speed_of_its_network(mtnlg, mesh, axis, speed):
    sizes = Layout(*mesh, 1, "circular", 1, None, 1, "none").sizes
    assert Job(mtnlg, A100).network.speed(sizes, axis) == speed


def test_context_traffic_equals_korthikanti(mtnlg):
    # Korthikanti's s h / t in bf16: Ulysses 8 s h / (t c) (c-1)/c, all keys and values 4 s h / t
    # (c-1)/c.
    sh = 2048 * 20480
    t = 8
    c = 4
    for mode, expected in (
        ("ulysses", 8 * sh / (t * c) * 3 / 4),
        ("gather", 4 * sh / t * 3 / 4),
        ("ring", 4 * sh / t * 3 / 4),
        ("auto", 8 * sh / (t * c) * 3 / 4),
    ):
        job = Job(override(mtnlg, f"mesh.context_mode={mode}"), A100)
        layout = Layout(1, 1, c, t, 1, "circular", 1, None, 1, "none")
        sent = job.seconds(layout)[0]["context"] * job.network.speed(layout.sizes, "context")
        assert sent / (3 * 105 * 1920) == pytest.approx(expected)
