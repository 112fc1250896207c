"""Attention whose positions XLA splits over ``context`` equals attention on one device."""

import jax
import numpy as np
import pytest

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.model.attention import attention, attention_to_cache, decode_attention
from mtnlg_jax.parallel.mesh import make_mesh

SLOW = pytest.mark.slow
SLOPES = np.float32([0.5, 0.25, 0.1, 0.01])
CASES = [
    {},
    pytest.param({"causal": False, "kv_lengths": np.int32([5, 24])}, marks=SLOW),
    {"window": 7, "softcap": 3.0, "alibi_slopes": SLOPES},
    pytest.param({"causal": False, "window": 7}, marks=SLOW),
    pytest.param({"segment_ids": np.repeat(np.int32([[1, 2], [3, 3]]), 12, 1)}, marks=SLOW),
    pytest.param({"impl": "xla_blockwise", "block_sizes": (4, 4)}, marks=SLOW),
    pytest.param({"impl": "xla_blockwise", "block_sizes": (4, 4), "window": 5}, marks=SLOW),
]


def drawn(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def over(context: int, function, *arrays):
    """Return what ``function`` returns over ``context``, with the compiled program."""
    config = MeshConfig(data=1, tensor=2, context=context)
    with jax.set_mesh(make_mesh(config, jax.devices()[: 2 * context])):
        program = jax.jit(function).lower(*arrays).compile()
        return [np.asarray(x) for x in program(*arrays)], program.as_text()


@pytest.mark.parametrize("context", [4, pytest.param(3, marks=SLOW)])
@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(options) or "causal")
def test_a_text_that_attends_to_itself(context, options):
    q = drawn(2, 24, 4, 8)
    k, v = 2 * drawn(2, 2, 24, 2, 8)

    def attend(q, k, v):
        return attention(q, k, v, return_lse=True, **options)

    found, program = over(context, attend, q, k, v)
    for one, other in zip(found, attend(q, k, v), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    # The sides differ: parts of keys go around, and no device has all of them.
    assert "collective-permute" in program and "all-gather" not in program


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        pytest.param({"q_offset": np.int32([9]), "window": 5}, marks=SLOW),
        pytest.param({"q_offset": np.int32([9]), "alibi_slopes": SLOPES}, marks=SLOW),
    ],
    ids=["", "window", "slopes"],
)
def test_queries_behind_a_cache(options):
    q = drawn(1, 6, 4, 8)
    k, v = 2 * drawn(2, 1, 24, 2, 8)

    def attend(q, k, v):
        return attention_to_cache(q, k, v, kv_lengths=np.int32([9]), **options)

    found, program = over(4, attend, q, k, v)
    for one, other in zip(found, attend(q, k, v), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    assert "all-reduce" in program and "all-gather" not in program


@pytest.mark.parametrize(
    "options", [{}, {"window": 5, "alibi_slopes": SLOPES}], ids=["", "window-slopes"]
)
def test_one_query_a_row(options):
    q = drawn(3, 4, 8)
    k, v = 2 * drawn(2, 3, 2, 24, 8)
    lengths = np.int32([0, 7, 24])

    def attend(q, k, v):
        return decode_attention(q, k, v, lengths, return_lse=True, **options)

    found, program = over(4, attend, q, k, v)
    for one, other in zip(found, attend(q, k, v), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    assert "all-reduce" in program and "all-gather" not in program
