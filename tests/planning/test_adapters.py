"""Check the planned memory of runs with low-rank adapters against the arrays of their state."""

import dataclasses
import math

import jax
import pytest

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.planning.cost import Job
from mtnlg_jax.planning.layout import layout_of
from mtnlg_jax.planning.tensor_table import tensor_table
from mtnlg_jax.train.state import abstract_state

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=128,
    num_attention_heads=4,
    vocab_size=256,
    max_position_embeddings=32,
)
CONFIG = Config(
    model=MODEL,
    mesh=MeshConfig(data=2, tensor=2),
    train=TrainConfig(global_batch_size=4, init="a run"),
)


def config_of(base, zero=1, name="adamw"):
    return dataclasses.replace(
        CONFIG,
        mesh=dataclasses.replace(CONFIG.mesh, zero=zero),
        optimizer=OptimizerConfig(name=name, lora_rank=4, lora_base=base),
    )


@pytest.mark.parametrize(
    ("base", "zero", "name"),
    [("float", 1, "adamw"), ("int8", 0, "adamw"), ("nf4", 3, "adamw"), ("float", 1, "lion")],
)
def test_base_adapters_and_moments_equal_the_state(base, zero, name):
    config = config_of(base, zero, name)
    # Averages are of the adapters alone.
    train = dataclasses.replace(config.train, ema_decay=0.9 if name == "lion" else 0.0)
    config = dataclasses.replace(config, train=train)
    state = abstract_state(config, make_mesh(config.mesh, jax.devices()[:4]))

    def held(tree):
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    memory = Job(config, None).memory(layout_of(config))
    assert memory["base"] + memory["adapters"] == held([state.params, state.extras])
    assert memory["moments"] == held(
        [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    )


def test_fewer_bits_need_less_memory():
    def needed(base):
        config = config_of(base)
        # Many layers, of which one at a time is held in float32.
        config = dataclasses.replace(config, model=dataclasses.replace(MODEL, num_layers=24))
        return sum(Job(config, None).memory(layout_of(config)).values())

    whole, int8, nf4 = map(needed, ("float", "int8", "nf4"))
    assert nf4 < int8 < whole
    table = tensor_table(config_of("nf4"))
    assert "quantized.blocks.nf4_q_DNH" in table and "all, float32 and nf4" in table
    assert "adapters, moments and gradients are float32" in table
