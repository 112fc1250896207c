"""Loss and gradients of the families' switches on every mesh equal those of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import (
    Config,
    LayerSpec,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    Multipliers,
    RopeScaling,
    TrainConfig,
    validate,
)
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.parallel.mesh import make_mesh, shardings_of
from mtnlg_jax.train.batch import put_batch
from mtnlg_jax.train.gradients import make_loss_and_gradients

ROWS = 16
LENGTH = 32
TOLERANCE = 1e-5
SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "ffn_hidden_size": 64,
    "vocab_size": 128,
    "max_position_embeddings": LENGTH,
}
ROTARY = {"position_embedding_type": "rotary", "normalization": "rmsnorm"}
MODELS = {
    # Windows in every second layer, and one key/value head for all parts of tensor (Gemma 3).
    "windows": ModelConfig(
        **SIZES,
        **ROTARY,
        num_query_groups=1,
        bias=(),
        norm_placement="sandwich",
        qk_layernorm="head",
        activation="geglu",
        layer_pattern=(LayerSpec(window=6, rotary_base=100.0, rope_scaling=False), LayerSpec()),
        rope_scaling=RopeScaling("linear", 8.0),
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        multipliers=Multipliers(embedding=5.6, attention=0.2),
    ),
    # Mixtral with biases that depend on the expert, a shared expert and the router's losses.
    "experts": ModelConfig(
        **SIZES,
        **ROTARY,
        num_query_groups=4,
        bias=("mlp",),
        activation="swiglu",
        moe=MoEConfig(
            4,
            2,
            moe_router_bias=True,
            moe_shared_expert_intermediate_size=24,
            moe_shared_expert_gate=True,
            moe_aux_loss_coeff=0.1,
            moe_z_loss_coeff=0.01,
        ),
        tie_embeddings=False,
    ),
    # BERT.
    "masked": ModelConfig(
        **SIZES,
        bias=("qkv", "out", "mlp", "norm", "head", "mlm"),
        norm_placement="post",
        embedding_norm=True,
        mlm_head=True,
        activation="gelu_exact",
    ),
    # BLOOM, with both half blocks side by side.
    "alibi": ModelConfig(
        **SIZES,
        position_embedding_type="alibi",
        embedding_norm=True,
        parallel_residual="two_norms",
    ),
    # Falcon: both half blocks read one norm, and all queries one key/value head.
    "one norm": ModelConfig(
        **SIZES,
        position_embedding_type="rotary",
        num_query_groups=1,
        bias=(),
        parallel_residual="one_norm",
    ),
    # OLMo 2 norms over all heads, with gpt-oss's sinks; two key/value heads for four parts.
    "norms of all heads": ModelConfig(
        **SIZES,
        **ROTARY,
        num_query_groups=2,
        bias=(),
        norm_placement="output",
        qk_layernorm="full",
        activation="swiglu",
        tie_embeddings=False,
        attention_sink=True,
    ),
}
MESHES = {
    "data and tensor": MeshConfig(data=2, tensor=4),
    "context": MeshConfig(data=1, context=2, tensor=2, zero=3),
    "pipe": MeshConfig(data=2, pipe=2, tensor=2),
    "1f1b": MeshConfig(data=1, pipe=2, tensor=2, schedule="1f1b"),
    "ZeRO 3": MeshConfig(data=4, tensor=2, zero=3),
    "rings": MeshConfig(data=1, context=2, tensor=4, tp_comm_overlap=True),
}
# Each of the axes beside expert, and both schedules; 8 devices but where rows are too few.
OF_EXPERTS = {
    "expert and data": MeshConfig(data=2, expert=4),
    "expert alone": MeshConfig(data=1, expert=4, zero=0),
    "expert and tensor": MeshConfig(data=1, expert=2, tensor=4),
    "expert, data and tensor": MeshConfig(data=2, expert=2, tensor=2, zero=3),
    "expert and context": MeshConfig(data=1, expert=2, context=2, tensor=2),
    "expert, context and ZeRO 3": MeshConfig(data=2, expert=2, context=2, zero=3),
    "expert and pipe": MeshConfig(data=1, expert=2, pipe=2, tensor=2, zero=3),
    "expert, data and pipe": MeshConfig(data=2, expert=2, pipe=2, virtual_pipe=2),
    "expert and 1f1b": MeshConfig(data=1, expert=4, pipe=2, schedule="1f1b"),
    "expert, data, 1f1b": MeshConfig(data=2, expert=2, pipe=2, schedule="1f1b", zero=0),
}
# One layer with nearly all switches: slow are the families, which tell what is wrong if it fails.
MODELS["all"] = dataclasses.replace(
    MODELS["windows"],
    num_layers=2,
    layer_pattern=(LayerSpec(window=6, rotary_base=100.0),),
    bias=("mlp", "head", "mlm"),
    activation="swiglu",
    embedding_norm=True,
    mlm_head=True,
    attention_sink=True,
    moe=MODELS["experts"].moe,
)
QUICK = {("all", "expert, data and tensor"), ("one norm", "rings")}


@functools.cache
def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    made = {
        "tokens": rng.integers(0, 128, shape),
        "labels": rng.integers(0, 128, shape),
        "segment_ids": np.sort(rng.integers(1, 3, shape), 1),
        "positions": np.tile(np.arange(LENGTH), (ROWS, 1)),
    }
    weights = (rng.random(shape) > 0.3).astype(np.float32)
    return {name: x.astype(np.int32) for name, x in made.items()} | {"weights": weights}


@functools.cache
def parameters(name: str):
    """Every parameter is random: at the initial ones and zeros mistakes of biases, scales and sinks
    could hide."""
    rng = np.random.default_rng(1)

    def noisy(leaf):
        size = 0.1 if leaf.ndim < 3 else 0.03
        return np.asarray(leaf) + size * rng.standard_normal(leaf.shape).astype(np.float32)

    return jax.tree.map(noisy, init_parameters(MODELS[name], seed=0))


@functools.cache
def loss_and_gradients(name: str, mesh_config: MeshConfig):
    sizes = (mesh_config.pipe, mesh_config.data, mesh_config.expert)
    sizes += (mesh_config.context, mesh_config.tensor)
    config = Config(
        model=MODELS[name],
        mesh=mesh_config,
        train=TrainConfig(
            global_batch_size=ROWS,
            micro_batch_size=ROWS // 2 // mesh_config.data // mesh_config.expert,
            compute_dtype="float32",
            loss_chunk=24,
            steps=10,
        ),
    )
    validate(config)
    mesh = make_mesh(mesh_config, jax.devices()[: np.prod(sizes)])
    params = jax.device_put(
        parameters(name), shardings_of(parameters(name), mesh, mesh_config.zero)
    )
    batch = put_batch(
        lambda numbers: {key: x[numbers] for key, x in rows().items()},
        (2, ROWS // 2, LENGTH),
        mesh,
    )
    causal = not MODELS[name].mlm_head
    function = jax.jit(make_loss_and_gradients(config, mesh, causal))
    key = jax.random.key_data(jax.random.key(3))
    loss, gradients = function(params, batch, jnp.int32(2), key)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return float(loss), {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(
            name, mesh, marks=[] if (name, mesh) in QUICK else pytest.mark.slow, id=f"{name}-{mesh}"
        )
        for name in MODELS
        for mesh, sizes in (
            MESHES | OF_EXPERTS if MODELS[name].moe.num_moe_experts else MESHES
        ).items()
        if MODELS[name].num_layers % (sizes.pipe * sizes.virtual_pipe) == 0
    ],
)
def test_a_mesh_equals_one_device(name, mesh):
    wanted_loss, wanted = loss_and_gradients(name, MeshConfig(data=1))
    loss, gradients = loss_and_gradients(name, (MESHES | OF_EXPERTS)[mesh])
    assert loss == pytest.approx(wanted_loss, rel=TOLERANCE)
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for key, gradient in wanted.items():
        assert np.abs(gradient).max() > 0, key
        assert np.abs(gradients[key] - gradient).max() <= TOLERANCE * largest, key
