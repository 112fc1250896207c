"""Check low-rank adaptation of a base in int8 or NF4: equal to a float base of the same numbers, on
every mesh, with only the adapters trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig, validate
from mtnlg_jax.model.quantize import quantize_numpy
from mtnlg_jax.parallel.mesh import make_mesh, plan_table
from mtnlg_jax.train import lora, quantized_base
from mtnlg_jax.train.batch import put_batch
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.state import abstract_state, init_state
from mtnlg_jax.train.step import make_train_step

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=128,
    num_attention_heads=8,
    ffn_hidden_size=256,
    vocab_size=128,
    max_position_embeddings=16,
)
TARGETS = ("q", "v", "o", "in", "out")
ROWS = 8


def config_of(base, model=MODEL, data=1, tensor=1, zero=1, targets=TARGETS, **mesh):
    config = Config(
        model=model,
        mesh=MeshConfig(data=data, tensor=tensor, zero=zero, **mesh),
        optimizer=OptimizerConfig(
            lora_rank=4, lora_alpha=8.0, lora_targets=targets, lora_base=base
        ),
        train=TrainConfig(
            global_batch_size=ROWS,
            micro_batch_size=ROWS // 2 // data,
            loss_chunk=24,
            compute_dtype="float32",
            steps=10,
            init="a run",
        ),
    )
    validate(config)
    return config


def mesh_of(config):
    mesh = config.mesh
    return make_mesh(mesh, jax.devices()[: mesh.pipe * mesh.data * mesh.context * mesh.tensor])


def batch_on(mesh):
    rng = np.random.default_rng(0)
    made = {
        "tokens": rng.integers(0, 128, (ROWS, 16)),
        "labels": rng.integers(0, 128, (ROWS, 16)),
        "segment_ids": np.sort(rng.integers(1, 4, (ROWS, 16)), 1),
        "positions": np.tile(np.arange(16), (ROWS, 1)),
    }
    rows = {name: value.astype(np.int32) for name, value in made.items()}
    rows["weights"] = (rng.random((ROWS, 16)) > 0.3).astype(np.float32)
    return put_batch(
        lambda numbers: {name: value[numbers] for name, value in rows.items()},
        (2, ROWS // 2, 16),
        mesh,
    )


def assert_equal_numbers(got, wanted):
    assert got[0] == pytest.approx(wanted[0], rel=2e-6)
    largest = max(np.abs(grad).max() for grad in wanted[1])
    for a, b in zip(got[1], wanted[1], strict=True):
        assert np.abs(a - b).max() <= 2e-6 * largest


def numbers(config, params):
    """Return (loss, gradients of A and B)."""
    mesh = mesh_of(config)
    function = make_loss_and_gradients(config, mesh, True)

    @jax.jit
    def run(params, batch):
        key = jax.random.key_data(jax.random.key(3))
        return function(lora.computed(params, config), batch, jnp.int32(2), key)

    loss, grads = run(params, batch_on(mesh))
    return float(loss), [np.asarray(grad) for grad in jax.tree.leaves(grads)]


def start(config):
    """Return the parameters of a run's start, with B away from 0, where it would hide errors."""
    base, adapters = lora.split(init_state(config, mesh_of(config)).params)
    rng = np.random.default_rng(1)
    blocks = {
        name: leaf
        if name.startswith("lora_a")
        else jax.device_put(rng.normal(0, 0.02, leaf.shape).astype(np.float32), leaf.sharding)
        for name, leaf in adapters["blocks"].items()
    }
    return lora.joined(base, {"blocks": blocks})


def with_float_base(params, config):
    """Return the same numbers as a float base and its adapters."""
    base, adapters = lora.split(params)
    nothing = jax.tree.map(jnp.zeros_like, adapters)
    return lora.joined(lora.merge(lora.joined(base, nothing), config), adapters)


