"""attention() against a float64 longhand reference, its laws, its errors, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.model.attention import SUPPORT, attention, decode_attention, explain_attention
from mtnlg_jax.parallel.mesh import make_mesh

IMPLS = ("xla", "xla_blockwise")
FLOAT32 = 2e-5  # float32 sums of at most some dozens of numbers of size one
BFLOAT16 = 4e-2  # eight bits of mantissa: 1/256 a rounding, several roundings, values up to about 3
BLOCKS = (4, 3)  # small, unequal, and dividing none of the lengths below but where said


# --- the reference: loops over rows, heads, queries and keys ------------------------------------------------


def _visible(rows, queries, keys, *, causal=True, segment_ids=None, kv_lengths=None, q_offset=0, window=None):
    """(rows, queries, keys) booleans: the sentences of attention()'s docstring, one pair at a time."""
    seen = np.zeros((rows, queries, keys), bool)
    for b, i, j in np.ndindex(seen.shape):
        position = (q_offset if np.ndim(q_offset) == 0 else q_offset[b]) + i
        see = not (causal and j > position)
        if segment_ids is not None:
            q_ids, kv_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
            see = see and q_ids[b][i] == kv_ids[b][j]
        if kv_lengths is not None:
            see = see and j < kv_lengths[b]
        if window is not None:
            see = see and j > position - window and (causal or j < position + window)
        seen[b, i, j] = see
    return seen


