"""Check how the temporaries of a step grow with the number of micro-batches in a pipeline."""

import functools

import jax
import jax.numpy as jnp
import pytest

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train.batch import abstract_batch
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.state import abstract_state

MODEL = ModelConfig(
    num_layers=8,
    hidden_size=128,
    num_attention_heads=4,
    vocab_size=128,
    max_position_embeddings=256,
)


@functools.cache
def temporaries(micro_batches, dtype, **mesh):
    config = Config(
        model=MODEL,
        mesh=MeshConfig(pipe=2, data=1, tensor=2, **mesh),
        train=TrainConfig(
            global_batch_size=micro_batches,
            micro_batch_size=1,
            compute_dtype=dtype,
            recompute="full",
        ),
    )
    on = make_mesh(config.mesh, jax.devices()[:4])
    key = jax.random.key_data(jax.random.key(0))
    step = jax.jit(make_loss_and_gradients(config, on, causal=True))
    params = abstract_state(config, on).params
    batch = abstract_batch(config, on)
    lowered = step.lower(params, batch, jnp.int32(micro_batches), key)
    return lowered.compile().memory_analysis().temp_size_in_bytes


# Slow: float32, which runs the same code as bfloat16 with its separate sums.
@pytest.mark.parametrize(
    ("dtype", "mesh", "low", "high"),
    [
        pytest.param("float32", {}, 1, 3, marks=pytest.mark.slow),
        pytest.param("bfloat16", {}, 1, 3, marks=pytest.mark.slow),
        pytest.param("float32", {"virtual_pipe": 2}, 2, 4, marks=pytest.mark.slow),
        pytest.param("float32", {"schedule": "1f1b"}, 0, 0.1, marks=pytest.mark.slow),
        pytest.param("bfloat16", {"schedule": "1f1b"}, 0, 0.1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_temporaries_grow_by_a_few_stage_inputs_per_micro_batch(dtype, mesh, low, high):
    # A stage's input is this device's positions of one row; circular keeps one for each round of
    # each micro-batch.
    stage_input = 256 // 2 * MODEL.hidden_size * jnp.dtype(dtype).itemsize
    growth = (temporaries(32, dtype, **mesh) - temporaries(8, dtype, **mesh)) / 24 / stage_input
    assert low <= growth <= high
