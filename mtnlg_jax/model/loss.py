"""Cross entropy over a vocabulary split over ``tensor``, computed a chunk of tokens at a time.

Logits exist for one chunk only, and its gradient is computed in the same pass (Hsu 2024, Liger). So
the backward pass only scales. That takes six products per parameter and token instead of eight, and
never allocates [B, S, V].
"""

# Shapes: B tokens (all rows and positions of a micro-batch), D width, V vocabulary, C width of the
# teacher, G groups of tokens

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from mtnlg_jax.model.head import Head
from mtnlg_jax.parallel.collectives import axis_index, axis_size, max_over, sum_over, vary
from mtnlg_jax.parallel.mesh import ROWS


def cross_entropy(
    x_BD: jax.Array,
    head: Head,
    labels_B: jax.Array,
    weights_B: jax.Array,
    chunk: int = 1024,
    smoothing: float = 0.0,
    sparse: bool = False,
    z_coeff: float = 0.0,
) -> jax.Array:
    """Return the sum over tokens of weight x -log p(label), a float32 scalar.

    Args:
      x_BD: hidden states, equal on all devices of ``tensor``.
      head: this device's part of the output head.
      labels_B: int32 ids in the whole vocabulary.
      weights_B: float32; 0 leaves a token out.
      chunk: how many tokens have logits at the same time.
      smoothing: the share, in [0, 1), of every target that is spread evenly over the vocabulary
        (Szegedy 2016, Rethinking the Inception Architecture, section 7).
      sparse: compute no logits of tokens with weight 0, but for those that fill up a chunk. It
        pays where most weights are 0, as in training on answers alone.
      z_coeff: weight of the z-loss, log(Z)^2 of each token with Z the sum of exp(logits)
        (Chowdhery 2022, PaLM, section 5). It adds to the gradients, not to the result.
    """
    if sparse:
        order = jnp.argsort(weights_B == 0)
        x_BD, labels_B, weights_B = (each[order] for each in (x_BD, labels_B, weights_B))
    chunk = min(chunk, x_BD.shape[0])
    x_BD, labels_B, weights_B = _padded(chunk, x_BD, labels_B, weights_B)
    return _summed(chunk, smoothing, sparse, z_coeff, *vary((x_BD, head, labels_B, weights_B)))