@pytest.mark.parametrize("base", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_gradients_equal_those_with_the_dequantized_float_base(base):
    # Small, because both programs are compiled.
    small = {"hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 64}
    small |= {"normalization": "rmsnorm", "add_bias": False}
    small = {"model": dataclasses.replace(MODEL, **small), "targets": ("q", "out")}
    config = config_of(base, **small)
    params = start(config)
    plain = config_of("float", **small)
    wanted = numbers(plain, with_float_base(params, config))
    assert_equal_numbers(numbers(config, params), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_every_mesh_equals_one_device(base):
    model = dataclasses.replace(MODEL, num_layers=2)
    alone = numbers(config_of(base, model), start(config_of(base, model)))
    for data, tensor, zero, mesh in (
        (2, 2, 0, {}),
        (2, 2, 1, {}),
        (2, 2, 3, {}),
        (2, 1, 3, {"context": 2}),
        (2, 2, 3, {"tp_comm_overlap": True}),
    ):
        config = config_of(base, model, data=data, tensor=tensor, zero=zero, **mesh)
        assert_equal_numbers(numbers(config, start(config)), alone)


@pytest.mark.slow
def test_key_value_heads_that_are_replicated_equal_one_device():
    model = dataclasses.replace(MODEL, num_query_groups=2)
    wanted = numbers(config_of("nf4", model), start(config_of("nf4", model)))
    model = dataclasses.replace(model, ffn_hidden_size=512, hidden_size=256)
    config = config_of("nf4", model)
    wide = numbers(config, start(config))
    split = config_of("nf4", model, tensor=4)
    assert_equal_numbers(numbers(split, start(split)), wide)
    assert wide[0] != wanted[0]


@pytest.mark.slow
def test_a_step_updates_only_the_factors():
    config = config_of("nf4", data=2, tensor=2, zero=3)
    mesh = mesh_of(config)
    state = init_state(config, mesh)
    step = make_train_step(config, mesh, causal=True)
    before = jax.tree.map(np.asarray, state.params)
    for _ in range(2):
        state, metrics = step(state, batch_on(mesh), jnp.int32(2), jnp.int32(8), 1.0)
    assert float(metrics["grad_norm"]) > 0
    base, adapters = lora.split(state.params)
    for new, old in zip(jax.tree.leaves(base), jax.tree.leaves(lora.split(before)[0]), strict=True):
        assert new.dtype == old.dtype and np.array_equal(new, old)
    old = lora.split(before)[1]
    assert all(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(adapters), jax.tree.leaves(old), strict=True)
    )
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(adapters))


def test_the_base_takes_the_bytes_of_its_type():
    """4.5 bits a weight in NF4, 8 bits and a scale a row in int8."""
    config = config_of("nf4")
    weights = sum(leaf.size for leaf in quantized_base.matrices(config).values())

    def held(base):
        params = lora.split(lora.abstract_parameters(config_of(base)))[0]
        leaves = jax.tree.leaves(params.raw_mapping[quantized_base.KEY])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    assert held("nf4") == weights * 4.5 / 8
    assert weights < held("int8") < 1.05 * weights
    state = abstract_state(config, mesh_of(config))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32", "uint8"}
    mesh = dict(pipe=1, data=2, expert=1, context=1, tensor=2)
    rows = {row.path: row for row in plan_table(state.params, mesh)}
    assert rows["quantized.blocks.nf4_o_ND"].local == (1, 32, 64)
    assert rows["quantized.blocks.absmax_q_DNH"].local == (1, 1, 4, 16)


def test_int8_has_the_numbers_of_decoding():
    config = config_of("int8")
    rng = np.random.default_rng(0)
    array = rng.normal(size=(8, 16, 128)).astype(np.float32)
    codes, scales = quantized_base.quantize_layer("w_o_NHD", array, "int8")
    number, scale = quantize_numpy(np.ascontiguousarray(array.reshape(-1, 128).T))
    assert np.array_equal(codes, number.T) and np.array_equal(scales, scale)
    back = quantized_base.dequantize(
        "w_o_NHD", jnp.asarray(codes), jnp.asarray(scales), "int8", False, config.model.head_width
    )
    assert back.shape == array.shape and np.abs(back - array).max() <= scale.max() * 0.51


@pytest.mark.parametrize(
    ("base", "more", "message"),
    [
        (
            "nf4",
            {"data": 4},
            r"blocks of 64 inputs, and model.hidden_size=128 over mesh.data=4 is not a multiple of "
            "them; lower mesh.data, or set mesh.zero=0, or set optimizer.lora_base=int8",
        ),
        ("nf4", {"tensor": 4}, "head width=128 over mesh.tensor=4 is not a multiple"),
        ("int8", {"rank": 0}, "lora_base=int8 is for low-rank adaptation"),
    ],
)
def test_what_does_not_fit_raises_an_error(base, more, message):
    rank = more.pop("rank", 4)
    with pytest.raises(ValueError, match=message):
        config = config_of(base, **more)
        optimizer = OptimizerConfig(lora_rank=rank, lora_base=base)
        validate(dataclasses.replace(config, optimizer=optimizer))


def test_a_pipeline_of_a_quantized_base_raises_an_error():
    model = dataclasses.replace(MODEL, num_layers=2)
    with pytest.raises(ValueError, match="lora_base=nf4 with mesh.pipe=2: .*set mesh.pipe=1"):
        config_of("nf4", model, pipe=2)


@pytest.mark.slow
def test_merging_gives_a_plain_model():
    config = config_of("int8")
    params = start(config)
    merged = lora.merge(params, config)
    assert jax.tree.structure(merged) == jax.tree.structure(
        lora.split(lora.abstract_parameters(config_of("float")))[0]
    )
    low = lora.split(params)[1]["blocks"]
    base = nnx.to_pure_dict(with_float_base(params, config))["blocks"]["attention"]["w_q_DNH"]
    change = nnx.to_pure_dict(merged)["blocks"]["attention"]["w_q_DNH"] - base
    wanted = 2 * jnp.einsum("ldr,lrnh->ldnh", low["lora_a_q_DR"], low["lora_b_q_RNH"])
    assert np.abs(change - wanted).max() < 1e-6
