"""Check collectives in stages: the same numbers as in one, and the rings that a torus offers."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.parallel import rings
from mtnlg_jax.parallel.collectives import axis_index, gather_weights, reduce_gradients, vary
from mtnlg_jax.parallel.mesh import AXES, ROWS, make_mesh, shardings_of
from mtnlg_jax.train import gradients
from mtnlg_jax.train.batch import abstract_batch

REST = tuple(axis for axis in AXES if axis != "data")
WEIGHTS = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)


def _gathered_and_back(sizes):
    """Return (lowered text, weights of every device, summed gradients) over 8 devices."""
    mesh = make_mesh(MeshConfig(data=8))

    def local(w):
        with rings.staged({"data": sizes}):
            through = functools.partial(gather_weights, dtype=jnp.float32, zero=1)
            whole, back = jax.vjp(through, vary({"w_in_DF": w}))
            share = whole["w_in_DF"] * (1.0 + axis_index("data"))
            summed = reduce_gradients({"w_in_DF": share}, 1, scattered=False)
            return whole["w_in_DF"][None], back({"w_in_DF": share})[0]["w_in_DF"], summed["w_in_DF"]

    split = P("data", REST)
    step = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=P("data", "tensor"),
            out_specs=(P(AXES), split, P(ROWS, "tensor")),
        )
    )
    return step.lower(WEIGHTS).as_text(), step(WEIGHTS)


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2), (2, 2, 2)])
def test_stages_give_the_numbers_of_one_collective(sizes):
    text, (copies, *sums) = _gathered_and_back(sizes)
    for copy in copies:
        np.testing.assert_array_equal(copy, WEIGHTS)
    for total in sums:
        np.testing.assert_array_equal(total, 36 * WEIGHTS)
    assert text.count("stablehlo.all_gather") == len(sizes)
    assert text.count("stablehlo.reduce_scatter") == 2 * len(sizes)
    assert _gathered_and_back(())[0].count("stablehlo.all_gather") == 1


def _slice(extent, shape, axes=("data",), order=None, kind="TPU v5 lite"):
    """Return a stand-in for a mesh of ``shape`` over the chips of a torus of ``extent``."""
    places = list(np.ndindex(*extent))
    found = [
        SimpleNamespace(device_kind=kind, coords=places[number], slice_index=0)
        for number in (range(len(places)) if order is None else order)
    ]
    devices = np.array(found).reshape(shape)
    return SimpleNamespace(
        devices=devices, axis_names=axes, shape=dict(zip(axes, shape, strict=True))
    )


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        (_slice((16, 16), (256,)), (16, 16)),
        (_slice((16, 16), (256,), kind="TPU v6 lite"), (16, 16)),
        (_slice((8, 16), (32, 4), ("data", "tensor")), (4, 8)),
        (_slice((4, 4, 4), (64,)), (4, 4, 4)),
        (_slice((4, 4, 4), (16, 4), ("data", "tensor")), (4, 4)),
        (_slice((4, 4, 4), (4, 16), ("data", "tensor")), ()),  # one ring
        (_slice((2, 2), (4,), order=[0, 1, 3, 2]), ()),  # a ring through both dims
        (_slice((4, 4), (16,), order=[0, 5, *range(1, 5), *range(6, 16)]), ()),
        (_slice((16, 16), (256,), kind="TPU v5p"), ()),
        (_slice((16, 16), (256,), kind="NVIDIA H100 80GB HBM3"), ()),
        (_slice((4, 4), (1, 16), ("data", "tensor")), ()),
    ],
)
def test_stages_follow_the_dims_of_the_torus(mesh, sizes):
    assert rings.sizes_on(mesh, "data") == sizes


@pytest.mark.parametrize(
    ("axis", "sizes"),
    [("data", ()), ("pipe", (4, 4))],  # axis: along which the two slices lie
)
def test_no_stage_crosses_slices(axis, sizes):
    shape, axes = ((32,), ("data",)) if axis == "data" else ((2, 16), ("pipe", "data"))
    mesh = _slice((2, 4, 4), shape, axes)
    for device in mesh.devices.flat:
        device.slice_index, *device.coords = device.coords
    assert rings.sizes_on(mesh, "data") == sizes


@pytest.mark.parametrize("zero", [1, 3])
def test_a_step_in_stages_equals_one_without(zero, monkeypatch):
    config = Config(
        model=ModelConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=4,
            vocab_size=64,
            max_position_embeddings=8,
        ),
        mesh=MeshConfig(data=8, zero=zero),
        train=TrainConfig(
            global_batch_size=16, micro_batch_size=1, compute_dtype="float32", loss_chunk=8
        ),
    )
    mesh = make_mesh(config.mesh)
    params = init_parameters(config.model, seed=0)
    params = jax.device_put(params, shardings_of(params, mesh, zero))
    rng = np.random.default_rng(0)
    batch = jax.tree.map(
        lambda x: jax.device_put(rng.integers(0, 8, x.shape).astype(x.dtype), x.sharding),
        abstract_batch(config, mesh),
    )
    key = jax.random.key_data(jax.random.key(0))

    def run(sizes):
        monkeypatch.setattr(gradients, "sizes_on", lambda mesh, axis: sizes)
        step = jax.jit(gradients.make_loss_and_gradients(config, mesh, causal=True))
        lowered = step.lower(params, batch, jnp.int32(2), key)
        return lowered.as_text(), lowered.compile()(params, batch, jnp.int32(2), key)

    plain, (loss, grads) = run(())
    staged, (staged_loss, staged_grads) = run((4, 2))
    assert staged.count("all_gather") == 2 * plain.count("all_gather") > 0
    assert staged.count("reduce_scatter") == 2 * plain.count("reduce_scatter") > 0
    assert float(staged_loss) == pytest.approx(float(loss), rel=2e-6)
    largest = max(float(jnp.abs(each).max()) for each in jax.tree.leaves(grads))
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(staged_grads), strict=True):
        np.testing.assert_allclose(other, one, atol=2e-6 * largest)