def cross_entropy_by_group(
    x_BD: jax.Array,
    head: Head,
    labels_B: jax.Array,
    weights_B: jax.Array,
    groups_B: jax.Array,
    groups: int,
    chunk: int = 1024,
    sparse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return `cross_entropy`, and the sum over the tokens of each group of -log p(label), float32
    (G,); not for training.

    Args:
      groups_B: int32 from 0 to ``groups`` - 1. In the sums of groups every token with a weight
        above 0 counts once, whatever its weight.
    """
    arrays: tuple[jax.Array, ...] = (x_BD, labels_B, weights_B, groups_B)
    if sparse:
        order = jnp.argsort(weights_B == 0)
        arrays = tuple(each[order] for each in arrays)
    chunk = min(chunk, x_BD.shape[0])
    head, arrays = vary((head, _padded(chunk, *arrays)))

    def one(carry, part):
        total, sums_G = carry
        x, labels, weights, numbers = part
        losses = _chunk_losses(x, head, labels)[0]
        mine_GB = (numbers[None] == jnp.arange(groups)[:, None]) & (weights > 0)[None]
        sums_G = sums_G + jnp.where(mine_GB, losses[None], 0.0).sum(1)
        # The same sum as in `cross_entropy`, to the last bit.
        return (total + jnp.dot(losses, weights), sums_G), None

    start = vary((jnp.float32(0), jnp.zeros(groups, jnp.float32)))
    return _over_chunks(one, start, chunk, sparse, *arrays)[0]


def token_log_probs(
    x_BD: jax.Array,
    head: Head,
    labels_B: jax.Array,
    chunk: int = 1024,
    wanted_B: jax.Array | None = None,
) -> jax.Array:
    """Return log p(label) of every token, float32 (B,); not for training.

    With ``wanted_B``, bool, logits are computed of these tokens alone; others may get 0.
    """

    def one(carry, part):
        x, labels, _ = part
        return carry, _chunk_losses(x, head, labels)[0]

    tokens = x_BD.shape[0]
    chunk = min(chunk, tokens)
    if wanted_B is None:
        parts = _padded(chunk, x_BD, labels_B, jnp.ones(tokens))
        return -_over_chunks(one, (), chunk, False, *parts)[1].reshape(-1)[:tokens]
    order = jnp.argsort(~wanted_B)
    parts = _padded(chunk, *(each[order] for each in (x_BD, labels_B, wanted_B)))
    losses = _over_chunks(one, (), chunk, True, *parts)[1].reshape(-1)[:tokens]
    return jnp.zeros_like(losses).at[order].set(-losses)


def _padded(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Pad the first dim with zeros to a multiple of ``chunk``; the weight of such a token is 0."""
    pad = -arrays[0].shape[0] % chunk
    if not pad:
        return arrays
    return tuple(jnp.pad(a, ((0, pad), *[(0, 0)] * (a.ndim - 1))) for a in arrays)


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(a.reshape(-1, chunk, *a.shape[1:]) for a in arrays)


def _chunk_losses(
    x: jax.Array, head: Head, labels: jax.Array, smoothing: float = 0.0
) -> tuple[jax.Array, tuple]:
    """Return the losses (B,) of a chunk, and what `_losses_of` returns for their gradient."""
    return _losses_of(head, head.logits(x), labels, smoothing)


def _losses_of(
    head: Head, logits: jax.Array, labels: jax.Array, smoothing: float
) -> tuple[jax.Array, tuple]:
    """Return (losses, (exp(logits - max), their sums, targets, log Z)), reduced over ``tensor``."""
    own = logits.shape[-1]
    # Softmax does not change with the maximum, so no gradient goes through it.
    top = max_over(lax.stop_gradient(logits.max(-1)), "tensor")
    exped = jnp.exp(logits - top[:, None])
    total = sum_over(exped.sum(-1), "tensor")
    # The label's logit is on one device of tensor; the others contribute 0 to the sum.
    local = labels - axis_index("tensor") * own
    mine = (local >= 0) & (local < own)
    picked = jnp.take_along_axis(logits, jnp.where(mine, local, 0)[:, None], -1)[:, 0]
    target = sum_over(jnp.where(mine, picked, 0.0), "tensor")
    hits = jnp.arange(own)[None, :] == jnp.where(mine, local, -1)[:, None]
    if smoothing:
        even = 1 / (own * axis_size("tensor") - head.padding)
        real = head.real(own)
        summed = logits.sum(-1, where=real)
        target = (1 - smoothing) * target + smoothing * even * sum_over(summed, "tensor")
        spread = even if real is None else even * real[None, :]
        hits = (1 - smoothing) * hits + smoothing * spread
    log_z = jnp.log(total) + top
    return log_z - target, (exped, total, hits, log_z)


def _by_logits(z_coeff: float, exped, total, targets, log_z) -> jax.Array:
    """Return the gradient by the logits of -log p and of the z-loss, from `_losses_of`."""
    p = exped / total[:, None]
    if z_coeff:
        # d log(Z)^2 / d logits = 2 log(Z) p.
        return p * (1 + 2 * z_coeff * log_z)[:, None] - targets
    return p - targets


def _over_chunks(one, start, chunk, sparse, x_BD, labels_B, weights_B, *more):
    """Apply ``one`` to the chunks like `lax.scan`: return (the last carry, the outputs, of tokens).
    ``more``: further arrays with an entry for each token.

    ``sparse``: chunks at the end are left out if all their weights are 0; their outputs are 0.
    """
    parts = _chunks(chunk, x_BD, labels_B, weights_B, *more)
    if not sparse:
        return lax.scan(one, start, parts)
    used = jnp.count_nonzero(weights_B.reshape(-1, chunk).any(1))
    if axis_size("tensor") > 1:
        # Devices along tensor sum within a chunk. With equal numbers all devices do so at once.
        for axis in (*ROWS, "context"):
            used = max_over(used, axis)

    def at(number):
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, number, keepdims=False), parts)

    def step(number, state):
        carry, outputs = state
        carry, output = one(carry, at(number))
        put = functools.partial(lax.dynamic_update_index_in_dim, index=number, axis=0)
        return carry, jax.tree.map(lambda a, update: put(a, update), outputs, output)

    _, output = jax.eval_shape(one, start, jax.tree.map(lambda a: a[0], parts))
    outputs = jax.tree.map(lambda a: jnp.zeros((len(parts[0]), *a.shape), a.dtype), output)
    return lax.fori_loop(0, used, step, (start, vary(outputs)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _summed(chunk, smoothing, sparse, z_coeff, x_BD, head, labels_B, weights_B):
    def one(total, part):
        x, labels, weights = part
        return total + jnp.dot(_chunk_losses(x, head, labels, smoothing)[0], weights), None

    start = vary(jnp.float32(0))
    return _over_chunks(one, start, chunk, sparse, x_BD, labels_B, weights_B)[0]


def _forward(chunk, smoothing, sparse, z_coeff, x_BD, head, labels_B, weights_B):
    def one(carry, part):
        total, d_head = carry
        x, labels, weights = part
        logits = head.logits(x)
        losses, of_softmax = _losses_of(head, logits, labels, smoothing)
        d_logits = _by_logits(z_coeff, *of_softmax) * weights[:, None]
        d_head, d_x = _through_head(head, d_head, x, logits, d_logits)
        total = total + jnp.dot(losses, weights)
        return vary((total, d_head)), d_x

    start = vary((jnp.float32(0), _zeros_like(head)))
    (total, d_head), d_x = _over_chunks(one, start, chunk, sparse, x_BD, labels_B, weights_B)
    return total, (d_x.reshape(x_BD.shape), d_head, head, weights_B)


def _zeros_like(head: Head) -> Head:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)


def _through_head(
    head: Head, d_head: Head, x: jax.Array, logits: jax.Array, d_logits: jax.Array
) -> tuple[Head, jax.Array]:
    """Return the sum of the head's gradients with those of a chunk, and the gradient by ``x``."""
    d_logits = head.before_cap(d_logits, logits)
    if d_head.bias_V is not None:
        d_head = dataclasses.replace(d_head, bias_V=d_head.bias_V + d_logits.sum(0))
    if head.multiplier != 1:
        d_logits = head.multiplier * d_logits
    d_logits = d_logits.astype(head.table_VD.dtype)
    d_table = jnp.einsum("BV,BD->VD", d_logits, x, preferred_element_type=jnp.float32)
    d_head = dataclasses.replace(d_head, table_VD=d_head.table_VD + d_table)
    return d_head, jnp.einsum("BV,VD->BD", d_logits, head.table_VD)


def _backward(chunk, smoothing, sparse, z_coeff, residuals, grad):
    d_x, d_head, head, weights_B = residuals
    # The weights are data: nothing is differentiated by them.
    return (
        (d_x * grad).astype(d_x.dtype),
        jax.tree.map(lambda total, leaf: (total * grad).astype(leaf.dtype), d_head, head),
        None,
        jnp.zeros_like(weights_B),
    )


_summed.defvjp(_forward, _backward)


# --- distillation


def distilled_cross_entropy(
    x_BD: jax.Array,
    head: Head,
    teacher_x_BC: jax.Array,
    teacher_head: Head,
    labels_B: jax.Array,
    weights_B: jax.Array,
    chunk: int = 1024,
    smoothing: float = 0.0,
    temperature: float = 1.0,
    share: float = 0.5,
    z_coeff: float = 0.0,
) -> jax.Array:
    """Return the loss of a student and its distance from a teacher, summed over tokens, float32.

    A token adds weight x ((1 - share) x -log p(label) + share x temperature^2 x -sum q log p).
    In the second part p is the student's distribution and q the teacher's, both of
    logits / temperature (Hinton 2015, section 2). The square keeps the size of the gradient
    independent of the temperature. The teacher gets no gradient.

    Like in `cross_entropy`, logits of either model exist for one chunk only, split over ``tensor``.

    Args:
      teacher_x_BC: the teacher's hidden states, of its own width.
      teacher_head: the teacher's head, split over the same vocabulary.
      temperature: above 0.
      share: in [0, 1]; 0 gives the result of `cross_entropy`.
      z_coeff: as in `cross_entropy`, of the student at temperature 1, whatever ``share``.
    """
    chunk = min(chunk, x_BD.shape[0])
    teacher_x_BC, teacher_head = lax.stop_gradient((teacher_x_BC, teacher_head))
    x_BD, teacher_x_BC, labels_B, weights_B = _padded(
        chunk, x_BD, teacher_x_BC, labels_B, weights_B
    )
    return _distilled(
        chunk,
        smoothing,
        temperature,
        share,
        z_coeff,
        *vary((x_BD, head, teacher_x_BC, teacher_head, labels_B, weights_B)),
    )


def _softmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (probabilities, log of the sum of exp) over a vocabulary split over ``tensor``."""
    top = max_over(lax.stop_gradient(logits.max(-1)), "tensor")
    exped = jnp.exp(logits - top[:, None])
    total = sum_over(exped.sum(-1), "tensor")
    return exped / total[:, None], jnp.log(total) + top


def _distilled_chunk(
    smoothing, temperature, share, z_coeff, x, head, teacher_x, teacher_head, labels
):
    """Return the losses (B,) of a chunk, and the logits (B, V) with their gradients."""
    logits = head.logits(x)
    hard, of_softmax = _losses_of(head, logits, labels, smoothing)
    teacher_logits = teacher_head.logits(teacher_x)
    q, _ = _softmax(teacher_logits / temperature)
    p, log_total = _softmax(logits / temperature)
    soft = log_total - sum_over((q * logits).sum(-1), "tensor") / temperature
    losses = (1 - share) * hard + share * temperature**2 * soft
    # d soft / d logits is (p - q) / temperature, times temperature^2.
    d_logits = (1 - share) * _by_logits(0.0, *of_softmax) + share * temperature * (p - q)
    if z_coeff:
        exped, total, _, log_z = of_softmax
        d_logits = d_logits + 2 * z_coeff * (log_z / total)[:, None] * exped
    return losses, logits, d_logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _distilled(
    chunk,
    smoothing,
    temperature,
    share,
    z_coeff,
    x_BD,
    head,
    teacher_x_BC,
    teacher_head,
    labels_B,
    weights_B,
):
    def one(total, part):
        x, teacher_x, labels, weights = part
        losses, _, _ = _distilled_chunk(
            smoothing, temperature, share, z_coeff, x, head, teacher_x, teacher_head, labels
        )
        return total + jnp.dot(losses, weights), None

    total, _ = lax.scan(
        one, vary(jnp.float32(0)), _chunks(chunk, x_BD, teacher_x_BC, labels_B, weights_B)
    )
    return total


def _distilled_forward(
    chunk,
    smoothing,
    temperature,
    share,
    z_coeff,
    x_BD,
    head,
    teacher_x_BC,
    teacher_head,
    labels_B,
    weights_B,
):
    def one(carry, part):
        total, d_head = carry
        x, teacher_x, labels, weights = part
        losses, logits, d_logits = _distilled_chunk(
            smoothing, temperature, share, z_coeff, x, head, teacher_x, teacher_head, labels
        )
        d_logits = d_logits * weights[:, None]
        d_head, d_x = _through_head(head, d_head, x, logits, d_logits)
        total = total + jnp.dot(losses, weights)
        return vary((total, d_head)), d_x

    start = vary((jnp.float32(0), _zeros_like(head)))
    (total, d_head), d_x = lax.scan(
        one, start, _chunks(chunk, x_BD, teacher_x_BC, labels_B, weights_B)
    )
    return total, (d_x.reshape(x_BD.shape), d_head, head, weights_B)


def _distilled_backward(chunk, smoothing, temperature, share, z_coeff, residuals, grad):
    d_x, d_head, _, d_weights = _backward(chunk, smoothing, False, z_coeff, residuals, grad)
    return d_x, d_head, None, None, None, d_weights


_distilled.defvjp(_distilled_forward, _distilled_backward)
