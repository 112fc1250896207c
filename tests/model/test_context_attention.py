"""Compare attention over a sequence split across devices with attention over the whole."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.model.attention import attention
from mtnlg_jax.model.context_attention import context_attention
from mtnlg_jax.parallel.collectives import vary, zigzag
from mtnlg_jax.parallel.mesh import make_mesh

FLOAT32 = 2e-6
HEADS = 8
WIDTH = 4
PLACES = P(None, "context")


def arrays(length, kv_heads=HEADS, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, length, heads, WIDTH) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    ids = np.sort(rng.integers(0, 5, (2, length)), 1).astype(np.int32)
    return *(rng.standard_normal(shape).astype(np.float32) for shape in shapes), ids


def value_and_gradients(attend, q, k, v, d_out, ids=None):
    out, back = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
    return out, *back(d_out)


def over_context(parts, mode, causal, q, k, v, d_out, ids, **options):
    mesh = make_mesh(MeshConfig(data=1, context=parts), jax.devices()[:parts])
    order = zigzag(q.shape[1], parts)

    def local(*args):
        def attend(q, k, v, ids):
            return context_attention(q, k, v, causal=causal, segment_ids=ids, mode=mode, **options)

        return value_and_gradients(attend, *vary(args))

    args = [x[:, order] for x in (q, k, v, d_out, ids) if x is not None]
    everywhere = P(("pipe", "data", "expert", "tensor"), "context")
    run = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(PLACES,) * len(args), out_specs=(everywhere,) * 4)
    )
    return [np.asarray(x)[:, np.argsort(order)] for x in run(*args)]


# Slow: the other combinations of the two, and other numbers of parts and of key/value heads.
@pytest.mark.parametrize(
    ("causal", "segments"),
    [
        pytest.param(True, True, id="causal-documents"),
        pytest.param(False, False, id="both-ways-whole"),
        pytest.param(True, False, id="causal-whole", marks=pytest.mark.slow),
        pytest.param(False, True, id="both-ways-documents", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("mode", "parts", "kv_heads"),
    [
        ("ulysses", 2, 2),
        ("gather", 8, 2),
        ("ring", 4, 2),
        ("auto", 4, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("ulysses", 2, 8),
                ("ulysses", 8, 8),
                ("gather", 2, 8),
                ("ring", 2, 8),
                ("ring", 8, 1),
            )
        ),
    ],
)
def test_every_mode_equals_attention_over_the_whole(mode, parts, kv_heads, causal, segments):
    *tensors, ids = arrays(32, kv_heads)
    ids = ids if segments else None
    wanted = value_and_gradients(functools.partial(_alone, causal), *tensors, ids)
    for got, want in zip(over_context(parts, mode, causal, *tensors, ids), wanted, strict=True):
        assert np.abs(got - want).max() <= FLOAT32 * max(1, np.abs(want).max())


def _alone(causal, q, k, v, ids, **options):
    return attention(q, k, v, causal=causal, segment_ids=ids, **options)


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parts", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_ring_takes_a_soft_cap_and_a_scale(parts, causal):
    *tensors, ids = arrays(32, 2)
    options = {"softcap": 1.5, "scale": 0.9}
    alone = functools.partial(_alone, causal, **options)
    wanted = value_and_gradients(alone, *tensors, ids)
    for got, want in zip(
        over_context(parts, "ring", causal, *tensors, ids, **options), wanted, strict=True
    ):
        assert np.abs(got - want).max() <= FLOAT32 * max(1, np.abs(want).max())


def test_the_ring_refuses_windows_and_distances():
    *tensors, ids = arrays(32)
    slopes = np.ones(HEADS, np.float32)
    with pytest.raises(
        ValueError,
        match="mesh.context_mode=ring does not take alibi_slopes, window of attention; "
        "use mesh.context_mode=gather or ulysses",
    ):
        options = {"window": 5, "alibi_slopes": slopes, "softcap": 2.0}
        over_context(4, "ring", True, *tensors, ids, **options)


@pytest.mark.parametrize(("parts", "length"), [(2, 8), (4, 64), (8, 16)])
def test_zigzag_balances_causal_work(parts, length):
    order = zigzag(length, parts)
    assert sorted(order) == list(range(length))
    work = (order + 1).reshape(parts, -1).sum(1)  # a query sees itself and all earlier positions
    assert len(set(work.tolist())) == 1
    assert (
        len(set((np.arange(length) + 1).reshape(parts, -1).sum(1).tolist())) > 1
    )  # not so in plain order


def test_indivisible_heads_raise_an_error_in_ulysses_only():
    *tensors, ids = arrays(32, kv_heads=2)
    with pytest.raises(
        ValueError,
        match="2 key/value heads per device are not divisible by mesh.context=4; .*gather or",
    ):
        over_context(4, "ulysses", True, *tensors, ids)
    with pytest.raises(
        ValueError, match="unknown context mode 'star'; choose one of auto, ulysses, gather, ring"
    ):
        over_context(4, "star", True, *tensors, ids)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ulysses", "gather", "ring"])
def test_a_document_of_32k_tokens(mode):
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((1, 32768, 2, 16)).astype(np.float32) for _ in range(4))
    ids = np.repeat(np.int32([[1, 2, 3]]), [10000, 2768, 20000], 1)
    wanted = jax.jit(functools.partial(value_and_gradients, functools.partial(_alone, True)))(
        q, k, v, d_out, ids
    )
    for got, want in zip(over_context(2, mode, True, q, k, v, d_out, ids), wanted, strict=True):
        assert np.abs(got - want).max() <= 5 * FLOAT32 * np.abs(want).max()
