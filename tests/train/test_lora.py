"""Check low-rank adaptation: equal to the base at the start, merged at the end, with only A and B
trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig, validate
from mtnlg_jax.model.transformer import abstract_model, init_parameters
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import lora
from mtnlg_jax.train.batch import put_batch
from mtnlg_jax.train.evaluate import make_eval
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.state import init_state
from mtnlg_jax.train.step import make_train_step

MESH_TOLERANCE = 2e-6  # float32; relative to the largest gradient of all parameters
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=8, vocab_size=128, max_position_embeddings=16
)
TARGETS = ("q", "v", "o", "in", "out")
ROWS = 8
LENGTH = 16


@functools.cache
def rows():
    rng = np.random.default_rng(0)
    made = {
        "tokens": rng.integers(0, 128, (ROWS, LENGTH)),
        "labels": rng.integers(0, 128, (ROWS, LENGTH)),
        "segment_ids": np.sort(rng.integers(1, 4, (ROWS, LENGTH)), 1),
        "positions": np.tile(np.arange(LENGTH), (ROWS, 1)),
    }
    weights = (rng.random((ROWS, LENGTH)) > 0.3).astype(np.float32)
    return {name: value.astype(np.int32) for name, value in made.items()} | {"weights": weights}


def adapted_config(data=1, tensor=1, zero=1, targets=("q", "v"), mesh=(), model=MODEL, **train):
    config = Config(
        model=model,
        mesh=MeshConfig(data=data, tensor=tensor, zero=zero, **dict(mesh)),
        optimizer=OptimizerConfig(lora_rank=4, lora_alpha=8.0, lora_targets=targets),
        train=TrainConfig(
            **{
                "global_batch_size": ROWS,
                "micro_batch_size": ROWS // 2 // data,
                "loss_chunk": 24,
                "compute_dtype": "float32",
                "steps": 10,
                "init": "a run",
            }
            | train
        ),
    )
    validate(config)
    return config


def mesh_of(config):
    mesh = config.mesh
    return make_mesh(mesh, jax.devices()[: mesh.pipe * mesh.data * mesh.context * mesh.tensor])


def batch_on(mesh):
    return put_batch(
        lambda numbers: {name: value[numbers] for name, value in rows().items()},
        (2, ROWS // 2, LENGTH),
        mesh,
    )


def assert_equal_numbers(got, wanted, tolerance=MESH_TOLERANCE):
    assert got[0] == pytest.approx(wanted[0], rel=tolerance)
    largest = max(np.abs(grad).max() for grad in wanted[1])
    for a, b in zip(got[1], wanted[1], strict=True):
        assert np.abs(a - b).max() <= tolerance * largest


def with_second_factors(params):
    """Move B away from 0, where it would hide errors."""
    base, adapters = lora.split(params)
    rng = np.random.default_rng(1)
    blocks = {
        name: leaf
        if name.startswith("lora_a")
        else jax.device_put(
            jnp.asarray(rng.normal(0, 0.02, leaf.shape), jnp.float32), leaf.sharding
        )
        for name, leaf in adapters["blocks"].items()
    }
    return lora.joined(base, {"blocks": blocks})


def numbers(config, causal=True):
    """Return (loss, gradients of A and B) with B away from 0."""
    mesh = mesh_of(config)
    params = with_second_factors(init_state(config, mesh).params)
    function = make_loss_and_gradients(config, mesh, causal)

    @jax.jit
    def run(params, batch):
        key = jax.random.key_data(jax.random.key(3))
        return function(lora.computed(params, config), batch, jnp.int32(2), key)

    loss, grads = run(params, batch_on(mesh))
    return float(loss), [np.asarray(grad) for grad in jax.tree.leaves(grads)]


@functools.cache
def alone(targets=TARGETS):
    return numbers(adapted_config(targets=targets))


@pytest.mark.parametrize(("data", "tensor", "zero"), [(4, 2, 0), (2, 4, 3)])
@pytest.mark.slow
def test_every_mesh_equals_one_device(data, tensor, zero):
    assert_equal_numbers(numbers(adapted_config(data, tensor, zero, TARGETS)), alone())


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [{"pipe": 2, "schedule": "1f1b"}, {"context": 2}, {"context": 2, "tp_comm_overlap": True}],
    ids=str,
)
def test_pipeline_and_context_equal_one_device(mesh):
    assert_equal_numbers(numbers(adapted_config(2, 2, 1, TARGETS, mesh)), alone())


def test_the_gradient_of_the_factors_equals_a_direct_computation():
    config = adapted_config(targets=TARGETS)
    params = init_state(config, mesh_of(config)).params
    graph = abstract_model(MODEL)[0]
    data = rows()
    base, adapters = lora.split(with_second_factors(params))

    def loss(adapters):
        low = adapters["blocks"]
        blocks = nnx.to_pure_dict(base)["blocks"]
        product = {
            "w_q_DNH": jnp.einsum("ldr,lrnh->ldnh", low["lora_a_q_DR"], low["lora_b_q_RNH"]),
            "w_v_DKH": jnp.einsum("ldr,lrnh->ldnh", low["lora_a_v_DR"], low["lora_b_v_RKH"]),
            "w_o_NHD": jnp.einsum("lnhr,lrd->lnhd", low["lora_a_o_NHR"], low["lora_b_o_RD"]),
            "w_in_DF": low["lora_a_in_DR"] @ low["lora_b_in_RF"],
            "w_out_FD": low["lora_a_out_FR"] @ low["lora_b_out_RD"],
        }
        full = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + 2.0 * product.get(path[-1].key, 0.0), blocks
        )  # alpha / r = 8 / 4
        state = nnx.state(nnx.merge(graph, base))
        nnx.replace_by_pure_dict(state, nnx.to_pure_dict(base) | {"blocks": full})
        logits = nnx.merge(graph, state)(
            data["tokens"], positions_BS=data["positions"], segment_ids_BS=data["segment_ids"]
        )
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), data["labels"][..., None], -1)[
            ..., 0
        ]
        return -(picked * data["weights"]).sum() / data["weights"].sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(adapters)
    assert_equal_numbers(
        alone(), (float(value), [np.asarray(grad) for grad in jax.tree.leaves(grads)]), 1e-5
    )


def plain_loss(config, params):
    mesh = mesh_of(config)
    total, weight = make_eval(config, mesh, causal=True)(params, batch_on(mesh))
    return float(total) / float(weight)


def test_the_initial_model_equals_the_base_bit_for_bit():
    config = adapted_config(targets=TARGETS, model=dataclasses.replace(MODEL, num_layers=1))
    params = init_state(config, mesh_of(config)).params
    base = init_parameters(config.model, config.train.seed)
    merged = lora.merge(params, config)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(base), strict=True):
        assert np.array_equal(a, b)
    factors = lora.split(params)[1]["blocks"]
    assert factors["lora_a_q_DR"].shape == (1, 32, 4) and factors["lora_b_o_RD"].shape == (1, 4, 32)
    assert np.asarray(factors["lora_a_out_FR"]).std() == pytest.approx((3 * 128) ** -0.5, rel=0.1)


def test_the_merged_model_equals_the_trained_one():
    config = adapted_config(targets=TARGETS)
    mesh = mesh_of(config)
    params = with_second_factors(init_state(config, mesh).params)
    merged = lora.merge(params, config)
    base, low = lora.split(params)
    w, a, b = (
        np.asarray(x, np.float64)
        for x in (
            nnx.to_pure_dict(base)["blocks"]["attention"]["w_q_DNH"],
            low["blocks"]["lora_a_q_DR"],
            low["blocks"]["lora_b_q_RNH"],
        )
    )
    wanted = w + 8 / 4 * np.einsum("ldr,lrnh->ldnh", a, b)
    assert np.abs(nnx.to_pure_dict(merged)["blocks"]["attention"]["w_q_DNH"] - wanted).max() < 1e-8
    assert alone()[0] == pytest.approx(plain_loss(lora.without(config), merged), rel=1e-6)
    assert plain_loss(lora.without(config), base) != pytest.approx(alone()[0], rel=1e-5)


def test_a_step_updates_only_the_factors():
    config = adapted_config(data=2, tensor=2, zero=3)
    mesh = mesh_of(config)
    state = init_state(config, mesh)
    step = make_train_step(config, mesh, causal=True)
    before = jax.tree.map(np.asarray, state.params)
    for _ in range(2):  # in the first step A has no gradient, because B is 0
        state, metrics = step(state, batch_on(mesh), jnp.int32(2), jnp.int32(ROWS), 1.0)
    assert float(metrics["grad_norm"]) > 0
    changed = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(state.params),
            jax.tree.leaves(before),
            strict=True,
        )
        if not np.array_equal(new, old)
    }
    factors = ("lora_a_q_DR", "lora_b_q_RNH", "lora_a_v_DR", "lora_b_v_RKH")
    assert changed == {f"lora.blocks.{name}" for name in factors}
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(moments) == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(before["lora"])])


def test_no_gradient_of_a_whole_matrix_is_computed():
    # No other product has 32 x 48 results.
    model = dataclasses.replace(MODEL, ffn_hidden_size=48)
    config = adapted_config(targets=TARGETS, model=model)
    mesh = mesh_of(config)

    def of_matrices(config):
        function = make_loss_and_gradients(config, mesh, True)
        params = lora.computed(init_state(config, mesh).params, config)
        key = jax.random.key_data(jax.random.key(3))
        lowered = jax.jit(function).lower(params, batch_on(mesh), jnp.int32(2), key)
        lines = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
        return [line for line in lines if line.endswith(("<32x48xf32>", "<48x32xf32>"))]

    assert of_matrices(lora.without(config))
    assert not of_matrices(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_rank": 0, "lora_targets": ("q",)},
            r"lora_targets=\('q',\) is for low-rank.*lora_rank=0.*set that to 8",
        ),
        ({"lora_rank": 0, "lora_alpha": 3.0}, r"lora_alpha=3.0 is for low-rank adaptation"),
        (
            {"lora_targets": ("q", "w")},
            r"unknown optimizer.lora_targets='w'; choose one of q, k, v, o, in, out$",
        ),
        ({"lora_targets": ()}, "would train nothing"),
        (
            {"lora_rank": 33},
            r"lora_rank=33 is above the rank of matrix 'q', 32 x 32; set it to 32 or less",
        ),
        ({"name": "muon"}, "optimizer.name=muon is for whole matrices"),
        ({"name": "soap"}, "optimizer.name=soap is for whole matrices"),
    ],
)
def test_invalid_settings_raise_an_error(settings, message):
    config = adapted_config()
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, **settings)
    )
    if settings.get("lora_rank") == 0 and "lora_alpha" not in settings:
        config = dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, lora_alpha=16.0)
        )
    if "lora_alpha" in settings:
        config = dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, lora_targets=("q", "v"))
        )
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_adapters_without_targets_raise_an_error():
    config = adapted_config()
    with pytest.raises(ValueError, match="lora_rank=4 needs pretrained weights; give --init=RUN"):
        validate(dataclasses.replace(config, train=dataclasses.replace(config.train, init="")))
