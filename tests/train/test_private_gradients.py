"""Check the gradients of differentially private training: clipped against a loop over examples,
noised, and on every mesh equal to one device."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats
from test_step import DEEP, LENGTH, MODEL, ROWS, config_of, mesh_of, parameters, quick, rows

from mtnlg_jax.config import MoEConfig, validate
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import row_shards, shardings_of
from mtnlg_jax.train import lora, privacy, private_gradients, quantized_base
from mtnlg_jax.train.arrays import Held
from mtnlg_jax.train.batch import put_batch
from mtnlg_jax.train.private_gradients import make_private_gradients

CLIP = 3.4  # of 16 examples, the gradients of about half are longer
NOISE = 0.8
NOISE_KEY = np.arange(2, dtype=np.uint32)


def private_config(data=1, tensor=1, zero=1, model=MODEL, mesh=(), optimizer=(), **train):
    config = config_of(data, tensor, zero, 1, model, mesh, **train)
    given = {"dp_noise_multiplier": NOISE, "dp_clip_norm": CLIP} | dict(optimizer)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **given))
    validate(config)
    return config


def batch_of(config, mesh, data):
    """Return (batch, micro-batches in use) of the rows ``data``, a unit of each shard after
    another; the batch has room for ROWS, so that all share a program."""
    size = row_shards(mesh.shape) * config.optimizer.rows_of_unit
    used = len(data["tokens"])
    data = {
        name: np.concatenate([x, np.zeros((ROWS - used, *x.shape[1:]), x.dtype)])
        for name, x in data.items()
    }
    shape = (ROWS // size, size, LENGTH)
    batch = put_batch(lambda numbers: {name: x[numbers] for name, x in data.items()}, shape, mesh)
    return batch, -(-used // size)


@functools.cache
def compiled_once(config, causal=True):
    return jax.jit(make_private_gradients(config, mesh_of(config), causal))


def gradients(config, data=None, step=0, params=None):
    """Return (loss, leaves of the noised mean over 16 units in the mean, figures)."""
    mesh = mesh_of(config)
    params = parameters(config.model) if params is None else params
    params = jax.device_put(params, shardings_of(params, mesh, config.mesh.zero))
    batch, count = batch_of(config, mesh, rows() if data is None else data)
    key = jax.random.key_data(jax.random.key(3))
    loss, grads, figures = compiled_once(config)(
        params, batch, jnp.int32(count), key, jnp.int32(step), jnp.int32(16), NOISE_KEY
    )
    return float(loss), [np.asarray(g) for g in jax.tree.leaves(grads)], jax.device_get(figures)


def largest_difference(one, other):
    """Return it relative to the largest of all numbers of ``other``."""
    most = max(np.abs(x).max() for x in other)
    return max(np.abs(a - b).max() for a, b in zip(one, other, strict=True)) / most


# --- clipping


@functools.cache
def alone(noise=0.0, **optimizer):
    # Next to no noise: the sum itself.
    given = {"dp_noise_multiplier": noise or 1e-30} | optimizer
    return gradients(private_config(optimizer=given))


@jax.jit
def gradient_of_logits(params, data):
    def loss(params):
        logits = nnx.merge(abstract_model(MODEL)[0], params)(
            data["tokens"], positions_BS=data["positions"], segment_ids_BS=data["segment_ids"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, data["labels"])
        return (losses * data["weights"]).sum() / data["weights"].sum()

    return jax.grad(loss)(params)


@functools.cache
def gradient_of_rows(first, count):
    """Return (norm, leaves) of the gradient of the mean loss of rows, by autodiff of logits."""
    data = {name: x[first : first + count] for name, x in rows().items()}
    found = jax.tree.leaves(gradient_of_logits(parameters(MODEL), data))
    leaves = [np.asarray(leaf, np.float64) for leaf in found]
    return math.sqrt(sum(np.square(leaf).sum() for leaf in leaves)), leaves


def loop_over_units(count, limit):
    """Return (the clipped gradients of units of ``count`` rows, summed; their norms)."""
    found = [gradient_of_rows(first, count) for first in range(0, 16, count)]
    scales = [min(1.0, limit / norm) for norm, _ in found]
    parts = zip(*(leaves for _, leaves in found), strict=True)
    total = [sum(s * g for s, g in zip(scales, part, strict=True)) for part in parts]
    return total, np.array([norm for norm, _ in found])


def test_clipped_gradients_equal_a_loop_over_examples():
    wanted, norms = loop_over_units(1, CLIP)
    _, got, figures = alone()
    assert 3 < (norms > CLIP).sum() < 13  # some are clipped, and others are not
    assert figures["nonprivate_clipped"] == (norms > CLIP).mean()
    assert largest_difference([16 * g for g in got], wanted) < 1e-6
    # Without clipping it is another sum.
    assert largest_difference([16 * g for g in got], loop_over_units(1, 1e9)[0]) > 1e-3


def test_rows_of_a_source_are_clipped_together():
    limit = 2.41
    wanted, norms = loop_over_units(2, limit)
    assert 1 < (norms > limit).sum() < 7
    config = private_config(
        optimizer={"dp_unit": "source", "dp_source_rows": 2, "dp_clip_norm": limit}
        | {"dp_noise_multiplier": 1e-30}
    )
    # The mean is over 16 rows, so over 8 sources.
    assert largest_difference([8 * g for g in gradients(config)[1]], wanted) < 1e-6


def test_an_example_that_is_not_finite_counts_as_zero():
    broken = {name: x.copy() for name, x in rows().items()}
    broken["weights"][5, 0] = np.inf
    config = private_config(optimizer={"dp_noise_multiplier": 1e-30})
    _, got, figures = gradients(config, broken)
    norms = loop_over_units(1, CLIP)[1]
    assert figures["nonprivate_nonfinite"] == 1
    without = {name: np.delete(x, 5, 0) for name, x in rows().items()}
    assert largest_difference(got, gradients(config, without)[1]) < 1e-6
    assert figures["nonprivate_clipped"] == pytest.approx((np.delete(norms, 5) > CLIP).sum() / 16)


def test_no_example_changes_the_gradient_of_another():
    """Remove one: the sum moves by its clipped gradient and no more, also with dropout, whose masks
    follow the example and not its place in the batch."""
    model = dataclasses.replace(MODEL, dropout_rate=0.3)
    config = private_config(model=model, optimizer={"dp_noise_multiplier": 1e-30})
    numbered = rows() | {"rows": np.arange(100, 116)}
    _, whole, _ = gradients(config, numbered)
    for gone in (0, 9):
        less = {name: np.delete(x, gone, 0) for name, x in numbered.items()}
        _, part, _ = gradients(config, less)
        only = {name: x[gone : gone + 1] for name, x in numbered.items()}
        _, own, _ = gradients(config, only)
        moved = [16 * (a - b) for a, b in zip(whole, part, strict=True)]
        assert math.sqrt(sum(np.square(g).sum() for g in moved)) <= CLIP * (1 + 1e-5)
        assert largest_difference(moved, [16 * g for g in own]) < 1e-5
    # Numbered by place, the others would have moved.
    placed = {name: np.delete(x, 0, 0) for name, x in rows().items()}
    _, part, _ = gradients(config, placed)
    _, whole, _ = gradients(config)
    moved = [16 * (a - b) for a, b in zip(whole, part, strict=True)]
    assert math.sqrt(sum(np.square(g).sum() for g in moved)) > 1.2 * CLIP


# --- noise


def test_noise_is_gaussian_with_the_deviation_that_the_accountant_takes():
    config = private_config()
    silent = {name: x.copy() for name, x in rows().items()}
    silent["weights"][:] = 0  # the sum is 0: the noise is left, also of a step without an example
    drawn = np.concatenate([g.ravel() for g in gradients(config, silent, step=1)[1]])
    standard = 16 * drawn / (NOISE * CLIP)
    assert len(standard) > 30_000
    assert stats.kstest(standard, "norm").pvalue > 0.01
    assert standard.std() == pytest.approx(1, abs=4 / math.sqrt(2 * len(standard)))
    # It is on top of the sum, once, and another one in the next step.
    for step, equal in ((1, True), (2, False)):
        noised = np.concatenate([g.ravel() for g in gradients(config, step=step)[1]])
        plain = np.concatenate([g.ravel() for g in alone()[1]])
        assert (np.abs(noised - plain - drawn).max() < 1e-5) == equal
        if not equal:
            assert abs(np.corrcoef(noised - plain, drawn)[0, 1]) < 4 / math.sqrt(len(drawn))


def test_noise_has_no_gaps_and_long_tails():
    """A single draw of float32 has 2^23 values and ends at 5.42: a sum under it would show."""
    drawn = np.asarray(private_gradients._gaussian(jax.random.key(0), (2_000_000,)))
    single = np.asarray(jax.random.normal(jax.random.key(0), (2_000_000,), jnp.float32))
    # Repeated numbers: of a single draw 2e6 / (2 x 2^23), about 11 %.
    repeated = [1 - len(np.unique(each)) / len(each) for each in (drawn, single)]
    assert repeated[0] < repeated[1] / 2
    assert abs(stats.kurtosis(drawn)) < 4 * math.sqrt(24 / len(drawn))


def test_the_noise_follows_the_secret(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(32))
    own, seeded = (
        privacy.secret_of(private_config(optimizer=optimizer), "noise")
        for optimizer in ({"dp_secret": str(tmp_path / "secret")}, {})
    )
    samples = privacy.secret_of(private_config(), "samples")
    assert len({own, seeded, samples}) == 3 and {len(own), len(samples)} == {32}
    (tmp_path / "secret").write_bytes(b"short")
    for name, message in (("secret", "5 bytes"), ("gone", "cannot be read.*urandom")):
        config = private_config(optimizer={"dp_secret": str(tmp_path / name)})
        with pytest.raises(ValueError, match=message):
            privacy.secret_of(config, "noise")


# --- meshes: pipe, data, context, tensor; with noise


DEEP_CLIP = 3.45


@functools.cache
def on_a_mesh(pipe, data, context, tensor, zero=1, optimizer=(), params=None, **mesh):
    config = private_config(
        data,
        tensor,
        zero,
        DEEP,
        {"pipe": pipe, "context": context, **mesh},
        {"dp_clip_norm": DEEP_CLIP, **dict(optimizer)},
    )
    return gradients(config, step=2, params=None if params is None else params(config))


MESHES = [
    ((1, 2, 1, 2), 3, {}),
    ((2, 1, 2, 2), 1, {"schedule": "1f1b"}),
    ((1, 8, 1, 1), 1, {}),
    ((1, 8, 1, 1), 0, {}),
    ((1, 2, 2, 2), 1, {"context_mode": "gather"}),
    ((1, 1, 4, 2), 1, {"context_mode": "ring"}),
    ((1, 1, 2, 4), 1, {"tp_comm_overlap": True}),
    ((2, 2, 1, 2), 3, {}),
    ((4, 1, 1, 2), 1, {"virtual_pipe": 2}),
]


@pytest.mark.parametrize(("mesh", "zero", "options"), quick(MESHES, MESHES[1:2]), ids=str)
def test_private_gradients_on_every_mesh_equal_one_device(mesh, zero, options):
    loss, got, figures = on_a_mesh(*mesh, zero, **options)
    alone_loss, wanted, alone_figures = on_a_mesh(1, 1, 1, 1)
    assert 0.2 < alone_figures["nonprivate_clipped"] < 0.8
    assert figures == alone_figures and loss == pytest.approx(alone_loss, rel=2e-6)
    assert largest_difference(got, wanted) < 2e-6


def adapters(config):
    """Return the parameters of a step with adapters of which B is not 0."""
    base = parameters(config.model)
    if quantized_base.used(config):
        base = jax.tree.map(
            np.asarray,
            quantized_base.read_base(
                config, Held(base), mesh_of(private_config(model=config.model))
            ),
        )
    joined = lora.with_new_adapters(base, config, None)
    rng = np.random.default_rng(0)
    leaves = {
        name: x + rng.normal(size=x.shape).astype(np.float32) / 30
        for name, x in sorted(joined.raw_mapping["lora"]["blocks"].items())
    }
    return lora.computed(lora.joined(base, {"blocks": leaves}), config)


LORA = (("lora_rank", 4), ("lora_targets", ("q", "v", "in")), ("dp_clip_norm", 0.515))


@pytest.mark.parametrize(
    ("mesh", "zero", "base"),
    quick(
        [
            ((1, 2, 1, 2), 3, "float"),
            ((2, 1, 1, 2), 1, "float"),
            ((1, 2, 2, 2), 3, "float"),
            ((1, 4, 1, 2), 1, "int8"),
            ((1, 2, 1, 2), 3, "int8"),
        ],
        [((1, 2, 1, 2), 3, "float")],
    ),
)
def test_private_gradients_of_adapters_equal_one_device(mesh, zero, base, monkeypatch):
    monkeypatch.setattr("mtnlg_jax.config.rules._LORA_RULES", ())  # no run to start from
    optimizer = (*LORA, ("lora_base", base))
    _, wanted, figures = on_a_mesh(1, 1, 1, 1, optimizer=optimizer, params=adapters)
    assert 0.1 < figures["nonprivate_clipped"] < 0.9
    _, got, there = on_a_mesh(*mesh, zero, optimizer=optimizer, params=adapters)
    assert len(got) == 6 and there == figures
    assert largest_difference(got, wanted) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 4, 1, 2), (2, 1, 2, 2)], ids=str)
def test_private_gradients_of_experts_equal_one_device(mesh):
    moe = MoEConfig(num_moe_experts=4, moe_router_topk=2, moe_aux_loss_coeff=0.1)
    model = dataclasses.replace(MODEL, moe=moe)

    def found(pipe, data, context, tensor):
        given = {"pipe": pipe, "context": context}
        return gradients(private_config(data, tensor, 1, model, given))

    _, wanted, figures = found(1, 1, 1, 1)
    _, got, there = found(*mesh)
    assert there == figures and largest_difference(got, wanted) < 2e-6