def _reference(q, k, v, d_out, d_lse, *, softcap=None, scale=None, bias=None, **mask):
    """out, lse, dq, dk, dv in float64, for the loss sum(out * d_out) + sum(finite lse * d_lse)."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    rows, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    seen = _visible(rows, queries, keys, **mask)
    out, lse = np.zeros_like(q), np.full((rows, heads, queries), -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, n, i in np.ndindex(rows, heads, queries):
        g = n * kv_heads // heads  # the key/value head of query head n
        at = np.flatnonzero(seen[b, i])
        if not len(at):
            continue
        scores, slope = k[b, at, g] @ q[b, i, n] * scale, 1.0
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
            slope = 1 - (scores / softcap) ** 2
        if bias is not None:
            scores = scores + np.broadcast_to(bias, (rows, heads, queries, keys))[b, n, i, at]
        total = np.exp(scores).sum()
        weights = np.exp(scores) / total
        out[b, i, n], lse[b, n, i] = weights @ v[b, at, g], np.log(total)
        d_weights = v[b, at, g] @ d_out[b, i, n]
        d_scores = (weights * (d_weights - weights @ d_weights) + weights * d_lse[b, n, i]) * slope * scale
        dq[b, i, n] = d_scores @ k[b, at, g]
        dk[b, at, g] += np.outer(d_scores, q[b, i, n])
        dv[b, at, g] += np.outer(weights, d_out[b, i, n])
    return out, lse, dq, dk, dv


def _inputs(seed, rows, queries, keys, heads, kv_heads, width=4):
    """q, k, v and the cotangents of the output and of the log-sum-exp."""
    random = np.random.default_rng(seed)
    shapes = [(rows, queries, heads, width), *[(rows, keys, kv_heads, width)] * 2,
              (rows, queries, heads, width), (rows, heads, queries)]
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def _everything(q, k, v, d_out, d_lse, **options):
    """out, lse, dq, dk, dv of attention(), in one compilation."""

    def loss(q, k, v):
        out, lse = attention(q, k, v, return_lse=True, **options)
        finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(finite * d_lse), (out, lse)

    grads, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, lse, *grads


def _compare(got, want, tolerance):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        a = np.asarray(a, np.float64)
        assert a.shape == b.shape, name
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


# What is compiled: (queries, keys, heads, key/value heads, static options, the arrays of each run). Every
# argument at least once, several together, lengths that divide no block. Runs of a case share a compilation.
SEGMENTS = ([[1] * 4 + [2] * 3, [9] * 7], [[1] * 8 + [2] * 4 + [0] * 2, [9] * 14])
CASES = {
    "causal": (10, 10, 4, 2, {}, [{}]),
    "both_ways": (5, 11, 4, 1, {"causal": False}, [{}]),
    "one_query": (1, 9, 2, 2, {"q_offset": 6}, [{}]),
    "before_the_keys": (11, 4, 2, 1, {"q_offset": -2}, [{}]),  # the first two queries see nothing
    "window_both_ways": (12, 12, 2, 2, {"window": 3, "causal": False}, [{}]),
    "all_arrays": (7, 14, 4, 2, {}, [
        {"segment_ids": SEGMENTS, "kv_lengths": [14, 14], "q_offset": [7, 7]},
        {"segment_ids": SEGMENTS, "kv_lengths": [11, 5], "q_offset": [2, 9]},
        {"segment_ids": SEGMENTS, "kv_lengths": [0, 1], "q_offset": [20, -5]},
    ]),
    "all_options": (7, 14, 4, 4, {"window": 6, "softcap": 1.5, "scale": 0.9}, [
        {"segment_ids": SEGMENTS, "kv_lengths": [13, 9], "q_offset": [5, 3]},
        {"segment_ids": SEGMENTS, "kv_lengths": [14, 8], "q_offset": [-3, 7]},
    ]),
}


def _as_arrays(run):
    return {key: tuple(map(jnp.int32, value)) if isinstance(value, tuple) else jnp.int32(value)
            for key, value in run.items()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_output_lse_and_gradients_equal_the_longhand(case, impl):
    queries, keys, heads, kv_heads, options, runs = CASES[case]
    arrays = _inputs(0, 2, queries, keys, heads, kv_heads)
    compute = jax.jit(functools.partial(_everything, impl=impl, block_sizes=BLOCKS, **options))
    for run in runs:
        got = compute(*arrays, **_as_arrays(run))
        want = _reference(*arrays, **options, **run)
        _compare(got, want, FLOAT32)
        assert np.array_equal(np.isneginf(got[1]), np.isneginf(want[1]))


def test_cases_hold_queries_that_see_nothing():
    blind = {}
    for name, (queries, keys, _, _, options, runs) in CASES.items():
        mask = {key: value for key, value in options.items() if key in ("causal", "window", "q_offset")}
        blind[name] = [int((~_visible(2, queries, keys, **mask, **run)).all(-1).sum()) for run in runs]
    assert blind["before_the_keys"] == [4] and min(blind["all_arrays"][2], blind["all_options"][1]) > 0


def test_bias_equals_the_longhand():
    arrays = _inputs(1, 2, 5, 7, 4, 2)
    bias = np.random.default_rng(2).standard_normal((4, 1, 7)).astype(np.float32)
    got = jax.jit(functools.partial(_everything, bias=bias, causal=False))(*arrays)
    _compare(got, _reference(*arrays, bias=bias, causal=False), FLOAT32)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_stays_near_the_longhand(impl):
    queries, keys, heads, kv_heads, options, runs = CASES["all_options"]
    arrays = _inputs(3, 2, queries, keys, heads, kv_heads)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays[:3])
    compute = functools.partial(_everything, impl=impl, block_sizes=BLOCKS, **options)
    got = jax.jit(compute)(q, k, v, *arrays[3:], **_as_arrays(runs[0]))
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    want = _reference(*(np.asarray(x, np.float32) for x in (q, k, v)), *arrays[3:], **options, **runs[0])
    _compare(got, want, BFLOAT16)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_neither_overflow_nor_lose_the_winner(impl):
    arrays = _inputs(4, 1, 7, 7, 2, 2)
    q, k, v = arrays[:3]
    got = jax.jit(functools.partial(_everything, impl=impl, block_sizes=BLOCKS, scale=1e4))(*arrays)
    assert all(np.isfinite(x).all() for x in got)
    best = np.where(np.tri(7, dtype=bool), q[0, :, 0] @ k[0, :, 0].T, -np.inf).argmax(-1)
    np.testing.assert_allclose(got[0][0, :, 0], v[0, best, 0], atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_lengths_beyond_the_keys_show_all_keys_and_no_more(impl):
    # Blocks of 3 pad ten keys to twelve: the padding must stay invisible whatever the lengths say.
    q, k, v, _, _ = _inputs(5, 2, 4, 10, 2, 2)
    run = jax.jit(functools.partial(attention, causal=False, impl=impl, block_sizes=BLOCKS))
    beyond, all_keys = (run(q, k, v, kv_lengths=jnp.int32(lengths)) for lengths in ([99, 11], [10, 10]))
    np.testing.assert_allclose(beyond, all_keys, atol=FLOAT32)


# --- laws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_permuted_heads_give_permuted_outputs(impl):
    q, k, v, _, _ = _inputs(6, 2, 7, 7, 4, 4)
    run = jax.jit(functools.partial(attention, impl=impl, block_sizes=BLOCKS))
    order = np.array([2, 0, 3, 1])
    assert np.array_equal(run(q[:, :, order], k[:, :, order], v[:, :, order]), run(q, k, v)[:, :, order])


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_of_the_keys_merge_by_their_log_sum_exp(impl):
    # What ring attention and split-K decoding rest on.
    q, k, v, _, _ = _inputs(7, 2, 7, 12, 4, 2)
    run = functools.partial(attention, causal=False, return_lse=True, impl=impl, block_sizes=BLOCKS)
    halves = slice(0, 5), slice(5, 12)
    run_parts = jax.jit(lambda q, k, v: [run(q, k[:, part], v[:, part]) for part in (*halves, slice(None))])
    *parts, (whole, whole_lse) = run_parts(q, k, v)
    outs, lses = zip(*parts, strict=True)
    merged_lse = np.logaddexp(*lses)
    shares = [np.exp(lse - merged_lse).transpose(0, 2, 1)[..., None] for lse in lses]
    np.testing.assert_allclose(merged_lse, whole_lse, atol=FLOAT32)
    np.testing.assert_allclose(sum(s * o for s, o in zip(shares, outs, strict=True)), whole, atol=FLOAT32)


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_documents_equal_separate_ones(impl):
    q, k, v, _, _ = _inputs(8, 1, 12, 12, 4, 2)
    ids = jnp.int32([[3] * 5 + [1] * 7])
    run = functools.partial(attention, impl=impl, block_sizes=BLOCKS)
    packed, first, second = jax.jit(lambda *qkv: [run(*qkv, segment_ids=ids), run(*(x[:, :5] for x in qkv)),
                                                  run(*(x[:, 5:] for x in qkv))])(q, k, v)
    np.testing.assert_allclose(packed, np.concatenate([first, second], 1), atol=FLOAT32)


def test_one_query_against_a_cache_equals_attention():
    q, k, v, _, _ = _inputs(9, 3, 1, 9, 4, 2)
    lengths = jnp.int32([9, 4, 0])  # the last row has an empty cache
    options = {"softcap": 2.0, "scale": 0.7}
    got = jax.jit(functools.partial(decode_attention, **options))(
        q[:, 0], k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), lengths)
    want = jax.jit(functools.partial(attention, causal=False, **options))(q, k, v, kv_lengths=lengths)[:, 0]
    np.testing.assert_allclose(got, want, atol=FLOAT32)
    assert np.array_equal(got[2], np.zeros_like(got[2])) and np.abs(got[:2]).min() > 0


def test_dropout_keeps_the_mean_and_follows_its_key():
    q, k, v, _, _ = _inputs(10, 1, 4, 6, 2, 2)
    keys = jax.random.split(jax.random.key(0), 2000)
    dropped = jax.jit(jax.vmap(lambda key: attention(
        q, k, v, causal=False, dropout_rate=0.25, dropout_key=key)))(keys.at[1].set(keys[0]))
    want = _reference(*_inputs(10, 1, 4, 6, 2, 2), causal=False)[0]
    np.testing.assert_allclose(dropped.mean(0), want, atol=0.07)  # five standard errors
    assert np.array_equal(dropped[0], dropped[1]) and not np.array_equal(dropped[0], dropped[2])


# --- under a mesh -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_inside_the_manual_region_rows_and_heads_split(impl):
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    arrays = _inputs(11, 4, 7, 7, 8, 4)
    ids = np.array([[1] * 3 + [2] * 4, [1] * 7, [5] * 6 + [0], [2] * 7], np.int32)
    heads, lse_spec = P("data", None, "tensor"), P("data", "tensor")

    def compute(q, k, v, d_out, d_lse, ids):
        return _everything(q, k, v, d_out, d_lse, segment_ids=ids, impl=impl, block_sizes=BLOCKS)

    over_mesh = jax.shard_map(compute, mesh=mesh, in_specs=(*[heads] * 4, lse_spec, P("data")),
                              out_specs=(heads, lse_spec, *[heads] * 3))
    got = jax.jit(over_mesh)(*arrays, ids)
    assert got[0].sharding.shard_shape(got[0].shape) == (2, 7, 2, 4)
    _compare(got, _reference(*arrays, segment_ids=ids), FLOAT32)


# --- the choice, the errors, the memory ---------------------------------------------------------------------


def _shapes(queries, keys, heads=2, kv_heads=2, width=4, rows=1):
    return (jax.ShapeDtypeStruct((rows, queries, heads, width), jnp.float32),
            *[jax.ShapeDtypeStruct((rows, keys, kv_heads, width), jnp.float32)] * 2)


@pytest.mark.parametrize(
    ("lengths", "options", "chosen"),
    [
        ((64, 64), {}, "xla"),
        ((4096, 4096), {}, "xla_blockwise"),
        ((4096, 4096), {"bias": 0.0}, "xla"),
        ((4096, 4096), {"dropout_rate": 0.1}, "xla"),
        ((64, 64), {"impl": "xla_blockwise"}, "xla_blockwise"),
        ((4096, 4096), {"impl": "xla"}, "xla"),
    ],
)
def test_explain_names_one_choice_and_a_reason_for_every_other(lengths, options, chosen):
    verdicts = dict(explain_attention(*_shapes(*lengths), **options))
    assert [name for name, verdict in verdicts.items() if verdict == "chosen"] == [chosen]
    assert all(len(verdict) > 10 for name, verdict in verdicts.items() if name != chosen)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"impl": "flash9"}, "'flash9' is not known; choose auto, xla"),
        ({"impl": "xla_blockwise", "bias": np.zeros(1)}, "'xla_blockwise' cannot serve.*bias.*auto"),
        ({"impl": "xla_blockwise", "dropout_rate": 0.5}, "'xla_blockwise' cannot serve.*auto"),
    ],
)
def test_an_implementation_that_cannot_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(functools.partial(attention, **options), *_shapes(8, 8))


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        (_shapes(8, 8, heads=3, kv_heads=2), {}, "3 query heads .* 2 key/value heads"),
        (_shapes(8, 8)[:2] + _shapes(8, 9)[2:], {}, r"attention wants q .*\(1, 8, 2, 4\).*\(1, 9, 2, 4\)"),
        (_shapes(8, 8, rows=2)[:1] + _shapes(8, 8)[1:], {}, "attention wants q"),
        (_shapes(3, 8), {"segment_ids": np.zeros((1, 3))}, "T=3 and S=8 differ: give segment_ids as"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, options, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(functools.partial(attention, **options), *shapes)


def _temporary_bytes(impl, length):
    def loss(q, k, v):
        return attention(q, k, v, impl=impl, block_sizes=(64, 64)).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*_shapes(length, length)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_blockwise_memory_grows_linearly_and_exact_memory_does_not():
    short, long = (_temporary_bytes("xla_blockwise", length) for length in (512, 2048))
    scores = 2 * 4 * 2048 * 2048  # two heads, float32
    assert long < 5 * short and long < scores / 4
    assert _temporary_bytes("xla", 2048) > scores  # so the measure does see the scores

def test_the_config_knows_every_implementation():
    from mtnlg_jax.config import ModelConfig, validate_model

    for name in ("auto", *SUPPORT):
        validate_model(ModelConfig(attention_impl=name))
    with pytest.raises(ValueError, match="attention_impl"):
        validate_model(ModelConfig(attention_impl="flash"))


def test_the_choice_of_platform_changes_the_path_not_the_numbers(monkeypatch):
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 300, 2, 8)) for i in range(3))
    outputs, chosen = [], []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        chosen.append(dict(explain_attention(q, k, v))["xla_blockwise"] == "chosen")
        outputs.append(attention(q, k, v))
    assert chosen == [True, False]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=2e-6)
