"""Compare the Transformer with float64 NumPy; check causality, packing, padding, dropout and
init."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import MeshConfig, ModelConfig, RopeScaling
from mtnlg_jax.model import parts
from mtnlg_jax.model.hooks import Hooks, dropout
from mtnlg_jax.model.mlp import Mlp
from mtnlg_jax.model.parts import Norm
from mtnlg_jax.model.positions import rope_frequencies, rotate
from mtnlg_jax.model.transformer import Transformer, abstract_model, init_parameters
from mtnlg_jax.parallel.collectives import vary
from mtnlg_jax.parallel.mesh import AXES, make_mesh, parameter_name, shardings_of, specs_of

FLOAT32 = 3e-5  # two layers of float32 products, logits of size ten
LAST_BITS = 1e-6  # the same float32 formula, vectorized differently: a few units in the last place

SMALL = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "vocab_size": 24,
    "max_position_embeddings": 12,
}
GPT2 = ModelConfig(**SMALL)
LLAMA = ModelConfig(
    **SMALL,
    num_query_groups=2,
    kv_channels=6,
    ffn_hidden_size=20,
    rotary_base=50.0,
    position_embedding_type="rotary",
    normalization="rmsnorm",
    activation="swiglu",
    add_bias=False,
    tie_embeddings=False,
)
TOKENS = np.array(
    [[3, 17, 0, 9, 22, 4, 11, 6, 15, 1, 20, 8], [23, 2, 2, 7, 7, 7, 19, 5, 13, 0, 10, 12]], np.int32
)


def _random(tree, seed=0):
    """Return random parameters without zeros and ones, so that leaving one out changes the
    result."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.float32(0.3 * random.standard_normal(leaf.shape)), tree)


@functools.cache
def _parts(config):
    graph, shapes = abstract_model(config)
    return graph, _random(shapes)


def _model(config):
    return nnx.merge(*_parts(config))


def _assert_near(tree, other, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), tree, other
    )


@functools.cache
def _hidden(config, **options):
    """Return a jitted function (tokens, **arrays) -> last hidden states of the model of
    ``config``."""
    return jax.jit(functools.partial(_model(config).hidden, **options))


# --- reference


def _norm(x, scale, bias, epsilon):
    """Normalize over the last dim; bias None: RMSNorm."""
    if bias is not None:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale
    return x if bias is None else x + bias


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _rotate(vector, position, base):
    """Rotate one head's vector: the pairs (i, i + H/2) as complex numbers."""
    half = len(vector) // 2
    pairs = vector[:half] + 1j * vector[half:]
    pairs = pairs * np.exp(1j * position * base ** (-2 * np.arange(half) / len(vector)))
    return np.concatenate([pairs.real, pairs.imag])


