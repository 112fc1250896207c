"""Check the chunked cross entropy: loss, gradients, memory, and a vocabulary split over devices."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.model import loss
from mtnlg_jax.model.head import Head
from mtnlg_jax.parallel.mesh import AXES, make_mesh


def cross_entropy(x, head, *rest, **options):
    return loss.cross_entropy(x, Head(head), *rest, **options)


def token_log_probs(x, head, *rest, **options):
    return loss.token_log_probs(x, Head(head), *rest, **options)


FLOAT32 = 2e-5  # sums of some dozens of float32 numbers of size one
BFLOAT16 = 3e-2  # the gradient of the logits is rounded to eight bits before the products
TOKENS = 26
WIDTH = 8
VOCABULARY = 40


def _inputs(seed=0, size=1.0):
    """Return x, head, labels with both ends of the vocabulary and of its fourths, weights with
    zeros."""
    random = np.random.default_rng(seed)
    x = size * random.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    head = random.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    labels = random.integers(0, VOCABULARY, TOKENS).astype(np.int32)
    labels[:8] = [0, VOCABULARY - 1, 9, 10, 19, 20, 29, 30]
    weights = random.uniform(0.2, 2, TOKENS).astype(np.float32)
    weights[[3, 17, 25]] = 0
    return x, head, labels, weights


def _longhand(x, head, labels, weights, smoothing=0.0, z_coeff=0.0):
    """Return losses of the tokens, and the gradients of their weighted sum, in float64."""
    x = np.asarray(x, np.float64)
    head = np.asarray(head, np.float64)
    losses = np.zeros(len(x))
    d_x = np.zeros_like(x)
    d_head = np.zeros_like(head)
    for t in range(len(x)):
        logits = head @ x[t]
        log_z = logits.max() + math.log(np.exp(logits - logits.max()).sum())
        logits = logits - logits.max()
        log_p = logits - math.log(np.exp(logits).sum())
        target = np.full(len(head), smoothing / len(head))
        target[labels[t]] += 1 - smoothing
        losses[t] = -target @ log_p
        d_logits = weights[t] * (np.exp(log_p) - target + 2 * z_coeff * log_z * np.exp(log_p))
        d_x[t] = d_logits @ head
        d_head += np.outer(d_logits, x[t])
    return losses, d_x, d_head


def _loss_and_gradients(chunk, smoothing=0.0, sparse=False):
    function = functools.partial(cross_entropy, chunk=chunk, smoothing=smoothing, sparse=sparse)
    return jax.jit(jax.value_and_grad(function, (0, 1)))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "chunk", [1, 7, 13, 1000]
)  # 7 leaves a remainder, 13 does not, 1000 is more than all tokens
def test_loss_and_gradients_equal_the_reference(chunk, smoothing, sparse):
    x, head, labels, weights = _inputs()
    function = _loss_and_gradients(chunk, smoothing, sparse)
    value, (d_x, d_head) = function(x, head, labels, weights)
    losses, want_x, want_head = _longhand(x, head, labels, weights, smoothing)
    assert value.shape == () and value.dtype == jnp.float32
    np.testing.assert_allclose(value, losses @ weights, rtol=FLOAT32)
    np.testing.assert_allclose(d_x, want_x, rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_allclose(d_head, want_head, rtol=FLOAT32, atol=FLOAT32)
    assert (d_x[weights == 0] == 0).all() and (np.abs(d_x[weights > 0]).max(-1) > 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_z_loss_adds_to_gradients_and_not_to_the_loss(smoothing):
    x, head, labels, weights = _inputs()
    function = functools.partial(cross_entropy, chunk=7, smoothing=smoothing, z_coeff=0.05)
    value, gradients = jax.jit(jax.value_and_grad(function, (0, 1)))(x, head, labels, weights)
    losses, *wanted = _longhand(x, head, labels, weights, smoothing, 0.05)
    np.testing.assert_allclose(value, losses @ weights, rtol=FLOAT32)
    plain = _longhand(x, head, labels, weights, smoothing)[1:]
    for got, want, without in zip(gradients, wanted, plain, strict=True):
        np.testing.assert_allclose(got, want, rtol=FLOAT32, atol=FLOAT32)
        assert np.abs(want - without).max() > 0.1


def test_the_z_loss_is_the_derivative_of_the_square_of_log_z():
    x, head, labels, weights = _inputs()

    def naive(x, head):
        logits = x @ head.T
        log_z = jax.nn.logsumexp(logits, -1)
        picked = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
        return jnp.dot(log_z - picked + 0.05 * jnp.square(log_z), weights)

    wanted = jax.jit(jax.grad(naive, (0, 1)))(x, head)
    found = jax.jit(
        jax.grad(
            lambda x, head: cross_entropy(x, head, labels, weights, 7, 0.0, False, 0.05), (0, 1)
        )
    )(x, head)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=FLOAT32, atol=2 * FLOAT32)


def test_a_factor_of_the_loss_multiplies_its_gradients():
    x, head, labels, weights = _inputs()
    scaled = jax.jit(
        jax.grad(lambda x, head: -3 * cross_entropy(x, head, labels, weights, 7), (0, 1))
    )(x, head)
    for got, want in zip(scaled, _longhand(x, head, labels, weights)[1:], strict=True):
        np.testing.assert_allclose(got, -3 * want, rtol=FLOAT32, atol=4 * FLOAT32)


@pytest.mark.parametrize("sparse", [False, True])
def test_tokens_without_weight_have_no_loss_and_no_gradient(sparse):
    x, head, labels, weights = _inputs()
    value, grads = _loss_and_gradients(7, 0.0, sparse)(x, head, labels, 0 * weights)
    assert value == 0 and all((grad == 0).all() for grad in grads)


def test_a_sparse_loss_skips_tokens_without_weight():
    x, head, labels, weights = _inputs()
    weights[np.arange(TOKENS) % 5 > 0] = 0
    want = _loss_and_gradients(7)(x, head, labels, weights)
    # The five others and the first two of these fill the only chunk. A product with one more would
    # not be a number.
    assert np.count_nonzero(weights) == 5
    x[np.flatnonzero(weights == 0)[2:]] = np.nan
    got = _loss_and_gradients(7, 0.0, sparse=True)(x, head, labels, weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32)
    assert np.isnan(_loss_and_gradients(7)(x, head, labels, weights)[0])


def test_large_logits_stay_finite_and_exact():
    x, head, labels, weights = _inputs(size=300.0)
    value, (d_x, d_head) = _loss_and_gradients(7)(x, head, labels, weights)
    losses, want_x, want_head = _longhand(x, head, labels, weights)
    np.testing.assert_allclose(value, losses @ weights, rtol=FLOAT32)
    np.testing.assert_allclose(
        d_x, want_x, atol=1e-3
    )  # float32 logits of about 1000 are exact to 1e-4
    np.testing.assert_allclose(d_head, want_head, atol=0.3)  # the same, times x of 300


def test_bfloat16_is_summed_in_float32():
    x, head, labels, weights = _inputs()
    x = jnp.asarray(x, jnp.bfloat16)
    head = jnp.asarray(head, jnp.bfloat16)
    value, (d_x, d_head) = _loss_and_gradients(7)(x, head, labels, weights)
    losses, want_x, want_head = _longhand(np.float32(x), np.float32(head), labels, weights)
    assert (value.dtype, d_x.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(value, losses @ weights, rtol=1e-5)  # products and sums are float32
    np.testing.assert_allclose(np.float32(d_x), want_x, rtol=BFLOAT16, atol=BFLOAT16)
    np.testing.assert_allclose(np.float32(d_head), want_head, rtol=BFLOAT16, atol=BFLOAT16)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_token_log_probs_are_the_negative_losses(chunk):
    x, head, labels, weights = _inputs()
    got = jax.jit(functools.partial(token_log_probs, chunk=chunk))(x, head, labels)
    assert got.shape == (TOKENS,) and got.dtype == jnp.float32
    np.testing.assert_allclose(
        got, -_longhand(x, head, labels, weights)[0], rtol=FLOAT32, atol=FLOAT32
    )


# --- memory

MANY = 512
WIDE = 1024
CHUNK = 32


def _plain(x, head, labels, weights):
    logits = jnp.einsum("TD,VD->TV", x, head, preferred_element_type=jnp.float32)
    return -(jax.nn.log_softmax(logits)[jnp.arange(MANY), labels] * weights).sum()


def _cost(loss, dtype):
    """Return (elements of the largest array of the compiled program, its temporary bytes) with
    gradients."""
    args = (
        jax.ShapeDtypeStruct((MANY, 16), dtype),
        jax.ShapeDtypeStruct((WIDE, 16), dtype),
        jax.ShapeDtypeStruct((MANY,), jnp.int32),
        jax.ShapeDtypeStruct((MANY,), jnp.float32),
    )
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()
    shapes = re.findall(r"\b(?:f32|bf16|f16|pred|s32|u8)\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    return largest, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("chunk", [4, 7, 100])
def test_the_losses_of_groups_count_every_weighted_token_once(chunk, sparse):
    x, head, labels, weights = _inputs()
    weights[8:20] = 0  # whole chunks, which a sparse loss leaves out
    groups = np.arange(TOKENS, dtype=np.int32) % 3
    total, of_groups = loss.cross_entropy_by_group(
        x, Head(head), labels, weights, groups, 4, chunk, sparse
    )
    losses = _longhand(x, head, labels, weights)[0]
    wanted = np.bincount(groups, losses * (weights > 0), minlength=4)
    np.testing.assert_allclose(of_groups, wanted, rtol=FLOAT32)
    assert of_groups[3] == 0
    assert total == cross_entropy(x, head, labels, weights, chunk, 0.0, sparse)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_of_all_tokens_are_never_allocated(dtype):
    largest, temporary = _cost(functools.partial(cross_entropy, chunk=CHUNK), dtype)
    assert largest < MANY * WIDE / 4 and temporary < 4 * MANY * WIDE / 2
    if dtype == jnp.float32:
        plain_largest, plain_temporary = _cost(_plain, dtype)
        assert (
            plain_largest >= MANY * WIDE and plain_temporary >= 4 * MANY * WIDE
        )  # the measure includes them


# --- a split vocabulary


@pytest.mark.parametrize(("smoothing", "sparse"), [(0.0, False), (0.1, False), (0.1, True)])
def test_a_vocabulary_split_over_tensor_has_the_same_loss_and_gradients(smoothing, sparse):
    x, head, labels, weights = _inputs()
    if sparse:  # of the two devices along data, one needs two chunks and the other one
        weights[15:] = 0

    def local(x, head, labels, weights):
        value, grads = _loss_and_gradients(7, smoothing, sparse)(x, head, labels, weights)
        return value[None], *grads, token_log_probs(x, head, labels, chunk=7)[None]

    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    rows = P("data")
    over_mesh = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, P("tensor"), rows, rows),
        out_specs=(P(AXES), rows, P("tensor"), P("tensor", "data")),
    )
    values, d_x, d_head, log_probs = jax.jit(over_mesh)(x, head, labels, weights)
    losses, want_x, want_head = _longhand(x, head, labels, weights, smoothing)
    values = np.asarray(values).reshape(2, 4)
    np.testing.assert_allclose(
        values.sum(0), [losses @ weights] * 4, rtol=FLOAT32
    )  # equal along tensor
    np.testing.assert_allclose(d_x, want_x, rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_allclose(d_head, want_head, rtol=FLOAT32, atol=FLOAT32)
    plain = _longhand(x, head, labels, weights)[0]
    np.testing.assert_allclose(log_probs, [-plain] * 4, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padding_of_the_vocabulary_takes_no_part(smoothing):
    x, head, labels, weights = _inputs()
    # Logits of the padding would be the largest ones.
    padded = np.concatenate([head, 9 * np.sign(x[:8]) + x[:8]])

    def local(padding, x, head, labels, weights):
        def total(x, head):
            return loss.cross_entropy(x, head, labels, weights, chunk=7, smoothing=smoothing)

        whole = Head(head, softcap=30.0, padding=padding)
        value, (d_x, d_head) = jax.value_and_grad(total, (0, 1))(x, whole)
        return value[None], d_x, d_head.table_VD, loss.token_log_probs(x, whole, labels, 7)[None]

    def over(tensor, padding, head):
        mesh = make_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])
        function = jax.shard_map(
            functools.partial(local, padding),
            mesh=mesh,
            in_specs=(P(), P("tensor"), P(), P()),
            out_specs=(P(AXES), P("tensor"), P("tensor"), P("tensor")),
        )
        value, d_x, d_head, log_probs = jax.jit(function)(x, head, labels, weights)
        return value[0], d_x[:TOKENS], d_head, log_probs.reshape(tensor, TOKENS)[0]

    value, d_x, d_head, log_probs = over(8, 8, padded)  # the last device has padding alone
    want, want_x, want_head, want_log_probs = over(1, 0, head)
    np.testing.assert_allclose(value, want, rtol=FLOAT32)
    np.testing.assert_allclose(d_x, want_x, rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_allclose(d_head[:VOCABULARY], want_head, rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_allclose(log_probs, want_log_probs, rtol=FLOAT32, atol=FLOAT32)
    assert (np.asarray(d_head[VOCABULARY:]) == 0).all()
    assert float(over(8, 0, padded)[0]) > 2 * float(want)  # padding that is not masked shows


def test_logits_far_below_zero_with_padding_and_a_split():
    # The maximum over a split vocabulary must be over logits, not over zeros in place of another
    # device's logits.
    x, head, labels, weights = _inputs()
    x = np.abs(x)
    head = -np.abs(head) - 50

    def local(head):
        return lax.pmean(token_log_probs(x, head, labels, chunk=7), AXES)

    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("tensor"), out_specs=P()))(head)
    np.testing.assert_allclose(got, -_longhand(x, head, labels, weights)[0], rtol=1e-4, atol=1e-3)
