"""Check statistics against the step and rows of their own, on every mesh, and in whole runs."""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_step import DEEP, LENGTH, ROWS, batch_on, mesh_of, parameters, quick, rows

from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
    validate,
)
from mtnlg_jax.model.params import names_of
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.train import loop, lora, statistics
from mtnlg_jax.train.batch import BATCH_KEYS
from mtnlg_jax.train.distill import Distillation
from mtnlg_jax.train.metrics import read_metrics
from mtnlg_jax.train.noise_scale import Noise, effective, estimate, figures, smoothed
from mtnlg_jax.train.state import abstract_state, init_state
from mtnlg_jax.train.statistics import (
    make_activation_figures,
    make_half_gradients,
    make_norms,
    put_rows,
)
from mtnlg_jax.train.step import make_train_step

TOTAL = 160  # sequences of a run


SMALL = dataclasses.replace(DEEP, num_layers=2)


def config_of(model=SMALL, micro=2, optimizer=None, **mesh):
    return Config(
        model=model,
        mesh=MeshConfig(**{"data": 1, **mesh}),
        optimizer=optimizer or OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(
            global_batch_size=ROWS, micro_batch_size=micro, compute_dtype="float32", steps=10
        ),
    )


def state_of(config, mesh):
    # Parameters that are placed on a mesh compile nothing.
    return init_state(config, mesh, jax.tree.map(jnp.asarray, parameters(config.model)))


@functools.cache
def programs(config):
    mesh = mesh_of(config)
    return make_half_gradients(config, mesh, causal=True), make_norms(config, mesh, TOTAL)


