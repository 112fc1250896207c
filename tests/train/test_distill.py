"""Check distillation: the loss and gradient against a reference, every mesh, an equal teacher."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, StageConfig, TrainConfig, validate
from mtnlg_jax.model import loss
from mtnlg_jax.model.head import Head
from mtnlg_jax.model.transformer import abstract_model, init_parameters
from mtnlg_jax.parallel.mesh import make_mesh, shardings_of
from mtnlg_jax.train.batch import put_batch
from mtnlg_jax.train.distill import Distillation
from mtnlg_jax.train.gradients import make_loss_and_gradients


def cross_entropy(x, head, *rest, **options):
    return loss.cross_entropy(x, Head(head), *rest, **options)


def distilled_cross_entropy(x, head, teacher_x, teacher_head, *rest, **options):
    heads = (Head(head), teacher_x, Head(teacher_head))
    return loss.distilled_cross_entropy(x, *heads, *rest, **options)


T = 10
D = 8
C = 12
V = 24


@functools.cache
def states():
    rng = np.random.default_rng(0)
    floats = [
        jnp.asarray(rng.normal(0, 1, shape), jnp.float32)
        for shape in ((T, D), (V, D), (T, C), (V, C))
    ]
    return (
        *floats,
        jnp.asarray(rng.integers(0, V, T)),
        jnp.asarray(rng.random(T) > 0.3, jnp.float32),
    )


def longhand(x, head, teacher_x, teacher_head, labels, weights, temperature, share):
    student = jax.nn.log_softmax(x @ head.T)
    hard = -jnp.take_along_axis(student, labels[:, None], -1)[:, 0]
    teacher = jax.nn.softmax(teacher_x @ teacher_head.T / temperature)
    soft = -(teacher * jax.nn.log_softmax(x @ head.T / temperature)).sum(-1)
    return (((1 - share) * hard + share * temperature**2 * soft) * weights).sum()


@pytest.mark.parametrize(
    ("temperature", "share"), [pytest.param(1.0, 1.0, marks=pytest.mark.slow), (2.5, 0.3)]
)
def test_loss_and_gradient_equal_the_reference(temperature, share):
    x, head, *rest = states()
    ours, grads = jax.value_and_grad(
        lambda x, head: distilled_cross_entropy(
            x, head, *rest, chunk=4, temperature=temperature, share=share
        ),
        (0, 1),
    )(x, head)
    wanted, by_hand = jax.value_and_grad(
        lambda x, head: longhand(x, head, *rest, temperature, share), (0, 1)
    )(x, head)
    assert float(ours) == pytest.approx(float(wanted), rel=1e-6)
    for a, b in zip(grads, by_hand, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    # The same value when no gradient is requested.
    alone = distilled_cross_entropy(x, head, *rest, chunk=4, temperature=temperature, share=share)
    assert float(alone) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_an_equal_teacher_gives_no_gradient(temperature):
    x, head, _, _, labels, weights = states()
    value, grads = jax.value_and_grad(
        lambda x, head: distilled_cross_entropy(
            x, head, *states()[:2], labels, weights, chunk=4, temperature=temperature, share=1.0
        ),
        (0, 1),
    )(x, head)
    log_p = jax.nn.log_softmax(x @ head.T / temperature)
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    assert float(value) == pytest.approx(
        float((entropy * weights).sum()) * temperature**2, rel=1e-5
    )
    assert all(np.abs(grad).max() < 1e-5 for grad in grads)


def test_with_weight_0_the_loss_is_the_cross_entropy_bit_for_bit():
    x, head, *teacher, labels, weights = states()
    plain = jax.value_and_grad(
        lambda x, head: cross_entropy(x, head, labels, weights, 4, 0.1), (0, 1)
    )(x, head)
    ours = jax.value_and_grad(
        lambda x, head: distilled_cross_entropy(
            x, head, *teacher, labels, weights, 4, 0.1, 2.0, 0.0
        ),
        (0, 1),
    )(x, head)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert np.array_equal(a, b)
    to_teacher = jax.grad(
        lambda t: distilled_cross_entropy(x, head, t, teacher[1], labels, weights)
    )(teacher[0])
    assert not np.asarray(to_teacher).any()


# --- in the step

STUDENT = ModelConfig(
    num_layers=1, hidden_size=16, num_attention_heads=4, vocab_size=64, max_position_embeddings=16
)
TEACHER = dataclasses.replace(STUDENT, num_layers=2, hidden_size=32, num_attention_heads=8)
ROWS = 8
LENGTH = 16


@functools.cache
def rows():
    rng = np.random.default_rng(0)
    made = {
        "tokens": rng.integers(0, 64, (ROWS, LENGTH)),
        "labels": rng.integers(0, 64, (ROWS, LENGTH)),
        "segment_ids": np.sort(rng.integers(1, 4, (ROWS, LENGTH)), 1),
        "positions": np.tile(np.arange(LENGTH), (ROWS, 1)),
    }
    weights = (rng.random((ROWS, LENGTH)) > 0.3).astype(np.float32)
    return {name: value.astype(np.int32) for name, value in made.items()} | {"weights": weights}


def numbers(causal=True, teacher=TEACHER, temperature=2.0, weight=0.6, **mesh):
    mesh_config = MeshConfig(**{"data": 1} | mesh)
    config = Config(
        model=STUDENT,
        mesh=mesh_config,
        train=TrainConfig(
            global_batch_size=ROWS,
            micro_batch_size=ROWS // 2 // mesh_config.data,
            compute_dtype="float32",
            loss_chunk=24,
        ),
    )
    validate(config)
    on = make_mesh(
        mesh_config, jax.devices()[: mesh_config.data * mesh_config.context * mesh_config.tensor]
    )
    params, theirs = (
        jax.device_put(
            init_parameters(model, seed),
            shardings_of(abstract_model(model)[1], on, mesh_config.zero),
        )
        for seed, model in enumerate((STUDENT, teacher))
    )
    function = make_loss_and_gradients(
        config, on, causal, Distillation(teacher, temperature, weight)
    )
    batch = put_batch(
        lambda n: {name: value[n] for name, value in rows().items()}, (2, ROWS // 2, LENGTH), on
    )
    loss, grads = jax.jit(function)(
        params, batch, jnp.int32(2), jax.random.key_data(jax.random.key(0)), theirs
    )
    return float(loss), [np.asarray(grad) for grad in jax.tree.leaves(grads)]


@functools.cache
def alone(causal=True):
    return numbers(causal)


def assert_equal_numbers(got, wanted, tolerance=2e-6):
    assert got[0] == pytest.approx(wanted[0], rel=tolerance)
    largest = max(np.abs(grad).max() for grad in wanted[1])
    for a, b in zip(got[1], wanted[1], strict=True):
        assert np.abs(a - b).max() <= tolerance * largest


@pytest.mark.parametrize("causal", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_step_equals_the_loss_of_two_whole_models(causal):
    data = rows()
    models = {}
    for seed, model in enumerate((STUDENT, TEACHER)):
        models[model] = abstract_model(model)[0], init_parameters(model, seed)

    def logits(model, params):
        return nnx.merge(models[model][0], params)(
            data["tokens"],
            positions_BS=data["positions"],
            segment_ids_BS=data["segment_ids"],
            causal=causal,
        )

    def loss(params, teacher):
        ours = logits(STUDENT, params)
        theirs = logits(TEACHER, teacher) / 2
        hard = -jnp.take_along_axis(jax.nn.log_softmax(ours), data["labels"][..., None], -1)[..., 0]
        soft = -(jax.nn.softmax(theirs) * jax.nn.log_softmax(ours / 2)).sum(-1)
        return ((0.4 * hard + 0.6 * 4 * soft) * data["weights"]).sum() / data["weights"].sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(models[STUDENT][1], models[TEACHER][1])
    assert_equal_numbers(
        alone(causal), (float(value), [np.asarray(grad) for grad in jax.tree.leaves(grads)]), 1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [{"data": 2, "context": 2, "tensor": 2}, {"data": 2, "tensor": 4, "zero": 3}], ids=str
)
def test_every_mesh_equals_one_device(mesh):
    assert_equal_numbers(numbers(**mesh), alone())


def stage(**settings):
    return Config(train=TrainConfig(stages=(StageConfig("s", **settings),)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            stage(distill="RUN", distill_temperature=0.0),
            r"stage 's': distill_temperature=0.0 is outside",
        ),
        (stage(distill="RUN", distill_weight=1.5), r"distill_weight=1.5 is outside \[0, 1\]"),
        (stage(distill_weight=0.1), "distill_weight=0.1 is for a teacher, and distill names none"),
        (
            dataclasses.replace(
                stage(distill="RUN"),
                mesh=MeshConfig(pipe=2),
                train=dataclasses.replace(stage(distill="RUN").train, micro_batch_size=1),
            ),
            "distill=RUN with mesh.pipe=2: .* set mesh.pipe=1",
        ),
    ],
)
def test_invalid_settings_raise_an_error(config, message):
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_the_z_loss_of_a_student_adds_to_its_gradient():
    x, head, *rest = states()
    weights = rest[-1]

    def gradients(share, z_coeff):
        def loss_of(x, head):
            return distilled_cross_entropy(
                x, head, *rest, chunk=4, temperature=2.0, share=share, z_coeff=z_coeff
            )

        return jax.grad(loss_of, (0, 1))(x, head)

    def of_z(x, head):
        return 0.05 * jnp.dot(jnp.square(jax.nn.logsumexp(x @ head.T, -1)), weights)

    for share in (0.0, 0.5):
        both = zip(gradients(share, 0.05), gradients(share, 0.0), strict=True)
        for (got, plain), want in zip(both, jax.grad(of_z, (0, 1))(x, head), strict=True):
            np.testing.assert_allclose(got - plain, want, rtol=2e-4, atol=2e-4)
            assert np.abs(want).max() > 0.1
