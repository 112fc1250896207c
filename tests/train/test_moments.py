"""Moments in bfloat16 and int8: the map, the rounding, equal bits on every mesh, resumes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtnlg_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PrefixConfig,
    TrainConfig,
    validate,
)
from mtnlg_jax.model.params import names_of
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import moments
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.optimizer import make_optimizer, optimizer_of
from mtnlg_jax.train.state import abstract_state, init_state, state_shardings

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    vocab_size=128,
    max_position_embeddings=16,
    normalization="rmsnorm",
    add_bias=False,
)
STEPS = 3


def longhand_map(signed):
    """Return the magnitudes of the dynamic map as Dettmers 2021, section 1.3, describes it: the
    exponent counts zeros in front, and the fraction's values are the means between bounds."""
    values = [0.0]
    for decade in range(7):
        bounds = np.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1)
        values += list(10.0 ** (decade - 6) * (bounds[:-1] + bounds[1:]) / 2)
    if signed:
        return np.array([*values[:-1], 1.0])  # 1 for both signs in place of the last mean
    return np.array([*values, 1.0])


@pytest.mark.parametrize("squares", [False, True])
def test_the_map_is_that_of_the_paper(squares):
    values = longhand_map(not squares)
    assert len(values) == (256 if squares else 128)
    found = moments._value_of(jnp.arange(len(values)), squares)
    np.testing.assert_allclose(found, values, rtol=1e-6)
    between = (values[:-1] + values[1:]) / 2
    below = moments._code_below(jnp.asarray(between, jnp.float32), squares)
    np.testing.assert_array_equal(below, np.arange(len(values) - 1))
    if squares:
        assert (values[2:] / values[1:-1]).max() < 2.75


@pytest.mark.parametrize("squares", [False, True])
def test_codes_are_neighbors_of_the_value_as_often_as_they_should(squares):
    rng = np.random.default_rng(0)
    x = np.float32(rng.standard_normal((3, 16)) * 10.0 ** rng.integers(-4, 1, (3, 16)))
    x = np.square(x) if squares else x
    x[:, 0] = 0
    draws = 4000
    bits = jnp.asarray(rng.integers(0, 2**16, (draws, *x.shape)), jnp.uint16)
    many = jnp.broadcast_to(x, bits.shape)
    codes, scales = moments.to_int8(many, bits, axis=2, block=8, squares=squares)
    assert codes.dtype == (jnp.uint8 if squares else jnp.int8) and scales.shape == (draws, 3, 2)
    found = np.asarray(moments.from_int8(codes, scales, 2, squares), np.float64)
    assert (found[:, :, 0] == 0).all()
    # By the longhand map, without rounding.
    values = longhand_map(not squares)
    roots = np.sqrt(x) if squares else np.abs(x)
    scale = np.repeat(roots.reshape(3, 2, 8).max(-1), 8, -1)
    at = np.searchsorted(values, roots / scale, side="right") - 1
    low, high = (values[np.clip(each, 0, len(values) - 1)] * scale for each in (at, at + 1))
    low, high = (each**2 if squares else each for each in (low, high))
    assert ((np.abs(found) > low * 0.999) & (np.abs(found) < high * 1.001) | (x == 0)).all()
    error = found.mean(0) - x
    assert (np.abs(error) < 4 * (high - low) / 2 / np.sqrt(draws) + 2e-6 * np.abs(x)).all()


def test_a_second_moment_never_becomes_0():
    x = jnp.asarray([[1.0, 1e-20, 0.0, 1e-30]])
    for drawn in (0, 2**16 - 1):
        codes, scales = moments.to_int8(x, jnp.full(x.shape, drawn, jnp.uint16), 1, 4, True)
        found = moments.from_int8(codes, scales, 1, True)
        np.testing.assert_array_equal(found > 0, x > 0)


def test_an_average_in_bfloat16_follows_its_numbers():
    # Rounded to the nearest, 1 never falls at 0.999: half a spacing is larger than a step.
    x = jnp.ones(2000)
    assert (0.999 * x.astype(jnp.bfloat16) + 0.001 * 0.25).astype(jnp.bfloat16)[0] == 1

    def step(x, key):
        new = 0.999 * x.astype(jnp.float32) + 0.001 * 0.25
        return moments.to_bfloat16(new, jax.random.bits(key, x.shape, jnp.uint16)), None

    keys = jax.random.split(jax.random.key(0), 3000)
    found = jax.lax.scan(step, x.astype(jnp.bfloat16), keys)[0].astype(jnp.float32)
    exact = 0.25 + 0.75 * 0.999**3000
    spread = 2**-7 * exact / 2 / np.sqrt(1 - 0.999**2)  # the bound in the module
    assert abs(float(found.mean()) - exact) < 4 * spread / np.sqrt(2000)
    assert float(found.std()) < spread


def test_infinite_moments_stay_infinite():
    x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 3.4e38])
    found = moments.to_bfloat16(x, jnp.full(4, 2**16 - 1, jnp.uint16))
    np.testing.assert_array_equal(found[:2], x[:2])
    assert jnp.isnan(found[2]) and found[3] > 3e38


# --- whole optimizers


def config_of(dtype, name="adamw", **mesh):
    config = Config(
        model=MODEL,
        mesh=MeshConfig(**mesh),
        optimizer=OptimizerConfig(name=name, moments_dtype=dtype),
        train=TrainConfig(micro_batch_size=1),
    )
    validate(config)
    return config