def norms(config, sequences=ROWS, state=None):
    """The figures of the step that would take ``state``, in NumPy."""
    mesh = mesh_of(config)
    state = state_of(config, mesh) if state is None else state
    half, run = programs(config)
    first = -(-sequences // 2)
    halves = []
    for begin, count in ((0, first), (first, sequences - first)):
        batch, micro_batches = put_rows(
            config,
            mesh,
            lambda numbers: {name: x[numbers] for name, x in rows().items()},
            begin,
            count,
            ROWS // 2,
        )
        halves.append(half(state.params, state.step, batch, micro_batches))
    return jax.device_get(run(state, *halves, jnp.int32(sequences), 0.5))


def noise_of(own):
    noise = own["noise"]
    parts = tuple(effective(float(x["weight"]), float(x["square"])) for x in noise["halves"])
    return estimate(float(noise["dot"]), float(noise["difference"]), parts)


# --- the step


# Slow: masks of dropout, which the halves must draw as the step does.
@pytest.mark.parametrize(
    ("optimizer", "dropout"),
    [
        (OptimizerConfig(learning_rate=1e-2, clip_grad_norm=0.1, weight_decay=0.1), 0.0),
        pytest.param(OptimizerConfig(name="muon"), 0.1, marks=pytest.mark.slow),
    ],
    ids=["adamw", "muon"],
)
def test_norms_are_those_of_the_next_step(optimizer, dropout):
    model = dataclasses.replace(DEEP, num_layers=1, dropout_rate=dropout)
    config = config_of(model, micro=8, optimizer=optimizer)
    mesh = mesh_of(config)
    step = make_train_step(config, mesh, causal=True, total_samples=TOTAL)
    arguments = (batch_on(mesh), jnp.int32(2), jnp.int32(ROWS), 0.5)
    # After a step, so that moments are not 0.
    state, _ = step(state_of(config, mesh), *arguments)
    own = norms(config, state=state)
    before = {name: np.asarray(x) for name, x in names_of(state.params).items()}
    after, metrics = step(state, *arguments)
    total = np.sqrt(sum(x.sum() for x in own["grad"].values()))
    assert total == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    for name, old in before.items():
        axes = tuple(range(1 if name.startswith("blocks") else 0, old.ndim))
        moved = np.asarray(names_of(after.params)[name], np.float64) - old
        np.testing.assert_allclose(own["weight"][name], np.square(old).sum(axes), rtol=1e-5)
        # A difference of two float32 near 1 has 4 digits.
        wanted = np.square(moved).sum(axes)
        np.testing.assert_allclose(own["update"][name], wanted, rtol=5e-3, err_msg=name)


@functools.cache
def of_rows():
    """Gradients of the mean loss of each row by a plain forward pass, (ROWS, numbers), and the
    weights of the rows."""
    graph = abstract_model(SMALL)[0]
    data = rows()

    def loss(params, tokens, labels, ids, positions, weights):
        model = nnx.merge(graph, params)
        logits = model(tokens[None], positions_BS=positions[None], segment_ids_BS=ids[None])[0]
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
        return -(log_probs * weights).sum() / weights.sum()

    names = ("tokens", "labels", "segment_ids", "positions", "weights")
    axes = (None, *(0 for _ in names))
    params = parameters(SMALL)
    grads = jax.jit(jax.vmap(jax.grad(loss), axes))(params, *(data[name] for name in names))
    flat = np.concatenate([np.asarray(x).reshape(ROWS, -1) for x in jax.tree.leaves(grads)], 1)
    return flat.astype(np.float64), data["weights"].sum(1)


@pytest.mark.parametrize("sequences", [ROWS, 13])
def test_noise_is_that_of_the_gradients_of_rows(sequences):
    gradients, weights = of_rows()
    half = -(-sequences // 2)
    parts = [slice(0, half), slice(half, sequences)]
    a, b = (weights[part] @ gradients[part] / weights[part].sum() for part in parts)
    numbers = [weights[part].sum() ** 2 / np.square(weights[part]).sum() for part in parts]
    assert numbers[0] < half  # the weights differ
    own = one_device(2, sequences)
    found = noise_of(own)
    assert found.square == pytest.approx(a @ b, rel=1e-4)
    trace = np.square(a - b).sum() / (1 / numbers[0] + 1 / numbers[1])
    assert found.trace == pytest.approx(trace, rel=1e-4)
    mean = weights[:sequences] @ gradients[:sequences] / weights[:sequences].sum()
    assert sum(x.sum() for x in own["grad"].values()) == pytest.approx(mean @ mean, rel=1e-4)


def assert_equal_figures(got, wanted):
    largest = max(x.max() for x in wanted["grad"].values())
    for kind in ("weight", "grad", "update"):
        assert got[kind].keys() == wanted[kind].keys()
    for name, x in wanted["grad"].items():
        np.testing.assert_allclose(got["grad"][name], x, rtol=1e-4, atol=1e-6 * largest)
        np.testing.assert_allclose(got["weight"][name], wanted["weight"][name], rtol=1e-5)
    for field in ("trace", "square"):
        theirs = getattr(noise_of(wanted), field)
        assert getattr(noise_of(got), field) == pytest.approx(theirs, rel=1e-4)


# Quick: an odd number of rows, of which the first half has one more, in a pipeline of micro-batches
# that only some rows fill.
@pytest.mark.parametrize(
    ("mesh", "sequences"),
    quick(
        [
            ({"data": 8}, ROWS),
            ({"data": 2, "tensor": 4}, ROWS),
            ({"data": 4, "tensor": 2, "zero": 0}, ROWS),
            ({"data": 4, "tensor": 2, "zero": 3}, 13),
            ({"data": 2, "context": 2, "tensor": 2}, ROWS),
            ({"pipe": 2, "data": 2, "tensor": 2}, 13),
            ({"pipe": 2, "virtual_pipe": 2, "data": 2, "tensor": 2}, ROWS),
            ({"pipe": 2, "schedule": "1f1b", "data": 2, "tensor": 2, "zero": 3}, 13),
        ],
        [({"pipe": 2, "data": 2, "tensor": 2}, 13)],
    ),
    ids=str,
)
def test_every_mesh_equals_one_device(mesh, sequences):
    layers = 4 if mesh.get("virtual_pipe") else 2
    model = dataclasses.replace(SMALL, num_layers=layers)
    micro = 1 if mesh["data"] == 8 else 2
    wanted = one_device(layers, sequences)
    assert_equal_figures(norms(config_of(model, micro, **mesh), sequences), wanted)


@functools.cache
def one_device(layers, sequences):
    return norms(config_of(dataclasses.replace(SMALL, num_layers=layers)), sequences)


ADAPTERS = {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": ("q", "in")}


@pytest.mark.parametrize(
    ("optimizer", "model", "taught"),
    [
        (ADAPTERS, {}, False),
        (ADAPTERS | {"lora_base": "int8"}, {}, False),
        (ADAPTERS | {"lora_base": "nf4"}, {"moe": MoEConfig(4, 2), "activation": "swiglu"}, False),
        ({}, {"position_embedding_type": "learned", "mlm_head": True}, True),
    ],
    ids=["lora", "int8", "nf4 experts", "teacher"],
)
def test_all_that_trains_has_statistics(optimizer, model, taught):
    # Traced and not compiled: the step's own tests compare the numbers of each.
    config = config_of(
        dataclasses.replace(SMALL, hidden_size=64, **model),
        optimizer=OptimizerConfig(**optimizer),
    )
    mesh = mesh_of(config)
    state = abstract_state(config, mesh)
    batch = {name: jnp.zeros((1, 8, LENGTH), jnp.int32) for name in BATCH_KEYS}
    batch |= {"weights": jnp.ones((1, 8, LENGTH)), "rows": jnp.zeros((1, 8), jnp.int32)}
    teacher = (abstract_model(SMALL)[1],) if taught else ()
    options = {"distillation": Distillation(SMALL, 2.0, 0.5)} if taught else {}
    half = make_half_gradients(config, mesh, False, **options)
    part = jax.eval_shape(half, state.params, state.step, batch, jnp.int32(1), *teacher)
    run = make_norms(config, mesh, TOTAL)
    own = jax.eval_shape(run, state, part, part, jnp.int32(16), 1.0)
    trained, _ = lora.trainable(state.params, config)
    shapes = {
        name: x.shape[:1] * name.startswith("blocks") for name, x in names_of(trained).items()
    }
    for kind in ("weight", "grad", "update"):
        assert {name: x.shape for name, x in own[kind].items()} == shapes
    read = make_activation_figures(config, mesh, False)
    found = jax.eval_shape(read, state.params, state.step, batch, jnp.int32(8))
    assert found["dead_units"].shape == (2,)


# --- runs

WORDS = "the whale swam north while the old captain slept and nobody dared to wake him".split()


@pytest.fixture(scope="module")
def prepared(prepared_words):
    return prepared_words(WORDS)


def run_config(prepared, every, steps=6, **train):
    return Config(
        model=ModelConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            normalization="rmsnorm",
            add_bias=False,
        ),
        mesh=MeshConfig(data=1),
        data=DataConfig(path=prepared),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(
            steps=steps,
            stats_every=every,
            global_batch_size=8,
            eval_every=3,
            eval_batches=1,
            compute_dtype="float32",
            **train,
        ),
    )


@pytest.fixture(scope="module", autouse=True)
def one_device_for_runs(compiled_once):
    make = loop.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda mesh: make(mesh, jax.devices()[:1]))
        yield


def records(workdir, kind):
    found = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    return [record for record in found if record["kind"] == kind]


def test_a_run_records_statistics_and_its_losses_stay_the_same(prepared, tmp_path):
    train = {"rampup_batch_size": (2, 2, 12), "micro_batch_size": 2}
    loop.train(run_config(prepared, 0, **train), str(tmp_path / "off"), False)
    # The other is stopped and goes on.
    on = str(tmp_path / "on")
    loop.train(run_config(prepared, 2, **train), on, False, enough=bool)
    loop.train(run_config(prepared, 2, **train), on, False)
    losses = [
        [(x["step"], x["loss"], x["grad_norm"]) for x in records(tmp_path / name, "train")]
        for name in ("off", "on")
    ]
    assert losses[0] == losses[1]
    assert records(tmp_path / "off", "stats") == []
    found = records(on, "stats")
    assert [record["step"] for record in found] == [2, 4, 6]
    assert found[0]["sequences"] < found[-1]["sequences"]
    for record in found:
        (own,) = (x for x in records(on, "train") if x["step"] == record["step"])
        assert record["sequences"] == own["sequences"]
        assert record["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-4)
        for name, value in record.items():
            if name.endswith("_by_layer"):
                assert len(value) == 2
                assert all(np.isfinite(value)), name
        squares = np.square(record["weight_norm_by_parameter"]["blocks.mlp.w_in_DF"])
        assert (squares < np.square(record["weight_norm_by_layer"])).all()
    # Means over time go on as if the run had not stopped.
    noise = smoothed([Noise(record["noise_trace"], record["noise_square"]) for record in found])
    wanted = figures(noise, found[-1]["sequences"], LENGTH)
    assert wanted["noise_scale"] is not None
    assert {name: found[-1][name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert (tmp_path / "on/stats.png").stat().st_size > 10_000
    assert not (tmp_path / "off/stats.png").exists()


@pytest.mark.slow
def test_every_step_can_have_statistics(prepared, tmp_path):
    loop.train(run_config(prepared, 1, steps=4), str(tmp_path), False)
    assert [record["step"] for record in records(tmp_path, "stats")] == [1, 2, 3, 4]


def test_a_record_keeps_a_layer_without_a_number_as_null(tmp_path):
    log = loop.MetricsLog(str(tmp_path), 0)
    log.write({"kind": "stats", "step": 4, "x_by_layer": [1.0, None]})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["x_by_layer"] == [1.0, None]


def test_what_is_not_finite_is_null_and_estimates_nothing():
    found = statistics._plain({"a": [np.inf, 1.23456789], "b": {"c": float("nan")}, "d": "e"})
    assert found == {"a": [None, 1.23457], "b": {"c": None}, "d": "e"}


def test_private_training_refuses_statistics():
    config = config_of(optimizer=OptimizerConfig(dp_noise_multiplier=1.0))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, stats_every=5))
    with pytest.raises(ValueError, match=r"train.stats_every=5 .* differential privacy; set it to"):
        validate(config)
