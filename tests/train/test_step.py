"""Check that loss and gradients on every mesh of the devices equal those on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, TrainConfig, validate
from mtnlg_jax.model.transformer import abstract_model, init_parameters
from mtnlg_jax.parallel.mesh import make_mesh, shardings_of
from mtnlg_jax.train.batch import put_batch
from mtnlg_jax.train.evaluate import make_eval
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.state import init_state
from mtnlg_jax.train.step import make_train_step

MESH_TOLERANCE = 2e-6  # float32; relative to the largest gradient of all parameters
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=8, vocab_size=128, max_position_embeddings=16
)
ROWS = 16
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
    return {k: v.astype(np.int32) for k, v in made.items()} | {"weights": weights}


def config_of(data, tensor, zero=1, micro_batches=2, model=MODEL, mesh=(), **train):
    train = {"compute_dtype": "float32", "loss_chunk": 24, "steps": 10} | train
    micro = ROWS // micro_batches // data
    config = Config(
        model=model,
        mesh=MeshConfig(data=data, tensor=tensor, zero=zero, **dict(mesh)),
        train=TrainConfig(global_batch_size=ROWS, micro_batch_size=micro, **train),
    )
    validate(config)
    return config


def batch_on(mesh, micro_batches=2, data=None):
    data = rows() if data is None else data
    return put_batch(
        lambda numbers: {k: v[numbers] for k, v in data.items()},
        (micro_batches, ROWS // micro_batches, LENGTH),
        mesh,
    )


@functools.cache
def parameters(model):
    # NumPy arrays, because placing those on a mesh compiles nothing.
    return jax.tree.map(np.asarray, init_parameters(model, seed=0))


def mesh_of(config):
    mesh = config.mesh
    return make_mesh(mesh, jax.devices()[: mesh.pipe * mesh.data * mesh.context * mesh.tensor])


@functools.cache
def compiled_once(config, causal):
    return jax.jit(make_loss_and_gradients(config, mesh_of(config), causal))


def loss_and_gradients(config, causal=True, micro_batches=2, count=None, data=None, seed=3):
    mesh = mesh_of(config)
    params = jax.device_put(
        parameters(config.model), shardings_of(parameters(config.model), mesh, config.mesh.zero)
    )
    key = jax.random.key_data(jax.random.key(seed))
    loss, grads = compiled_once(config, causal)(
        params, batch_on(mesh, micro_batches, data), jnp.int32(count or micro_batches), key
    )
    return float(loss), [np.asarray(g) for g in jax.tree.leaves(grads)]


@functools.cache
def one_device():
    return loss_and_gradients(config_of(data=1, tensor=1))


def assert_equal_numbers(got, wanted, tolerance=MESH_TOLERANCE):
    assert got[0] == pytest.approx(wanted[0], rel=tolerance)
    largest = max(np.abs(g).max() for g in wanted[1])
    for a, b in zip(got[1], wanted[1], strict=True):
        assert np.abs(a - b).max() <= tolerance * largest


def quick(cases, chosen):
    """Return ``cases`` as parameters, with those that are not ``chosen`` marked slow."""
    assert all(case in cases for case in chosen)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else [case]),
            marks=[] if case in chosen else pytest.mark.slow,
        )
        for case in cases
    ]


# Quick: both axes without ZeRO. The tests below run its other stages; slow are the other pairs.
@pytest.mark.parametrize(
    ("data", "tensor", "zero"),
    quick(
        [(data, 8 // data, zero) for data in (1, 2, 4, 8) for zero in (0, 1, 3)],
        [(2, 4, 0)],
    ),
)
def test_every_mesh_of_8_devices_equals_one_device(data, tensor, zero):
    assert_equal_numbers(loss_and_gradients(config_of(data, tensor, zero)), one_device())


@pytest.mark.slow
def test_the_z_loss_is_equal_over_a_split_vocabulary():
    wanted = loss_and_gradients(config_of(data=1, tensor=1, z_loss_coeff=0.05))
    assert_equal_numbers(loss_and_gradients(config_of(2, 4, z_loss_coeff=0.05)), wanted)
    assert wanted[0] == one_device()[0]
    largest = max(np.abs(a - b).max() for a, b in zip(wanted[1], one_device()[1], strict=True))
    assert largest > 1e-3


# --- pipeline and context

# Without biases, which take a third longer to compile; OTHER, below, has them.
DEEP = dataclasses.replace(MODEL, num_layers=8, normalization="rmsnorm", add_bias=False)
# pipe, data, context, tensor
MESHES = [(2, 1, 2, 2), (2, 2, 1, 2), (4, 1, 1, 2), (1, 2, 2, 2)]
SCHEDULES = {"circular": {}, "interleaved": {"virtual_pipe": 2}, "1f1b": {"schedule": "1f1b"}}
MODES = ("ulysses", "gather", "ring")


def on_a_mesh(
    pipe,
    data,
    context,
    tensor,
    zero=1,
    dtype="float32",
    micro_batches=4,
    causal=True,
    model=DEEP,
    count=None,
    data_rows=None,
    seed=3,
    **mesh,
):
    config = config_of(
        data,
        tensor,
        zero,
        micro_batches,
        model,
        {"pipe": pipe, "context": context, **mesh},
        compute_dtype=dtype,
    )
    return loss_and_gradients(config, causal, micro_batches, count, data_rows, seed)


@functools.cache
def deep_alone(causal=True, model=DEEP, count=None, seed=3):
    return on_a_mesh(1, 1, 1, 1, causal=causal, model=model, count=count, seed=seed)


# ZeRO splits over data: where that is 1, all of its stages are the same program. Quick are
# interleaved, which is circular with more rounds, in a longer pipeline, and 1f1b with the stage of
# ZeRO that gathers most. tests/train/test_other_mesh.py runs interleaved with that stage.
@pytest.mark.parametrize(
    ("mesh", "zero", "schedule"),
    quick(
        [
            (mesh, zero, schedule)
            for schedule in SCHEDULES
            for mesh, zero in (
                ((2, 1, 2, 2), 1),
                ((2, 2, 1, 2), 1),
                ((2, 2, 1, 2), 3),
                ((4, 1, 1, 2), 1),
            )
        ],
        [
            ((2, 2, 1, 2), 3, "1f1b"),
            ((4, 1, 1, 2), 1, "interleaved"),
        ],
    ),
    ids=str,
)
def test_every_schedule_on_every_mesh_equals_one_device(mesh, schedule, zero):
    assert_equal_numbers(on_a_mesh(*mesh, zero, **SCHEDULES[schedule]), deep_alone())
    if schedule == "1f1b":  # a ramp gives it fewer micro-batches
        fewer = on_a_mesh(*mesh, zero, count=2, **SCHEDULES[schedule])
        assert_equal_numbers(fewer, deep_alone(count=2))


# Slow: gather, which tests/model/test_context_attention.py compares, ring, which the next test runs
# in a pipeline, and the other stages of ZeRO.
@pytest.mark.parametrize(
    ("mesh", "zero", "mode"),
    quick(
        [
            (mesh, zero, mode)
            for mode in MODES
            for mesh, zero in (((1, 2, 2, 2), 1), ((1, 2, 2, 2), 3), ((1, 1, 4, 1), 1))
        ],
        [((1, 2, 2, 2), 3, "ulysses")],
    ),
    ids=str,
)
def test_every_context_mode_equals_one_device(mesh, mode, zero):
    assert_equal_numbers(on_a_mesh(*mesh, zero, context_mode=mode), deep_alone())


# Slow: modes without their own backward pass; each runs without a pipeline above.
@pytest.mark.parametrize("mode", quick(MODES, ["ring"]))
def test_context_in_a_pipeline_with_the_masked_objective(mode):
    got = on_a_mesh(2, 1, 2, 2, causal=False, context_mode=mode, schedule="1f1b")
    assert_equal_numbers(got, deep_alone(causal=False))


# Quick: a mesh with each axis except data; slow are the other pairs.
@pytest.mark.parametrize(
    ("mesh", "schedule"),
    quick(
        [
            (mesh, schedule)
            for mesh in MESHES
            for schedule in (SCHEDULES if mesh[0] > 1 else ["circular"])
        ],
        [((2, 1, 2, 2), "1f1b")],
    ),
    ids=str,
)
def test_bf16_on_every_mesh_is_close_to_float32(mesh, schedule):
    got = on_a_mesh(*mesh, dtype="bfloat16", **SCHEDULES[schedule])
    assert got[0] != deep_alone()[0]
    assert_equal_numbers(got, deep_alone(), tolerance=3e-2)
    assert all(gradient.dtype == np.float32 for gradient in got[1])  # as the masters


# test_every_schedule_on_every_mesh_equals_one_device runs 1f1b with fewer micro-batches, and
# tests/train/test_other_mesh.py a ramp through interleaved flushes.
@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [{"schedule": "1f1b"}, {"flush": 2}, {"flush": 2, "virtual_pipe": 2}], ids=str
)
def test_a_pipeline_takes_fewer_micro_batches_and_flushes(mesh):
    # A count of 2 leaves out the second half of the rows, but the mean still counts their
    # weights.
    wanted = deep_alone(count=2)
    assert wanted[0] < 0.9 * deep_alone()[0]
    assert_equal_numbers(on_a_mesh(2, 1, 1, 2, count=2, **mesh), wanted)
    assert_equal_numbers(on_a_mesh(2, 1, 1, 2, **mesh), deep_alone())


@pytest.mark.parametrize(
    ("few", "many"),
    [
        ({"pipe": 1}, {"pipe": 1}),
        ({"schedule": "1f1b"}, {"schedule": "1f1b"}),
        pytest.param({"flush": 2}, {"flush": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"flush": 2}, {"flush": 16}, marks=pytest.mark.slow
        ),  # the case below with one round
        pytest.param(
            {"flush": 2, "virtual_pipe": 2},
            {"flush": 16, "virtual_pipe": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_gradients_of_micro_batches_are_summed_in_float32(few, many):
    # Sixteen micro-batches of the same row: the gradient is eight times that of two, except for
    # rounding.
    same = {key: np.repeat(value[:1], ROWS, 0) for key, value in rows().items()}
    (_, few), (_, many) = (
        on_a_mesh(
            mesh.pop("pipe", 2),
            1,
            1,
            1,
            dtype="bfloat16",
            micro_batches=16,
            count=count,
            data_rows=same,
            **mesh,
        )
        for count, mesh in ((2, dict(few)), (16, dict(many)))
    )
    for two, sixteen in zip(few, many, strict=True):
        assert np.abs(8 * two - sixteen).max() <= 1e-5 * np.abs(sixteen).max()


@pytest.mark.slow  # test_another_architecture_on_a_mesh has dropout without stages
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_dropout_masks_are_the_same_in_a_pipeline(schedule):
    model = dataclasses.replace(DEEP, dropout_rate=0.1)
    assert deep_alone(model=model)[0] != deep_alone()[0]
    got = on_a_mesh(2, 1, 2, 2, model=model, **SCHEDULES[schedule])
    assert_equal_numbers(got, deep_alone(model=model))


OTHER = dataclasses.replace(
    DEEP,
    position_embedding_type="rotary",
    normalization="layernorm",
    activation="swiglu",
    add_bias=True,
    tie_embeddings=False,
    num_query_groups=4,
    dropout_rate=0.1,
)


@pytest.mark.parametrize(
    ("mesh", "zero", "options"),
    [
        pytest.param((1, 2, 1, 4), 3, {}, marks=pytest.mark.slow),
        pytest.param(
            (2, 1, 2, 2), 3, {"virtual_pipe": 2, "context_mode": "ring"}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_another_architecture_on_a_mesh(mesh, zero, options):
    assert deep_alone(model=OTHER, seed=4)[0] != deep_alone(model=OTHER)[0]  # dropout acts
    assert_equal_numbers(on_a_mesh(*mesh, zero, model=OTHER, **options), deep_alone(model=OTHER))


# tests/model/test_tensor_products.py shows that the programs differ. Quick: each axis, both
# objectives and MLPs.
@pytest.mark.parametrize(
    ("mesh", "zero", "options"),
    quick(
        [
            ((1, 2, 1, 4), 3, {"model": OTHER}),
            ((1, 1, 2, 4), 1, {}),
            ((2, 1, 2, 2), 1, {"causal": False, "schedule": "1f1b"}),
            ((2, 2, 1, 2), 3, {"virtual_pipe": 2}),
        ],
        [((2, 1, 2, 2), 1, {"causal": False, "schedule": "1f1b"})],
    ),
    ids=str,
)
def test_products_while_chunks_travel_equal_one_device(mesh, zero, options):
    got = on_a_mesh(*mesh, zero, tp_comm_overlap=True, **options)
    alone = {key: options[key] for key in ("model", "causal") if key in options}
    assert_equal_numbers(got, deep_alone(**alone))


@functools.cache
def evaluation(data=1, tensor=1, zero=1, **mesh):
    config = config_of(data, tensor, zero, 4, DEEP, mesh)
    on = mesh_of(config)
    params = jax.device_put(parameters(DEEP), shardings_of(parameters(DEEP), on, zero))
    return [float(x) for x in make_eval(config, on, True)(params, batch_on(on, 4))]


# Quick: all axes but tensor, which the other tests split.
@pytest.mark.parametrize(
    "mesh",
    quick(
        [
            {"pipe": 2, "tensor": 2},
            {"pipe": 4, "tensor": 2, "virtual_pipe": 2},
            {"context": 2, "tensor": 2},
            {"pipe": 2, "context": 2, "tensor": 2},
            {"data": 4, "tensor": 2, "zero": 3},
            {"data": 2, "pipe": 2, "context": 2, "zero": 3},
        ],
        [{"data": 2, "pipe": 2, "context": 2, "zero": 3}],
    ),
    ids=str,
)
def test_evaluation_on_a_mesh_equals_one_device(mesh):
    assert evaluation(**mesh) == pytest.approx(evaluation(), rel=1e-6)
    assert evaluation()[1] == rows()["weights"].sum()


# test_context_in_a_pipeline_with_the_masked_objective runs it with less and with more
@pytest.mark.slow
def test_the_masked_objective_on_a_mesh_equals_one_device():
    assert deep_alone(causal=False)[0] != deep_alone(causal=True)[0]
    assert_equal_numbers(on_a_mesh(1, 2, 1, 4, 3, causal=False), deep_alone(causal=False))


@pytest.mark.slow  # test_another_architecture_on_a_mesh has dropout, too
def test_dropout_masks_are_the_same_on_every_mesh():
    model = dataclasses.replace(DEEP, dropout_rate=0.1)
    assert deep_alone(model=model)[0] != deep_alone()[0]
    assert_equal_numbers(on_a_mesh(1, 2, 1, 4, model=model), deep_alone(model=model))


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batches": 1, "recompute": "full", "loss_chunk": 7},
        pytest.param({"micro_batches": 1}, marks=pytest.mark.slow),
        pytest.param({"recompute": "full"}, marks=pytest.mark.slow),
        pytest.param({"loss_chunk": 7}, marks=pytest.mark.slow),
    ],
)
def test_accumulation_recompute_and_chunks_do_not_change_the_result(change):
    got = loss_and_gradients(
        config_of(1, 1, **change), micro_batches=change.get("micro_batches", 2)
    )
    assert_equal_numbers(got, one_device())


# Slow: smoothing, which tests/model/test_loss.py compares.
@pytest.mark.parametrize("smoothing", quick([0.0, 0.1], [0.0]))
def test_gradients_equal_autodiff_of_the_logits(smoothing):
    config = config_of(1, 1, label_smoothing=smoothing)
    loss, grads = loss_and_gradients(config)
    graph = abstract_model(MODEL)[0]
    params = parameters(MODEL)
    data = rows()

    def plain(params):
        logits = nnx.merge(graph, params)(
            data["tokens"], positions_BS=data["positions"], segment_ids_BS=data["segment_ids"]
        )
        targets = optax.smooth_labels(jax.nn.one_hot(data["labels"], logits.shape[-1]), smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
        return (losses * data["weights"]).sum() / data["weights"].sum()

    wanted, wanted_grads = jax.jit(jax.value_and_grad(plain))(params)
    assert_equal_numbers(
        (loss, grads), (float(wanted), [np.asarray(g) for g in jax.tree.leaves(wanted_grads)])
    )


@pytest.mark.slow  # test_bf16_on_every_mesh_is_close_to_float32 has less of ZeRO
def test_bf16_is_close_and_master_weights_stay_float32():
    config = config_of(2, 4, 3, compute_dtype="bfloat16")
    got = loss_and_gradients(config)
    wanted = one_device()
    assert got[0] != wanted[0]
    assert_equal_numbers(got, wanted, tolerance=3e-2)
    assert all(g.dtype == np.float32 for g in got[1])


@functools.cache
def stepper():
    """Return (mesh, compiled step, function that returns the initial state)."""
    config = config_of(1, 1, steps=60, max_bad_steps=3)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-2, warmup_fraction=0.0)
    config = dataclasses.replace(config, optimizer=optimizer)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = init_state(config, mesh, jax.device_put(parameters(MODEL), jax.devices()[0]))
    state = jax.device_put(state, shardings_of(state, mesh))
    step = make_train_step(config, mesh, causal=True)
    step = step.lower(state, batch_on(mesh), jnp.int32(2), jnp.int32(16), 1.0).compile()
    kept = jax.tree.map(np.array, state)
    # Each test has arrays of its own, because a step donates them.
    return (
        mesh,
        step,
        lambda: jax.device_put(jax.tree.map(np.array, kept), shardings_of(kept, mesh)),
    )


def test_a_batch_ramp_compiles_once_and_equals_the_small_batch():
    mesh, step, initial = stepper()  # the compiled step accepts no other shapes
    small = {k: v.copy() for k, v in rows().items()}
    small["weights"][ROWS // 2 :] = 0
    losses = []
    for count, data in ((2, rows()), (1, small), (2, small)):
        batch = batch_on(mesh, data=data)
        _, metrics = step(initial(), batch, jnp.int32(count), jnp.int32(8 * count), 1.0)
        losses.append(float(metrics["loss"]))
    assert losses[1] == pytest.approx(losses[2], rel=1e-6)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_nonfinite_step_changes_nothing_and_is_counted(poison):
    mesh, step, initial = stepper()
    before = initial()
    kept = jax.tree.map(np.asarray, before.params), jax.tree.map(np.asarray, before.opt_state)
    broken = {k: v.copy() for k, v in rows().items()}
    broken["weights"][0, 0] = poison
    state, metrics = step(before, batch_on(mesh, data=broken), jnp.int32(2), jnp.int32(16), 1.0)
    assert not np.isfinite(float(metrics["loss"]))
    for old, new in zip(
        jax.tree.leaves(kept), jax.tree.leaves((state.params, state.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    assert (int(state.nonfinite_streak), int(state.nonfinite_total), int(state.step)) == (1, 1, 1)
    state, _ = step(state, batch_on(mesh), jnp.int32(2), jnp.int32(16), 1.0)
    assert (int(state.nonfinite_streak), int(state.nonfinite_total)) == (0, 1)


def test_the_state_is_donated():
    _, step, initial = stepper()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(initial()))
    assert step.memory_analysis().alias_size_in_bytes >= 0.99 * held


def test_training_memorizes_one_batch():
    mesh, step, initial = stepper()
    state = initial()
    batch = batch_on(mesh)
    for _ in range(60):
        state, metrics = step(state, batch, jnp.int32(2), jnp.int32(16), 1.0)
    assert float(metrics["loss"]) < 1.0


def test_biases_and_norms_are_not_decayed():
    mesh, step, initial = stepper()
    silent = {k: v.copy() for k, v in rows().items()}
    silent["weights"][:] = 0  # no gradient: only decay moves parameters
    before = jax.tree.map(np.asarray, initial().params)
    state, _ = step(initial(), batch_on(mesh, data=silent), jnp.int32(2), jnp.int32(16), 1.0)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, old, new: (str(path), bool((old != np.asarray(new)).any())),
        before,
        state.params,
    )
    for path, changed in [
        x for x in jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple))
    ]:
        assert changed == any(name in path for name in ("w_", "tokens_VD", "positions_PD")), path