@functools.cache
def gradients():
    shapes = jax.eval_shape(lambda: init_parameters(MODEL, seed=0))
    rng = np.random.default_rng(0)
    made = [
        jax.tree.map(lambda p: np.float32(rng.standard_normal(p.shape)), shapes)
        for _ in range(STEPS)
    ]
    return shapes, made


@functools.cache
def state_on(config):
    """Return the optimizer's state after STEPS steps with the same gradients on any mesh."""
    mesh = make_mesh(config.mesh)
    shardings = state_shardings(config, mesh)
    optimizer = make_optimizer(dataclasses.replace(config.optimizer, clip_grad_norm=0.0), seed=5)

    @functools.partial(jax.jit, out_shardings=shardings.opt_state)
    def step(state, each, params):
        return optimizer.update(each, state, params)[1]

    shapes, made = gradients()
    params = jax.device_put(jax.tree.map(lambda p: np.zeros(p.shape), shapes), shardings.params)
    state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    for each in made:
        state = step(state, jax.device_put(each, shardings.params), params)
    return state


def assert_equal(one, other):
    one = names_of(one)
    other = names_of(other)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(array, other[name], name)


# Slow: other meshes for the same code.
@pytest.mark.parametrize(
    ("dtype", "mesh"),
    [
        ("bfloat16", {"data": 8}),
        ("int8", {"pipe": 2, "data": 2, "tensor": 2, "zero": 0}),
        pytest.param("int8", {"data": 8, "zero": 3}, marks=pytest.mark.slow),
        pytest.param("bfloat16", {"pipe": 2, "data": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_all_meshes_have_the_same_bits(dtype, mesh):
    assert_equal(state_on(config_of(dtype, data=2, tensor=4)), state_on(config_of(dtype, **mesh)))


def test_moments_are_near_those_of_float32():
    exact = names_of(state_on(config_of("float32", data=2, tensor=4)))
    for dtype, tolerance in (("bfloat16", 2**-7), ("int8", 0.1)):
        state = state_on(config_of(dtype, data=2, tensor=4))
        found = names_of(jax.jit(moments.decode)(state))
        for name, array in exact.items():
            error = np.linalg.norm(found[name] - array) / np.linalg.norm(array)
            rounded = "tokens_" in name or "positions_" in name if dtype == "bfloat16" else False
            assert (0 < error < tolerance) if rounded or ".w_" in name else error == 0, name


def test_the_momentum_of_muon_is_stored_as_well():
    config = config_of("int8", "muon", data=2, tensor=4)
    names = names_of(abstract_state(config, make_mesh(config.mesh)).opt_state)
    codes = [name for name in names if "codes_" in name]
    assert len(codes) == 6 and all(".mu." in name for name in codes)


GATED = MoEConfig(
    num_moe_experts=2, moe_shared_expert_intermediate_size=64, moe_shared_expert_gate=True
)
SEEING = PrefixConfig(width=12, image_size=6, patch_size=2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        ({"moe": GATED}, {"w_router_DE", "w_shared_DC"}),
        ({"prefix": SEEING}, {"w_patch_IC", "w_project_CD"}),
    ],
    ids=["experts", "prefix"],
)
def test_matrices_without_heads_and_mlp_width_stay_float32(parts, kept, optimizer):
    config = config_of("int8", optimizer)
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, **parts))
    params = jax.eval_shape(lambda: init_parameters(config.model, seed=0))
    update = optimizer_of(config).update
    before = jax.eval_shape(optimizer_of(config).init, params)
    state = jax.eval_shape(lambda p, s: update(p, s, p)[1], params, before)
    assert names_of(state) == names_of(before)
    whole = {name: leaf for name, leaf in names_of(state).items() if ".w_" in name}
    last = {name: name.rsplit(".", 1)[1] for name in whole}
    assert {last[name] for name in whole if last[name].startswith("w_")} == kept
    assert all(whole[name].dtype == jnp.float32 for name in whole if last[name] in kept)
    assert any(last[name].startswith("codes_") for name in whole)


def test_an_optimizer_without_a_count_is_an_error():
    inner = optax.trace(0.9)
    params = {"blocks": {"w_in_DF": jnp.zeros((1, 2, 64))}}
    with pytest.raises(AssertionError, match="counts no steps"):
        moments.stored(inner, "bfloat16", 0).init(params)


# --- checkpoints


def stored_and_read(tmp_path, before, after, opt_state):
    mesh = make_mesh(before.mesh)
    state = init_state(before, mesh)._replace(opt_state=opt_state)
    checkpoints = Checkpoints(tmp_path)
    try:
        checkpoints.save(3, state, {}, wait=True)
        return checkpoints.restore(abstract_state(after, make_mesh(after.mesh)), {})[1].opt_state
    finally:
        checkpoints.close()


@pytest.mark.parametrize(
    ("before", "after", "offload"),
    [
        ("int8", "int8", "none"),
        ("float32", "int8", "none"),
        ("int8", "bfloat16", "none"),
        ("float32", "int8", "moments"),
    ],
)
def test_a_checkpoint_goes_on_with_any_type(tmp_path, before, after, offload):
    old = config_of(before, data=2, tensor=4)
    new = config_of(after, data=8)
    new = dataclasses.replace(new, train=dataclasses.replace(new.train, offload=offload))
    saved = state_on(old)
    found = stored_and_read(tmp_path, old, new, saved)
    expected = saved
    if before != after:
        expected = jax.jit(lambda state: moments.encode(moments.decode(state), after, 0))(saved)
    assert_equal(found, expected)
    abstract = abstract_state(new, make_mesh(new.mesh)).opt_state
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(abstract), strict=True):
        assert one.sharding == other.sharding and one.dtype == other.dtype