def _forward(config, params, tokens, causal=True):
    """Return logits of one sequence in float64: GPT-2 (Radford 2019), or the options of Llama."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(params))
    length = len(tokens)
    epsilon = config.norm_epsilon
    x = p["tokens_VD"][tokens]
    if "positions_PD" in p:
        x = x + p["positions_PD"][:length]
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
        a = block["attention"]
        mlp = block["mlp"]
        h = _norm(x, block["norm_1"]["scale_D"], block["norm_1"].get("bias_D"), epsilon)
        update = np.zeros_like(x)
        for n in range(config.num_attention_heads):
            g = n // (config.num_attention_heads // config.kv_heads)
            q = h @ a["w_q_DNH"][:, n]
            k = h @ a["w_k_DKH"][:, g]
            v = h @ a["w_v_DKH"][:, g]
            if config.add_bias:
                q = q + a["b_q_NH"][n]
                k = k + a["b_k_KH"][g]
                v = v + a["b_v_KH"][g]
            if config.position_embedding_type == "rotary":
                base = config.rotary_base
                q, k = (
                    np.stack([_rotate(row, i, base) for i, row in enumerate(y)]) for y in (q, k)
                )
            for i in range(length):
                last = i + 1 if causal else length
                weights = np.exp(k[:last] @ q[i] / math.sqrt(config.head_width))
                update[i] += weights / weights.sum() @ v[:last] @ a["w_o_NHD"][n]
        x = x + update + (a["b_o_D"] if config.add_bias else 0)
        h = _norm(x, block["norm_2"]["scale_D"], block["norm_2"].get("bias_D"), epsilon)
        inner = h @ mlp["w_in_DF"] + (mlp["b_in_F"] if config.add_bias else 0)
        if config.activation == "swiglu":
            gate = h @ mlp["w_gate_DF"]
            inner = inner * gate / (1 + np.exp(-gate))
        else:
            inner = _gelu(inner)
        x = x + inner @ mlp["w_out_FD"] + (mlp["b_out_D"] if config.add_bias else 0)
    x = _norm(x, p["final_norm"]["scale_D"], p["final_norm"].get("bias_D"), epsilon)
    return x @ p.get("head_VD", p["tokens_VD"]).T


@pytest.mark.parametrize(
    ("config", "causal"),
    [(GPT2, True), (GPT2, False), (LLAMA, True)],
    ids=["gpt2", "gpt2_both_ways", "llama"],
)
def test_logits_equal_the_reference(config, causal):
    got = jax.jit(functools.partial(_model(config), causal=causal))(TOKENS)
    want = np.stack([_forward(config, _parts(config)[1], row, causal) for row in TOKENS])
    assert got.shape == (2, 12, 24) and got.dtype == jnp.float32 and np.abs(want).max() > 0.5
    np.testing.assert_allclose(got, want, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_equals_the_reference(kind):
    graph, params = nnx.split(Norm(ModelConfig(**SMALL, normalization=kind, norm_epsilon=0.01)))
    params = _random(params)
    x = (
        np.random.default_rng(1).standard_normal((2, 3, 16)).astype(np.float32) + 5
    )  # far from centered
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    assert ("bias_D" in p) == (kind == "layernorm")
    want = _norm(x.astype(np.float64), p["scale_D"], p.get("bias_D"), 0.01)
    norm = nnx.merge(graph, params)
    np.testing.assert_allclose(norm(x), want, rtol=FLOAT32, atol=FLOAT32)
    low = norm(jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(low), want, atol=0.03)  # the rounding of the input


def test_gelu_is_the_tanh_form():
    # One width, identity weights: the MLP is its activation. Erf's form differs by up to 5e-4 here.
    mlp = nnx.eval_shape(
        lambda: Mlp(
            ModelConfig(num_layers=1, hidden_size=1, num_attention_heads=1, ffn_hidden_size=1),
            rngs=nnx.Rngs(0),
        )
    )
    graph, params = nnx.split(mlp)
    identity = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, float("'w_" in jax.tree_util.keystr(path))), params
    )
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    got = nnx.merge(graph, identity)(x.reshape(1, -1, 1)).reshape(-1)
    np.testing.assert_allclose(got, _gelu(x.astype(np.float64)), atol=2e-6)


def test_rotary_positions_equal_complex_rotations_and_are_relative():
    x = np.random.default_rng(2).standard_normal((2, 3, 2, 8)).astype(np.float32)
    positions = np.array([[0, 5, 900], [7, 1, 2]], np.int32)
    frequencies = rope_frequencies(100.0, 8, RopeScaling(), 1000)
    got = jax.jit(functools.partial(rotate, frequencies=frequencies))(x, positions)
    for b, s, n in np.ndindex(2, 3, 2):
        want = _rotate(x[b, s, n].astype(np.float64), positions[b, s], 100.0)
        np.testing.assert_allclose(got[b, s, n], want, atol=3e-4)  # float32 angles up to 900
    moved = jax.jit(functools.partial(rotate, frequencies=frequencies))(x, positions + 3)
    products, moved_products = (np.einsum("bsnh,btnh->bnst", y, y) for y in (got, moved))
    np.testing.assert_allclose(products, moved_products, atol=2e-3)


# --- invariants


def test_later_tokens_get_no_gradient():
    graph, params = _parts(GPT2)
    direction = np.random.default_rng(3).standard_normal(16)
    tokens = TOKENS[:1]  # all different: each row of the embedding is one position of the text

    def of_embedding(table):
        other = jax.tree_util.tree_map_with_path(
            lambda path, leaf: table if "tokens_VD" in jax.tree_util.keystr(path) else leaf, params
        )
        return nnx.merge(graph, other).hidden(tokens)[0] @ direction

    table = nnx.to_pure_dict(params)["tokens_VD"]
    reach = np.abs(jax.jit(jax.jacrev(of_embedding))(table)).sum(-1)[:, tokens[0]]
    later = np.triu(np.ones((12, 12), bool), 1)
    assert (reach[later] == 0).all() and (reach[~later] > 0).all()


FIRST = slice(0, 5)  # two documents in a row; the rest is padding
SECOND = slice(5, 9)
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
POSITIONS = np.array([[*range(5), *range(4), *range(3)]], np.int32)


@pytest.mark.parametrize(
    ("config", "causal", "impl"),
    [(GPT2, True, "xla"), (GPT2, False, "xla_blockwise"), (LLAMA, False, "xla")],
)
def test_packed_documents_and_padding_do_not_interact(config, causal, impl):
    config = ModelConfig(**(vars(config) | {"attention_impl": impl}))
    tokens = TOKENS[:1]
    run = _hidden(config, causal=causal)
    packed = run(tokens, segment_ids_BS=SEGMENTS, positions_BS=POSITIONS)
    for part in (FIRST, SECOND):
        np.testing.assert_allclose(
            packed[:, part], run(tokens[:, part]), rtol=FLOAT32, atol=FLOAT32
        )
    filled = np.concatenate([tokens[:, :9], [[1, 1, 1]]], 1)
    other = run(filled, segment_ids_BS=SEGMENTS, positions_BS=POSITIONS)
    assert np.array_equal(other[:, :9], packed[:, :9]) and not np.array_equal(
        other[:, 9:], packed[:, 9:]
    )
    # Without the ids the second document sees the first, so the test can fail.
    leaking = run(tokens, segment_ids_BS=np.ones_like(SEGMENTS), positions_BS=POSITIONS)
    assert np.abs(leaking[:, SECOND] - packed[:, SECOND]).max() > 0.01


# Slow: policies between elementwise and full.
@pytest.mark.parametrize(
    "recompute",
    [
        "elementwise",
        "full",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlp", "projections")),
    ],
)
def test_recomputing_does_not_change_the_result(recompute):
    graph, params = _parts(GPT2)

    def loss(params, recompute):
        return (
            nnx.merge(graph, params).hidden(TOKENS, hooks=Hooks(recompute=recompute)) ** 2
        ).sum()

    (value, grads), (plain, plain_grads) = (
        jax.jit(jax.value_and_grad(functools.partial(loss, recompute=name)))(params)
        for name in (recompute, "none")
    )
    np.testing.assert_allclose(value, plain, rtol=LAST_BITS)
    _assert_near(grads, plain_grads, FLOAT32)


@pytest.mark.parametrize(("tensor", "overlap"), [(1, False), (4, False), (4, True)])
@pytest.mark.parametrize(
    ("recompute", "kept"),
    [("none", 32), ("elementwise", 20), ("mlp", 12), ("projections", 6), ("full", 2)],
)
def test_a_recompute_policy_keeps_the_documented_bytes(recompute, kept, tensor, overlap):
    config = ModelConfig(
        num_layers=1,
        hidden_size=512,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=256,
        attention_impl="xla_blockwise",
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16), params)
    mesh = make_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])
    found = []

    def local(params, x_BSD):
        params, x_BSD = vary((params, x_BSD))
        model = nnx.merge(graph, params)
        positions = jnp.zeros((3, 256), jnp.int32)
        layers = nnx.state(model.blocks)
        _, back = jax.vjp(
            lambda layers, x: model.run_layers(
                layers, 0, x, positions, hooks=Hooks(recompute=recompute, overlap=overlap)
            ),
            layers,
            x_BSD,
        )
        whole = [w.size for w in jax.tree.leaves(layers)]
        found.append(sum(leaf.nbytes for leaf in jax.tree.leaves(back) if leaf.size not in whole))
        return x_BSD

    x = jax.ShapeDtypeStruct((3, 256, 512), jnp.bfloat16)
    jax.eval_shape(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs_of(params), P("data", "tensor")),
            out_specs=P(("pipe", "data", "expert", "context"), "tensor"),
        ),
        params,
        x,
    )
    assert found[0] / (3 * 256 * 512) * tensor == pytest.approx(kept, rel=0.05)


def test_bfloat16_weights_give_float32_logits_near_the_exact_ones():
    graph, params = _parts(GPT2)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    model = nnx.merge(graph, low)
    assert jax.eval_shape(model.hidden, TOKENS).dtype == jnp.bfloat16
    logits = jax.jit(model)(TOKENS)
    want = np.stack([_forward(GPT2, params, row) for row in TOKENS])
    assert logits.dtype == jnp.float32
    assert np.abs(logits - want).max() < 0.05 * np.abs(want).max()


# --- dropout


def test_dropout_drops_its_share_and_keeps_the_mean():
    dropped = jax.jit(functools.partial(dropout, rate=0.3))(
        jnp.ones((16, 64, 32)), key=jax.random.key(0), rows_B=jnp.arange(16)
    )
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.7)}
    error = 5 * math.sqrt(0.3 * 0.7 / dropped.size)
    assert (dropped == 0).mean() == pytest.approx(0.3, abs=error)
    for dims in ((0, 1), (0, 2), (1, 2)):  # no row, position or width is preferred
        assert np.ptp((dropped == 0).mean(dims)) < 0.2


def test_dropout_masks_follow_their_rows():
    run = jax.jit(functools.partial(dropout, jnp.ones((3, 4, 32)), 0.5, jax.random.key(0)))
    masks = run(jnp.int32([4, 9, 2]))
    assert np.array_equal(run(jnp.int32([2, 4, 9])), masks[jnp.array([2, 0, 1])])
    assert len({row.tobytes() for row in np.asarray(masks).reshape(12, 32)}) == 12


def test_every_half_block_has_its_own_dropout_mask():
    # The four half blocks add ones, so a width ends with 0 to 4 of them. With one mask for all it
    # would end with 0 or 4, and with one mask for each layer or for each half with 0, 2 or 4.
    config = ModelConfig(**SMALL, dropout_rate=0.5)
    graph, shapes = abstract_model(config)
    ones = ("b_o_D", "b_out_D", "scale_D")
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, float(parameter_name(path) in ones)), shapes
    )
    hooks = Hooks(dropout_key=jax.random.key(0), rows_B=jnp.arange(2))
    x_BSD = jax.jit(functools.partial(nnx.merge(graph, params).hidden, hooks=hooks))(TOKENS)
    values = [len(np.unique(row.round(4))) for row in np.asarray(x_BSD).reshape(-1, 16)]
    assert max(values) == 5


def test_dropout_is_off_without_a_rate_or_a_key():
    dropping = ModelConfig(**SMALL, dropout_rate=0.5)
    on = Hooks(dropout_key=jax.random.key(1), rows_B=jnp.arange(2))

    def draws(config, **options):
        hidden = functools.partial(_model(config).hidden, **options)
        return "random_bits" in str(jax.make_jaxpr(hidden)(TOKENS))

    assert draws(dropping, hooks=on)
    assert not draws(dropping) and not draws(GPT2, hooks=on)


def test_hidden_states_with_dropout_are_equal_on_a_mesh():
    config = ModelConfig(**SMALL, dropout_rate=0.5)
    graph, params = _parts(config)
    rows = np.array([5, 3], np.int32)
    key = jax.random.key_data(jax.random.key(1))

    def run(params, tokens, segments, rows, key):
        return nnx.merge(graph, params).hidden(
            tokens,
            segment_ids_BS=segments,
            hooks=Hooks(dropout_key=jax.random.wrap_key_data(key), rows_B=rows),
        )

    def run_local(*args):
        return run(*vary(args))[None]  # replicated over tensor: one copy of each is compared

    segments = np.repeat(SEGMENTS, 2, 0)
    mesh = make_mesh(MeshConfig(data=2, tensor=4, zero=0))
    over_mesh = jax.shard_map(
        run_local,
        mesh=mesh,
        out_specs=P(AXES[:1] + AXES[2:], "data"),
        in_specs=(specs_of(params, zero=0), *[P("data")] * 3, P()),
    )
    copies = jax.jit(over_mesh)(params, TOKENS, segments, rows, key)
    alone = jax.jit(run)(params, TOKENS, segments, rows, key)
    assert copies.shape == (4, 2, 12, 16)
    for copy in copies:
        np.testing.assert_allclose(copy, alone, rtol=FLOAT32, atol=FLOAT32)
    assert (
        np.abs(alone - _hidden(GPT2)(TOKENS, segment_ids_BS=segments)).max() > 0.5
    )  # dropout took effect


# --- initialization


@pytest.fixture(scope="module")
def initial():
    config = ModelConfig(
        num_layers=8,
        hidden_size=64,
        num_attention_heads=8,
        vocab_size=512,
        max_position_embeddings=64,
        init_method_std=0.02,
    )
    return config, init_parameters(config, 0)


def test_matrices_are_normal_and_residual_outputs_are_scaled_down(initial):
    config, params = initial
    small = 0.02 / math.sqrt(2 * config.num_layers)  # Radford 2019; Shoeybi 2019, section 4.2
    stds = {"w_o_NHD": small, "w_out_FD": small}
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = parameter_name(path)
        if name.startswith(("scale_", "b")):
            assert (leaf == (1 if name.startswith("scale_") else 0)).all(), name
            continue
        std = stds.get(name, 0.02)
        error = 5 / math.sqrt(2 * leaf.size)
        assert np.std(leaf) == pytest.approx(std, rel=error), name
        assert abs(np.mean(leaf)) < 5 * std / math.sqrt(leaf.size), name
        assert 3 < np.abs(leaf).max() / std < 7, name
        seen.add(name)
    assert seen == {
        "tokens_VD",
        "positions_PD",
        *(f"w_{name}" for name in ("q_DNH", "k_DKH", "v_DKH", "o_NHD", "in_DF", "out_FD")),
    }


def test_initial_matrices_and_layers_all_differ(initial):
    blocks = nnx.to_pure_dict(initial[1])["blocks"]
    starts = [
        np.asarray(blocks["attention"][name]).reshape(8, -1)[:, :16]
        for name in ("w_q_DNH", "w_k_DKH", "w_v_DKH")
    ]
    starts.append(np.asarray(blocks["mlp"]["w_in_DF"]).reshape(8, -1)[:, :16])
    assert len({row.tobytes() for row in np.concatenate(starts)}) == 4 * 8


def test_initial_parameters_are_equal_on_a_mesh(initial):
    config, params = initial
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    shardings = shardings_of(abstract_model(config)[1], mesh, zero=1)

    def some(params):  # the compiler removes the others, which saves seconds
        tree = nnx.to_pure_dict(params)
        return (
            tree["tokens_VD"],
            tree["blocks"]["attention"]["w_k_DKH"],
            tree["blocks"]["mlp"]["w_out_FD"],
        )

    spread = jax.jit(lambda: some(init_parameters(config, 0, shardings)))()
    assert [x.sharding.shard_shape(x.shape) for x in spread] == [
        (128, 32),
        (8, 32, 2, 8),
        (8, 64, 32),
    ]
    _assert_near(spread, some(params), LAST_BITS)


def test_the_seed_determines_the_parameters():
    def table(seed):  # the compiler keeps only this tensor of the model, which is fast
        return jax.jit(lambda: nnx.to_pure_dict(init_parameters(GPT2, seed))["tokens_VD"])()

    assert not np.isclose(table(0), table(1)).any()


def test_an_abstract_model_allocates_nothing():
    config = ModelConfig(
        num_layers=105, hidden_size=20480, num_attention_heads=128, vocab_size=51200
    )
    graph, shapes = abstract_model(config)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    model = nnx.merge(graph, shapes)
    assert isinstance(model, Transformer) and model.config == config
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    logits = jax.eval_shape(lambda params, tokens: nnx.merge(graph, params)(tokens), shapes, tokens)
    assert logits.shape == (1, 8, 51200)


def test_gated_activation_apart_on_a_tpu_has_the_same_values_and_gradients(monkeypatch):
    graph, params = _parts(LLAMA)

    def loss(params):
        return jnp.mean(jnp.square(nnx.merge(graph, params).hidden(TOKENS)))

    def lowered():
        # A function of its own each time, since a trace is remembered.
        return jax.jit(lambda params: jax.value_and_grad(loss)(params)).lower(params)

    fused = lowered()
    # Kernels of attention are still those of a CPU.
    monkeypatch.setattr(parts, "compat", types.SimpleNamespace(platform=lambda: "tpu"))
    apart = lowered()
    assert "optimization_barrier" not in fused.as_text()
    assert "optimization_barrier" in apart.as_text()
    _assert_near(fused.compile()(params), apart.compile()(params), LAST_BITS)
