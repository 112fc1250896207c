"""Compare attention() with a float64 reference; check its invariants, errors and memory."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtnlg_jax import compat
from mtnlg_jax.config import MeshConfig, ModelConfig, validate_model
from mtnlg_jax.model.attention import SUPPORT, attention, decode_attention, explain_attention
from mtnlg_jax.model.kernels import blocks
from mtnlg_jax.model.kernels.gpu import cudnn
from mtnlg_jax.parallel.mesh import make_mesh

IMPLS = ("xla", "xla_blockwise")
IMPLS_OF_CONFIG = ("auto", *SUPPORT)
FLOAT32 = 2e-5  # float32 sums of at most some dozens of numbers of size one
BFLOAT16 = 4e-2  # eight bits of mantissa: several roundings of 1/256 each, values up to about 3
BLOCKS = (4, 3)  # small, unequal, and not divisors of the lengths below unless stated


# (queries, keys, heads, key/value heads, static options, the arrays of each run). Every argument
# occurs at least once, several together, and lengths are not multiples of blocks. Runs of a case
# share a compilation.
SEGMENTS = ([[1] * 4 + [2] * 3, [9] * 7], [[1] * 8 + [2] * 4 + [0] * 2, [9] * 14])
CASES = {
    "causal": (10, 10, 4, 2, {}, [{}]),
    "both_ways": (5, 11, 4, 1, {"causal": False}, [{}]),
    "one_query": (1, 9, 2, 2, {"q_offset": 6}, [{}]),
    "before_the_keys": (
        11,
        4,
        2,
        1,
        {},
        [{"q_offset": [-2, -2]}],
    ),  # the first two queries see nothing
    "window_both_ways": (12, 12, 2, 2, {"window": 3, "causal": False}, [{}]),
    "all_arrays": (
        7,
        14,
        4,
        2,
        {},
        [
            {"segment_ids": SEGMENTS, "kv_lengths": [14, 14], "q_offset": [7, 7]},
            {"segment_ids": SEGMENTS, "kv_lengths": [11, 5], "q_offset": [2, 9]},
            {"segment_ids": SEGMENTS, "kv_lengths": [0, 1], "q_offset": [20, -5]},
        ],
    ),
    "all_options": (
        7,
        14,
        4,
        4,
        {"window": 6, "softcap": 1.5, "scale": 0.9},
        [
            {"segment_ids": SEGMENTS, "kv_lengths": [13, 9], "q_offset": [5, 3]},
            {"segment_ids": SEGMENTS, "kv_lengths": [14, 8], "q_offset": [-3, 7]},
        ],
    ),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_output_lse_and_gradients_equal_the_reference(case, impl, longhand):
    queries, keys, heads, kv_heads, options, runs = CASES[case]
    arrays = longhand.inputs(0, 2, queries, keys, heads, kv_heads)
    compute = jax.jit(
        functools.partial(longhand.everything, impl=impl, block_sizes=BLOCKS, **options)
    )
    for run in runs:
        got = compute(*arrays, **longhand.as_arrays(run))
        want = longhand.reference(*arrays, **options, **run)
        longhand.compare(got, want, FLOAT32)
        assert np.array_equal(np.isneginf(got[1]), np.isneginf(want[1]))


def test_cases_include_queries_that_see_nothing(longhand):
    blind = {}
    for name, (queries, keys, _, _, options, runs) in CASES.items():
        mask = {
            key: value for key, value in options.items() if key in ("causal", "window", "q_offset")
        }
        blind[name] = [
            int((~longhand.visible(2, queries, keys, **mask, **run)).all(-1).sum()) for run in runs
        ]
    assert (
        blind["before_the_keys"] == [4] and min(blind["all_arrays"][2], blind["all_options"][1]) > 0
    )


def test_bias_equals_the_reference(longhand):
    arrays = longhand.inputs(1, 2, 5, 7, 4, 2)
    bias = np.random.default_rng(2).standard_normal((4, 1, 7)).astype(np.float32)
    got = jax.jit(functools.partial(longhand.everything, bias=bias, causal=False))(*arrays)
    longhand.compare(got, longhand.reference(*arrays, bias=bias, causal=False), FLOAT32)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_stays_near_the_reference(impl, longhand):
    queries, keys, heads, kv_heads, options, runs = CASES["all_options"]
    arrays = longhand.inputs(3, 2, queries, keys, heads, kv_heads)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays[:3])
    compute = functools.partial(longhand.everything, impl=impl, block_sizes=BLOCKS, **options)
    got = jax.jit(compute)(q, k, v, *arrays[3:], **longhand.as_arrays(runs[0]))
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    want = longhand.reference(
        *(np.asarray(x, np.float32) for x in (q, k, v)), *arrays[3:], **options, **runs[0]
    )
    longhand.compare(got, want, BFLOAT16)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_do_not_overflow(impl, longhand):
    arrays = longhand.inputs(4, 1, 7, 7, 2, 2)
    q, k, v = arrays[:3]
    got = jax.jit(functools.partial(longhand.everything, impl=impl, block_sizes=BLOCKS, scale=1e4))(
        *arrays
    )
    assert all(np.isfinite(x).all() for x in got)
    best = np.where(np.tri(7, dtype=bool), q[0, :, 0] @ k[0, :, 0].T, -np.inf).argmax(-1)
    np.testing.assert_allclose(got[0][0, :, 0], v[0, best, 0], atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_lengths_beyond_the_keys_show_all_keys(impl, longhand):
    # Blocks of 3 pad ten keys to twelve: the padding must stay invisible for all lengths.
    q, k, v, _, _ = longhand.inputs(5, 2, 4, 10, 2, 2)
    run = jax.jit(functools.partial(attention, causal=False, impl=impl, block_sizes=BLOCKS))
    beyond, all_keys = (
        run(q, k, v, kv_lengths=jnp.int32(lengths)) for lengths in ([99, 11], [10, 10])
    )
    np.testing.assert_allclose(beyond, all_keys, atol=FLOAT32)


# --- invariants


@pytest.mark.parametrize("impl", IMPLS)
def test_permuted_heads_give_permuted_outputs(impl, longhand):
    q, k, v, _, _ = longhand.inputs(6, 2, 7, 7, 4, 4)
    run = jax.jit(functools.partial(attention, impl=impl, block_sizes=BLOCKS))
    order = np.array([2, 0, 3, 1])
    assert np.array_equal(
        run(q[:, :, order], k[:, :, order], v[:, :, order]), run(q, k, v)[:, :, order]
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_of_the_keys_merge_by_their_log_sum_exp(impl, longhand):
    # Ring attention and split-K decoding depend on this.
    q, k, v, _, _ = longhand.inputs(7, 2, 7, 12, 4, 2)
    run = functools.partial(attention, causal=False, return_lse=True, impl=impl, block_sizes=BLOCKS)
    halves = slice(0, 5), slice(5, 12)
    run_parts = jax.jit(
        lambda q, k, v: [run(q, k[:, part], v[:, part]) for part in (*halves, slice(None))]
    )
    *parts, (whole, whole_lse) = run_parts(q, k, v)
    outs, lses = zip(*parts, strict=True)
    merged_lse = np.logaddexp(*lses)
    shares = [np.exp(lse - merged_lse).transpose(0, 2, 1)[..., None] for lse in lses]
    np.testing.assert_allclose(merged_lse, whole_lse, atol=FLOAT32)
    np.testing.assert_allclose(
        sum(s * o for s, o in zip(shares, outs, strict=True)), whole, atol=FLOAT32
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_documents_equal_separate_ones(impl, longhand):
    q, k, v, _, _ = longhand.inputs(8, 1, 12, 12, 4, 2)
    ids = jnp.int32([[3] * 5 + [1] * 7])
    run = functools.partial(attention, impl=impl, block_sizes=BLOCKS)
    packed, first, second = jax.jit(
        lambda *qkv: [
            run(*qkv, segment_ids=ids),
            run(*(x[:, :5] for x in qkv)),
            run(*(x[:, 5:] for x in qkv)),
        ]
    )(q, k, v)
    np.testing.assert_allclose(packed, np.concatenate([first, second], 1), atol=FLOAT32)


def test_one_query_against_a_cache_equals_attention(longhand):
    q, k, v, _, _ = longhand.inputs(9, 3, 1, 9, 4, 2)
    lengths = jnp.int32([9, 4, 0])  # the last row has an empty cache
    options = {"softcap": 2.0, "scale": 0.7}
    got = jax.jit(functools.partial(decode_attention, **options))(
        q[:, 0], k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), lengths
    )
    want = jax.jit(functools.partial(attention, causal=False, **options))(
        q, k, v, kv_lengths=lengths
    )[:, 0]
    np.testing.assert_allclose(got, want, atol=FLOAT32)
    assert np.array_equal(got[2], np.zeros_like(got[2])) and np.abs(got[:2]).min() > 0


def test_dropout_keeps_the_mean_and_follows_its_key(longhand):
    q, k, v, _, _ = longhand.inputs(10, 1, 4, 6, 2, 2)
    keys = jax.random.split(jax.random.key(0), 2000)
    dropped = jax.jit(
        jax.vmap(lambda key: attention(q, k, v, causal=False, dropout_rate=0.25, dropout_key=key))
    )(keys.at[1].set(keys[0]))
    want = longhand.reference(*longhand.inputs(10, 1, 4, 6, 2, 2), causal=False)[0]
    np.testing.assert_allclose(dropped.mean(0), want, atol=0.07)  # five standard errors
    assert np.array_equal(dropped[0], dropped[1]) and not np.array_equal(dropped[0], dropped[2])


# --- under a mesh


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_and_heads_are_split_in_the_manual_region(impl, longhand):
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    arrays = longhand.inputs(11, 4, 7, 7, 8, 4)
    ids = np.array([[1] * 3 + [2] * 4, [1] * 7, [5] * 6 + [0], [2] * 7], np.int32)
    heads = P("data", None, "tensor")
    lse_spec = P("data", "tensor")

    def compute(q, k, v, d_out, d_lse, ids):
        return longhand.everything(
            q, k, v, d_out, d_lse, segment_ids=ids, impl=impl, block_sizes=BLOCKS
        )

    over_mesh = jax.shard_map(
        compute,
        mesh=mesh,
        in_specs=(*[heads] * 4, lse_spec, P("data")),
        out_specs=(heads, lse_spec, *[heads] * 3),
    )
    got = jax.jit(over_mesh)(*arrays, ids)
    assert got[0].sharding.shard_shape(got[0].shape) == (2, 7, 2, 4)
    longhand.compare(got, longhand.reference(*arrays, segment_ids=ids), FLOAT32)


# --- choice of implementation, errors, memory


def _shapes(queries, keys, heads=2, kv_heads=2, width=4, rows=1, dtype="float32"):
    return (
        jax.ShapeDtypeStruct((rows, queries, heads, width), dtype),
        *[jax.ShapeDtypeStruct((rows, keys, kv_heads, width), dtype)] * 2,
    )


def _chosen(verdicts):
    return [name for name, verdict in verdicts if verdict.startswith("chosen: ")]


IDS = jax.ShapeDtypeStruct((1, 4096), "int32")
LENGTHS = jax.ShapeDtypeStruct((1,), "int32")


@pytest.mark.parametrize(
    ("device", "shapes", "options", "chosen"),
    [
        ("cpu", _shapes(64, 64), {}, "xla"),
        ("cpu", _shapes(4096, 4096), {}, "xla_blockwise"),
        ("cpu", _shapes(4096, 4096), {"bias": 0.0}, "xla"),
        ("cpu", _shapes(4096, 4096), {"dropout_rate": 0.1, "dropout_key": 0}, "xla"),
        ("cpu", _shapes(64, 64), {"impl": "xla_blockwise"}, "xla_blockwise"),
        ("cpu", _shapes(4096, 4096), {"impl": "xla"}, "xla"),
        (
            "TPU v5p",
            _shapes(4096, 4096, width=160, dtype="bfloat16"),
            {"segment_ids": IDS},
            "pallas_tpu",
        ),
        ("TPU v5 lite", _shapes(2048, 2048, width=128), {}, "pallas_tpu"),
        ("TPU v6 lite", _shapes(32, 32, width=128), {}, "xla"),
        ("TPU v5p", _shapes(4096, 4096, width=288, dtype="bfloat16"), {}, "xla_blockwise"),
        ("TPU v5p", _shapes(4096, 4096, width=128), {"bias": 0.0}, "xla"),
        # GPUs that are only described: cuDNN cannot be compiled without one.
        (
            "NVIDIA H100 80GB HBM3",
            _shapes(4096, 4096, width=160, dtype="bfloat16"),
            {"segment_ids": IDS},
            "pallas_gpu",
        ),
        (
            "NVIDIA H100 80GB HBM3",
            _shapes(4096, 4096, width=128, dtype="bfloat16"),
            {"return_lse": True},
            "pallas_gpu",
        ),
        ("NVIDIA H100 80GB HBM3", _shapes(4096, 4096, width=128), {}, "xla_blockwise"),
        (
            "NVIDIA A100-SXM4-80GB",
            _shapes(4096, 4096, width=128, dtype="bfloat16"),
            {},
            "xla_blockwise",
        ),
    ],
)
def test_explain_names_one_choice_and_a_reason_for_every_other(
    monkeypatch, device, shapes, options, chosen
):
    if device != "cpu":
        monkeypatch.setattr(compat, "_DESCRIBED", ["tpu" if "TPU" in device else "cuda", device])
    verdicts = explain_attention(*shapes, **options)
    assert _chosen(verdicts) == [chosen] and [name for name, _ in verdicts] == list(SUPPORT)
    assert all(len(verdict) > 10 for _, verdict in verdicts)


def _on_a_card(monkeypatch, capability="9.0", kind="NVIDIA H100 80GB HBM3"):
    """Pretend that this process has a GPU with cuDNN."""
    card = SimpleNamespace(device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [card])
    monkeypatch.setattr(cudnn, "_installed", lambda: True)


@pytest.mark.parametrize(
    ("capability", "options", "width", "chosen"),
    [
        ("9.0", {}, 160, "cudnn"),  # until the table has other timings
        ("9.0", {"segment_ids": IDS}, 160, "pallas_gpu"),  # where cuDNN would need a mask of S x T
        ("9.0", {"kv_lengths": LENGTHS}, 128, "pallas_gpu"),
        ("9.0", {"window": 512}, 128, "cudnn"),
        ("9.0", {"window": 512, "causal": False}, 128, "pallas_gpu"),
        ("9.0", {"softcap": 20.0}, 128, "pallas_gpu"),
        ("9.0", {}, 40, "cudnn"),
        ("8.0", {}, 128, "cudnn"),
        ("8.0", {}, 160, "xla_blockwise"),
        ("8.0", {"segment_ids": IDS}, 128, "xla_blockwise"),
    ],
)
def test_the_choice_on_a_gpu(monkeypatch, capability, options, width, chosen):
    _on_a_card(
        monkeypatch,
        capability,
        "NVIDIA H100 80GB HBM3" if capability == "9.0" else "NVIDIA A100-SXM4-80GB",
    )
    assert _chosen(
        explain_attention(*_shapes(4096, 4096, width=width, dtype="bfloat16"), **options)
    ) == [chosen]


def test_an_assembler_that_miscompiles_excludes_the_kernels(monkeypatch):
    _on_a_card(monkeypatch)
    shapes = _shapes(4096, 4096, width=128, dtype="bfloat16")
    for version, causal, chosen in (
        (12080, True, "xla_blockwise"),
        (12080, False, "pallas_gpu"),
        (12091, True, "pallas_gpu"),
    ):
        monkeypatch.setattr(compat, "cuda_version", lambda version=version: version)
        verdicts = explain_attention(*shapes, causal=causal, segment_ids=IDS)
        assert _chosen(verdicts) == [chosen]
        assert ("12.9.1 or newer" in dict(verdicts)["pallas_gpu"]) == (chosen == "xla_blockwise")


def test_a_measurement_changes_the_choice(monkeypatch):
    _on_a_card(monkeypatch)
    shapes = _shapes(4096, 4096, width=128, dtype="bfloat16")
    row = {
        "device": "H100",
        "dtype": "bfloat16",
        "head_width": 128,
        "length": 4096,
        "causal": True,
        "pass": "both",
        "source": "a test",
    }
    for ours, theirs, chosen in (
        (2.0, 3.0, "pallas_gpu"),
        (3.0, 2.0, "cudnn"),
        (2.0, None, "cudnn"),
    ):
        rows = [row | {"impl": "pallas_gpu", "ms": ours}, row | {"impl": "cudnn", "ms": theirs}]
        monkeypatch.setattr(
            blocks, "table", lambda rows=rows: blocks.read(json.dumps({"rows": rows}))
        )
        verdicts = explain_attention(*shapes)
        assert _chosen(verdicts) == [chosen]
        assert ("pallas_gpu 2 ms, cudnn 3 ms" in dict(verdicts)["pallas_gpu"]) == (theirs == 3.0)


def test_falling_back_on_an_accelerator_is_logged_once_with_reasons(monkeypatch, caplog):
    monkeypatch.setattr(compat, "_DESCRIBED", ["tpu", "TPU v5p"])
    for _ in range(2):
        jax.eval_shape(
            functools.partial(attention, impl="auto"),
            *_shapes(2048, 2048, width=264, dtype="bfloat16"),
        )
    said = [record.message for record in caplog.records if "falls back" in record.message]
    assert len(said) == 1 and "pallas_tpu takes head widths" in said[0] and "264" in said[0]


Q, K, V = (np.zeros((1, 8, 2, 4), np.float32) for _ in range(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"impl": "flash9"}, "unknown attention impl='flash9'; choose auto, pallas_tpu"),
        (
            {"impl": "xla_blockwise", "bias": np.zeros(1)},
            "'xla_blockwise' cannot serve.*bias.*impl='auto', or xla",
        ),
        (
            {"impl": "xla_blockwise", "dropout_rate": 0.5, "dropout_key": 0},
            "'xla_blockwise' cannot serve.*dropout",
        ),
        (
            {"impl": "pallas_tpu"},
            "'pallas_tpu' cannot serve.*runs on TPU, and this is cpu.*xla_blockwise or xla",
        ),
        ({"impl": "pallas_gpu"}, "runs on Hopper, and this is cpu"),
        ({"impl": "cudnn"}, "runs on NVIDIA GPU, and this is cpu"),
        (
            {"segment_ids": np.zeros((1, 7), int)},
            r"segment_ids of the queries have shape \(1, 7\); .* \(1, 8\)",
        ),
        ({"segment_ids": (np.zeros((1, 8), int),) * 3}, "segment_ids has 3 parts; give"),
        ({"segment_ids": np.zeros((1, 8))}, "segment_ids are float"),
        ({"kv_lengths": np.array([9])}, "kv_lengths=9 is above 8, the number of keys"),
        ({"kv_lengths": np.array([-1])}, "kv_lengths=-1 is below 0"),
        ({"kv_lengths": 8}, r"kv_lengths has shape \(\); it must be \(1,\)"),
        ({"kv_lengths": np.array([1.5])}, "kv_lengths is float.*int32"),
        ({"q_offset": -1}, "q_offset=-1 is below 0"),
        ({"q_offset": np.array([-3])}, "q_offset=-3 is below 0"),
        ({"q_offset": np.array([1, 2])}, r"q_offset has shape \(2,\); it must be \(1,\) or an int"),
        ({"window": 0}, "window=0 must be an int of at least 1"),
        ({"softcap": 0.0}, "softcap=0.0 must be a number above 0"),
        ({"scale": float("nan")}, "scale=nan must be a finite number"),
        ({"dropout_rate": 1.0}, r"dropout_rate=1.0 is outside \[0, 1\)"),
        ({"dropout_rate": 0.5}, "dropout_rate=0.5 needs a dropout_key"),
        ({"block_sizes": (0, 8)}, r"block_sizes=\(0, 8\) must be two sizes"),
    ],
)
def test_invalid_options_raise_an_error(options, words):
    for call in (attention, explain_attention):
        if "cannot serve" not in words and not words.startswith("runs on"):
            with pytest.raises(ValueError, match=words):
                call(Q, K, V, **options)
    with pytest.raises(ValueError, match=words):
        attention(Q, K, V, **options)


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        (_shapes(8, 8, heads=3, kv_heads=2), {}, "3 query heads .* 2 key/value heads"),
        (
            _shapes(8, 8)[:2] + _shapes(8, 9)[2:],
            {},
            r"attention takes q .*\(1, 8, 2, 4\).*\(1, 9, 2, 4\)",
        ),
        (_shapes(8, 8, rows=2)[:1] + _shapes(8, 8)[1:], {}, "attention takes q"),
        (_shapes(8, 0), {}, "none of them empty"),
        (_shapes(8, 8, width=6)[:1] + _shapes(8, 8)[1:], {}, "attention takes q"),
        (
            _shapes(3, 8),
            {"segment_ids": np.zeros((1, 3), int)},
            "S=3 queries and T=8 keys differ: give segment_ids as",
        ),
        (
            _shapes(8, 8, dtype="float64"),
            {},
            "q is float64; attention takes float32, bfloat16, float16: cast it",
        ),
        (_shapes(8, 8, dtype="int32"), {}, "q is int32"),
        (
            _shapes(8, 8)[:1] + _shapes(8, 8, dtype="bfloat16")[1:],
            {},
            "float32, bfloat16 and bfloat16; cast them",
        ),
    ],
)
def test_invalid_shapes_and_types_raise_an_error(shapes, options, words):
    with pytest.raises(ValueError, match=words):
        explain_attention(*shapes, **options)


CACHE = {
    "q": ((1, 4, 64), "float32"),
    "k_cache": ((1, 2, 16, 64), "float32"),
    "v_cache": ((1, 2, 16, 64), "float32"),
    "lengths": ((1,), "int32"),
}
SCALES = np.zeros((1, 2, 16), np.float32)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"q": ((1, 3, 64), "float32")}, {}, "3 query heads"),
        ({"q": ((1, 4, 32), "float32")}, {}, "decode_attention takes q"),
        ({"v_cache": ((1, 2, 17, 64), "float32")}, {}, "decode_attention takes q"),
        ({"lengths": ((2,), "int32")}, {}, r"lengths has shape \(2,\)"),
        ({"k_cache": ((1, 2, 16, 64), "int8")}, {}, "k and v are .* cast"),
        (
            {"k_cache": ((1, 2, 16, 64), "int8"), "v_cache": ((1, 2, 16, 64), "int8")},
            {},
            "k_scale is missing",
        ),
        ({}, {"k_scale": SCALES}, "k_scale is given with a cache of float32"),
        ({}, {"impl": "pallas_tpu"}, "runs on TPU"),
        ({}, {"impl": "cudnn"}, "does not support single-token decoding"),
        ({}, {"num_splits": 0}, "num_splits=0"),
        ({}, {"scale": float("inf")}, "scale=inf"),
    ],
)
def test_invalid_calls_of_decode_attention_raise_an_error(changes, options, words):
    given = {name: np.zeros(*what) for name, what in (CACHE | changes).items()}
    with pytest.raises(ValueError, match=words):
        decode_attention(**given, **options)


def test_lengths_beyond_the_cache_raise_an_error():
    given = {name: np.zeros(*what) for name, what in CACHE.items()} | {"lengths": np.array([17])}
    with pytest.raises(
        ValueError, match="lengths=17 is above 16, the number of positions of the cache"
    ):
        decode_attention(**given)


def _temporary_bytes(impl, length):
    def loss(q, k, v):
        return attention(q, k, v, impl=impl, block_sizes=(64, 64)).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*_shapes(length, length)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_blockwise_memory_grows_linearly_and_exact_memory_does_not():
    short, long = (_temporary_bytes("xla_blockwise", length) for length in (512, 2048))
    scores = 2 * 4 * 2048 * 2048  # two heads, float32
    assert long < 5 * short and long < scores / 4
    assert _temporary_bytes("xla", 2048) > scores  # so the measure includes the scores


def test_the_config_lists_every_implementation():
    for name in IMPLS_OF_CONFIG:
        validate_model(ModelConfig(attention_impl=name))
    with pytest.raises(ValueError, match="attention_impl"):
        validate_model(ModelConfig(attention_impl="flash"))


def test_the_attention_page_shows_the_table_of_implementations():
    page = (Path(__file__).resolve().parents[2] / "docs/attention.md").read_text(encoding="utf-8")
    lines = [
        "| `impl` | runs on | types | head widths | takes | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, support in SUPPORT.items():
        widths = "all"
        if support.head_widths is not None:
            widths = "multiples of {} to {}".format(*support.head_widths)
        takes = ", ".join(f"`{option}`" for option in sorted(support.options))
        dtypes = ", ".join(support.dtypes)
        lines.append(
            f"| `{name}` | {support.runs_on} | {dtypes} | {widths} | {takes} | {support.note} |"
        )
    assert "\n".join(lines) in page
