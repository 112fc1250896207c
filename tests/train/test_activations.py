"""Compare the figures of activations with a longhand forward pass, and every mesh with one
device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import DEEP, LENGTH, batch_on, parameters, quick, rows

from mtnlg_jax.config import Config, LayerSpec, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import make_mesh, shardings_of
from mtnlg_jax.train.activations import make_activations
from mtnlg_jax.train.batch import batch_keys

USED = 5  # rows that count, of 16
PLAIN = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    ffn_hidden_size=20,
    vocab_size=128,
    max_position_embeddings=LENGTH,
    position_embedding_type="learned",
    normalization="rmsnorm",
    add_bias=False,
    init_method_std=0.5,
)


def config_of(model, **mesh):
    mesh = MeshConfig(**{"data": 1, **mesh})
    return Config(
        model=model,
        mesh=mesh,
        train=TrainConfig(global_batch_size=16, micro_batch_size=1, compute_dtype="float32"),
    )


def mesh_of(config):
    sizes = config.mesh
    parts = sizes.pipe * sizes.data * sizes.expert * sizes.context * sizes.tensor
    return make_mesh(sizes, jax.devices()[:parts])


@functools.cache
def program(config, causal):
    return jax.jit(make_activations(config, mesh_of(config), causal))


def activations(config, params, causal=True, data=None):
    mesh = mesh_of(config)
    params = jax.device_put(params, shardings_of(params, mesh, config.mesh.zero))
    key = jax.random.key_data(jax.random.key(3))
    found = program(config, causal)(params, batch_on(mesh, data=data), jnp.int32(USED), key)
    return jax.device_get(found)


def rms(x):
    return np.sqrt(np.square(x).mean())


def longhand(params, activation, limit, causal):
    """The figures of PLAIN in float64, from all weights of attention at once."""
    p = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    p = {name: np.asarray(x, np.float64) for name, x in p.items()}

    def of_blocks(name, layer):
        return next(x for path, x in p.items() if "blocks" in path and name in path)[layer]

    def normed(x, name, layer):
        scale = next(x for path, x in p.items() if name in path and "blocks" in path)[layer]
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + PLAIN.norm_epsilon) * scale

    data = {name: x[:USED] for name, x in rows().items()}
    table = next(x for path, x in p.items() if "tokens_VD" in path)
    places = next(x for path, x in p.items() if "positions_PD" in path)
    x = table[data["tokens"]] + places[data["positions"]]
    ids = data["segment_ids"]
    seen = ids[:, :, None] == ids[:, None, :]
    if causal:
        seen = seen & np.tril(np.ones((LENGTH, LENGTH), bool))
    found = {name: [] for name in ("residual", "attention", "mlp", "entropy", "lowest", "dead")}
    embedding = rms(x)
    for layer in range(PLAIN.num_layers):
        y = normed(x, "norm_1", layer)
        q, k, v = (
            np.einsum("bsd,dnh->bnsh", y, of_blocks(name, layer))
            for name in ("w_q_DNH", "w_k_DKH", "w_v_DKH")
        )
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        weights = np.exp(scores) * seen[:, None]
        weights = weights / weights.sum(-1, keepdims=True)
        entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1)
        y = np.einsum("bnsh,nhd->bsd", weights @ v, of_blocks("w_o_NHD", layer))
        x = x + y
        z = normed(x, "norm_2", layer)
        h = z @ of_blocks("w_in_DF", layer)
        gate = z @ of_blocks("w_gate_DF", layer) if activation == "swiglu" else None
        h = np.maximum(h, 0) if gate is None else h * gate / (1 + np.exp(-gate))
        z = h @ of_blocks("w_out_FD", layer)
        x = x + z
        found["residual"].append(rms(x))
        found["attention"].append(rms(y))
        found["mlp"].append(rms(z))
        found["entropy"].append(entropy.mean())
        found["lowest"].append(entropy.mean((0, 2)).min())
        found["dead"].append((np.abs(h).max((0, 1)) <= limit * rms(h)).mean())
    return embedding, found


@pytest.mark.parametrize(
    ("activation", "limit", "causal", "dead"),
    [("relu", 0, True, 2), ("swiglu", 0.01, False, 5)],
)
def test_figures_equal_a_longhand_forward_pass(activation, limit, causal, dead):
    model = dataclasses.replace(PLAIN, activation=activation)

    def spoiled(path, leaf):
        if "w_in_DF" not in jax.tree_util.keystr(path):
            return leaf
        # In the second layer two units give 0 and three very little: dead only if gated.
        leaf = leaf.copy()
        leaf[1, :, :2] = 0
        leaf[1, :, 2:5] *= 1e-5
        return leaf

    params = jax.tree_util.tree_map_with_path(spoiled, parameters(model))
    embedding, wanted = longhand(params, activation, limit, causal)
    assert wanted["dead"] == [0, dead / PLAIN.mlp_width]
    got = activations(config_of(model), params, causal)
    assert got["embedding_rms"] == pytest.approx(embedding, rel=1e-5)
    for name, theirs in {
        "residual_rms": "residual",
        "attention_rms": "attention",
        "mlp_rms": "mlp",
        "attention_entropy": "entropy",
        "attention_entropy_lowest": "lowest",
        "dead_units": "dead",
    }.items():
        np.testing.assert_allclose(got[name], wanted[theirs], rtol=2e-5, err_msg=name)


# Dropout, windows, distances, grouped heads with fewer keys than devices: what a mesh could break.
RICH = dataclasses.replace(
    DEEP,
    num_layers=2,
    num_query_groups=2,
    activation="relu",
    add_bias=True,
    dropout_rate=0.1,
    position_embedding_type="alibi",
    layer_pattern=(LayerSpec(window=4),),
    init_method_std=0.3,
)
EXPERTS = dataclasses.replace(
    DEEP,
    num_layers=2,
    activation="swiglu",
    add_bias=True,
    ffn_hidden_size=16,
    moe=MoEConfig(4, 1, moe_shared_expert_intermediate_size=16),
    init_method_std=0.3,
)


def spoiled_parameters(model):
    """Half of the units of ReLU are dead, and few tokens activate the others. The second layer
    sends all tokens to one expert."""
    params = jax.tree.map(np.array, parameters(model))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "b_in_F" in name and model.activation == "relu":
            leaf[:, ::2] = -100
            leaf[:, 1::2] = -4.5
        # So that a visit to an expert of another device would be seen.
        if "b_in_EF" in name or "b_gate_EF" in name:
            leaf[:] = 1
        if "w_router" in name:
            leaf[1] = 0
    return params


def assert_equals_one_device(model, mesh):
    mesh = dict(mesh)
    model = dataclasses.replace(model, num_layers=mesh.pop("layers", model.num_layers))
    params = spoiled_parameters(model)
    one = activations(config_of(model), params)
    if model.moe.num_moe_experts:
        # Of four experts and the shared one, all of the same width, three are without tokens.
        np.testing.assert_allclose(one["dead_units"][1], 0.6)
    else:
        assert ((one["dead_units"] > 0.5) & (one["dead_units"] < 1)).all()
    got = activations(config_of(model, **mesh), params)
    for name, wanted in one.items():
        np.testing.assert_allclose(got[name], wanted, rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("model", [RICH, EXPERTS], ids=["dense", "experts"])
def test_rows_that_do_not_count_change_nothing(model):
    other = {name: np.concatenate([x[:USED], x[USED:][::-1]]) for name, x in rows().items()}
    config = config_of(model)
    params = spoiled_parameters(model)
    one = activations(config, params)
    for name, x in activations(config, params, data=other).items():
        np.testing.assert_allclose(x, one[name], rtol=1e-6, err_msg=name)


# Quick: all axes that have ways of their own; the test of experts has those of tensor and expert.
@pytest.mark.parametrize(
    "mesh",
    quick(
        [
            {"data": 8},
            {"data": 2, "tensor": 4},
            {"data": 4, "tensor": 2, "zero": 0},
            {"data": 2, "context": 2, "tensor": 2, "zero": 3},
            {"data": 1, "context": 4, "context_mode": "gather"},
            {"data": 2, "pipe": 2, "tensor": 2, "schedule": "1f1b"},
            {"data": 2, "pipe": 2, "context": 2, "zero": 3},
            {"pipe": 2, "virtual_pipe": 2, "layers": 8, "tensor": 2},
        ],
        [{"data": 2, "pipe": 2, "context": 2, "zero": 3}],
    ),
    ids=str,
)
def test_every_mesh_equals_one_device(mesh):
    assert_equals_one_device(RICH, mesh)


@pytest.mark.parametrize(
    "mesh",
    quick(
        [{"data": 2, "expert": 2, "tensor": 2}, {"pipe": 2, "expert": 4}],
        [{"data": 2, "expert": 2, "tensor": 2}],
    ),
    ids=str,
)
def test_every_mesh_with_experts_equals_one_device(mesh):
    assert_equals_one_device(EXPERTS, mesh)


@pytest.mark.parametrize(
    "switches",
    [
        {"parallel_residual": "one_norm"},
        {"parallel_residual": "two_norms"},
        {"norm_placement": "sandwich", "qk_layernorm": "head", "attn_logit_softcapping": 20.0},
        {"norm_placement": "post"},
        {"norm_placement": "output"},
        {"attention_sink": True, "activation": "geglu", "num_query_groups": 2},
        {"moe": MoEConfig(4, 2), "activation": "swiglu_oai"},
    ],
    ids=lambda switches: "+".join(map(str, switches.values()))[:40],
)
def test_the_blocks_of_all_families_have_all_figures(switches):
    model = dataclasses.replace(PLAIN, **switches)
    config = config_of(model)
    batch = {name: jnp.asarray(x)[None] for name, x in rows().items()}
    batch["rows"] = jnp.arange(16)[None]
    assert set(batch) == set(batch_keys(model))
    key = jax.random.key_data(jax.random.key(0))
    run = make_activations(config, mesh_of(config), True)
    found = jax.eval_shape(run, abstract_model(model)[1], batch, jnp.int32(USED), key)
    assert {name: x.shape for name, x in found.items()} == {
        "embedding_rms": (),
        "residual_rms": (2,),
        "attention_rms": (2,),
        "mlp_rms": (2,),
        "attention_entropy": (2,),
        "attention_entropy_lowest": (2,),
        "dead_units": (2,),
    }


@pytest.mark.slow
def test_layers_of_a_longer_pattern_stay_in_order():
    # Three layers: a whole period, which a scan runs, and a layer after it.
    spec = LayerSpec(window=4)
    model = dataclasses.replace(PLAIN, num_layers=3, layer_pattern=(spec,))
    wanted = activations(config_of(model), parameters(model))
    assert len(set(np.round(wanted["mlp_rms"], 3))) == 3
    longer = dataclasses.replace(model, layer_pattern=(spec, spec))
    for name, x in activations(config_of(longer), parameters(model)).items():
        np.testing.assert_allclose(x, wanted[name], rtol=1e-5, err_msg=name)
