"""Check that a decoder of a run's live parameters scores like that of the whole model on one
device, whatever the mesh of the run."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mtnlg_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from mtnlg_jax.decode.cache import prefill, unstack
from mtnlg_jax.decode.from_training import FromTraining
from mtnlg_jax.decode.scoring import score
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import lora
from mtnlg_jax.train.state import init_state

PLAIN = ModelConfig(
    num_layers=6,
    hidden_size=64,
    num_attention_heads=8,
    vocab_size=120,
    max_position_embeddings=32,
    init_method_std=0.3,
)
EXPERTS = dataclasses.replace(PLAIN, moe=MoEConfig(num_moe_experts=4, moe_router_topk=2))
CANDIDATES = [[7, 9, 11], [90, 3], [5], [100, 101, 102, 103]]


def config_of(mesh, model=PLAIN, base=None):
    return Config(
        model=model.padded(mesh.tensor),
        mesh=mesh,
        optimizer=OptimizerConfig(
            **({"lora_rank": 4, "lora_targets": ("q", "in"), "lora_base": base} if base else {})
        ),
        train=TrainConfig(
            compute_dtype="float32", micro_batch_size=1, init="a run" if base else ""
        ),
    )


@functools.cache
def params_of(model, base):
    """Return the parameters of a run on one device, with adapters that change the model."""
    config = config_of(MeshConfig(), dataclasses.replace(model, vocab_padding=0), base)
    params = init_state(config, make_mesh(config.mesh, jax.devices()[:1])).params
    return jax.tree.map(lambda x: np.asarray(x) + (np.asarray(x) == 0), params) if base else params


def scores_of(decoder):
    prefix = prefill(decoder, [[1, 5, 20, 33]], 32)
    return np.concatenate(score(decoder, prefix, CANDIDATES))


MESHES = {
    "data": MeshConfig(data=8),
    "zero 3": MeshConfig(data=2, tensor=4, zero=3),
    "pipe": MeshConfig(pipe=2, data=2, tensor=2, virtual_pipe=3),
    "pipe and context": MeshConfig(pipe=2, context=2, data=2),
}


@pytest.mark.parametrize("name", ["pipe", "zero 3"])
def test_scores_on_a_mesh_equal_those_on_one_device(name):
    make, decoder = check(MESHES[name], PLAIN, None)
    sizes = {axis: size for axis, size in decoder.mesh.shape.items() if size > 1}
    # With ZeRO-3 no device holds the whole model, as none does in training.
    wanted = {"pipe": 2, "data": 2, "tensor": 2} if name == "pipe" else {"tensor": 8}
    assert sizes == wanted
    parts = 4 if name == "pipe" else 8
    for layer in decoder.params[1]:
        for leaf in jax.tree.leaves(layer):
            if leaf.size > 1000:
                assert leaf.addressable_shards[0].data.size == leaf.size // parts
    assert make._program._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "pipe and context"])
def test_scores_on_more_meshes_equal_those_on_one_device(name):
    check(MESHES[name], PLAIN, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [MeshConfig(expert=2, data=4), MeshConfig(pipe=2, expert=2, data=2)]
)
def test_scores_of_experts_equal_those_on_one_device(mesh):
    _, decoder = check(mesh, EXPERTS, None)
    assert decoder.mesh.shape["pipe"] == 1 and decoder.mesh.shape["expert"] == 2


@pytest.mark.parametrize(
    ("mesh", "base"),
    [
        (MeshConfig(data=2, tensor=4), "int8"),
        pytest.param(MeshConfig(data=8), "float", marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=8, zero=0), "nf4", marks=pytest.mark.slow),
    ],
    ids=["int8", "float", "nf4"],
)
def test_adapters_are_merged_and_a_quantized_base_is_dequantized(mesh, base):
    check(mesh, dataclasses.replace(PLAIN, num_layers=2), base)


def check(mesh, model, base):
    config = config_of(mesh, model, base)
    here = make_mesh(mesh)
    alone = params_of(model, base)
    one = config_of(MeshConfig(), dataclasses.replace(model, vocab_padding=0), base)
    wanted = scores_of(unstack(lora.without(one).model, lora.merge(alone, one)))
    state = init_state(config, here)
    place = jax.tree.map(lambda leaf: leaf.sharding, state.params)

    def padded(leaf, whole):
        size = [(0, more - had) for had, more in zip(leaf.shape, whole.shape, strict=True)]
        return np.pad(np.asarray(leaf), size)

    params = jax.device_put(jax.tree.map(padded, alone, state.params), place)
    make = FromTraining(config, here)
    decoder = make(params)
    np.testing.assert_allclose(scores_of(decoder), wanted, rtol=2e-5, atol=2e-5)
    return make, decoder
