"""Cross entropy over a vocabulary split over ``tensor``, a chunk of tokens at a time.

Logits exist for one chunk only, and the gradient is formed in the same pass (Hsu 2024, Liger): the
backward pass multiplies. Six products a parameter and token instead of eight, and never [B, S, V].
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mtnlg_jax.parallel.collectives import axis_index, axis_size, max_over, sum_over, vary


def cross_entropy(x_TD, head_VD, labels_T, weights_T, chunk: int = 1024, smoothing: float = 0.0):
    """Sum over tokens of weight x -log p(label), a float32 scalar.

    Args:
      x_TD: hidden states, (tokens, width), equal on all devices of ``tensor``.
      head_VD: this device's part of the output embedding.
      labels_T: int32 ids in the whole vocabulary. weights_T: float32; 0 leaves a token out.
      chunk: tokens whose logits exist at once.
      smoothing: in [0, 1), the share of a target that is spread evenly over the rows of the
        embedding, so that no token is held impossible (Szegedy 2016, Rethinking the Inception
        Architecture, section 7).
    """
    tokens = x_TD.shape[0]
    chunk = min(chunk, tokens)
    pad = -tokens % chunk
    if pad:
        x_TD = jnp.pad(x_TD, ((0, pad), (0, 0)))
        labels_T = jnp.pad(labels_T, (0, pad))
        weights_T = jnp.pad(weights_T, (0, pad))
    x_TD, head_VD, labels_T, weights_T = vary((x_TD, head_VD, labels_T, weights_T))
    return _summed(chunk, smoothing, x_TD, head_VD, labels_T, weights_T)


def token_log_probs(x_TD, head_VD, labels_T, chunk: int = 1024):
    """log p(label) of every token, float32 (tokens,); not for training."""
    tokens = x_TD.shape[0]
    chunk = min(chunk, tokens)
    pad = -tokens % chunk
    x = jnp.pad(x_TD, ((0, pad), (0, 0))).reshape(-1, chunk, x_TD.shape[1])
    labels = jnp.pad(labels_T, (0, pad)).reshape(-1, chunk)
    losses = lax.map(lambda args: _chunk_losses(args[0], head_VD, args[1])[0], (x, labels))
    return -losses.reshape(-1)[:tokens]


def _chunk_losses(x, head, labels, smoothing=0.0):
    """Losses (T,) of a chunk, and what their gradient needs: exp(logits - max), the sums, the
    targets."""
    return _losses_of(
        jnp.einsum("TD,VD->TV", x, head, preferred_element_type=jnp.float32),
        head,
        labels,
        smoothing,
    )


def _losses_of(logits, head, labels, smoothing):
    top = max_over(lax.stop_gradient(logits.max(-1)), "tensor")
    exped = jnp.exp(logits - top[:, None])
    total = sum_over(exped.sum(-1), "tensor")
    local = labels - axis_index("tensor") * head.shape[0]
    mine = (local >= 0) & (local < head.shape[0])
    picked = jnp.take_along_axis(logits, jnp.where(mine, local, 0)[:, None], -1)[:, 0]
    target = sum_over(jnp.where(mine, picked, 0.0), "tensor")
    hits = jnp.arange(head.shape[0]) == jnp.where(mine, local, -1)[:, None]
    if smoothing:
        even = 1 / (head.shape[0] * axis_size("tensor"))
        target = (1 - smoothing) * target + smoothing * even * sum_over(logits.sum(-1), "tensor")
        hits = (1 - smoothing) * hits + smoothing * even
    return jnp.log(total) + top - target, (exped, total, hits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(chunk, smoothing, x_TD, head_VD, labels_T, weights_T):
    def one(total, part):
        x, labels, weights = part
        return total + jnp.dot(_chunk_losses(x, head_VD, labels, smoothing)[0], weights), None

    total, _ = lax.scan(one, vary(jnp.float32(0)), _chunks(chunk, x_TD, labels_T, weights_T))
    return total


def _chunks(chunk, *arrays):
    return tuple(a.reshape(-1, chunk, *a.shape[1:]) for a in arrays)


def _forward(chunk, smoothing, x_TD, head_VD, labels_T, weights_T):
    def one(carry, part):
        total, d_head = carry
        x, labels, weights = part
        losses, (exped, sums, targets) = _chunk_losses(x, head_VD, labels, smoothing)
        d_logits = (exped / sums[:, None] - targets) * weights[:, None]
        d_logits = d_logits.astype(head_VD.dtype)
        d_head = d_head + jnp.einsum("TV,TD->VD", d_logits, x, preferred_element_type=jnp.float32)
        return vary((total + jnp.dot(losses, weights), d_head)), jnp.einsum(
            "TV,VD->TD", d_logits, head_VD
        )

    start = vary((jnp.float32(0), jnp.zeros(head_VD.shape, jnp.float32)))
    (total, d_head), d_x = lax.scan(one, start, _chunks(chunk, x_TD, labels_T, weights_T))
    return total, (d_x.reshape(x_TD.shape), d_head, head_VD, weights_T)


def _backward(chunk, smoothing, residuals, grad):
    d_x, d_head, head_VD, weights_T = residuals
    return (
        (d_x * grad).astype(d_x.dtype),
        (d_head * grad).astype(head_VD.dtype),
        None,
        jnp.zeros_like(weights_T),
    )


_summed.defvjp(_forward, _backward)


# --- distillation
# -------------------------------------------------------------------------------------------


def distilled_cross_entropy(
    x_TD,
    head_VD,
    teacher_x_TC,
    teacher_head_VC,
    labels_T,
    weights_T,
    chunk: int = 1024,
    smoothing: float = 0.0,
    temperature: float = 1.0,
    share: float = 0.5,
):
    """Sum over tokens of weight x ((1 - share) x -log p(label) + share x temperature^2 x -sum q log
    p), float32, where in the second part p is the student's distribution and q the teacher's, of
    logits / temperature (Hinton 2015, section 2; the square keeps the gradient's size). As
    `cross_entropy` in all else: logits of either model exist for one chunk, split over ``tensor``.
        Nothing is learnt of the teacher.

    Args:
      teacher_x_TC, teacher_head_VC: the teacher's hidden states, of its own width, and its output
        embedding, split over the same vocabulary.
      temperature: above 0. share: in [0, 1]; 0 gives the number of `cross_entropy`.
    """
    tokens = x_TD.shape[0]
    chunk = min(chunk, tokens)
    pad = -tokens % chunk
    teacher_x_TC, teacher_head_VC = lax.stop_gradient((teacher_x_TC, teacher_head_VC))
    x_TD, teacher_x_TC = (jnp.pad(x, ((0, pad), (0, 0))) for x in (x_TD, teacher_x_TC))
    labels_T = jnp.pad(labels_T, (0, pad))
    weights_T = jnp.pad(weights_T, (0, pad))
    return _distilled(
        chunk,
        smoothing,
        temperature,
        share,
        *vary((x_TD, head_VD, teacher_x_TC, teacher_head_VC, labels_T, weights_T)),
    )


def _softmax(logits):
    """(probabilities, log of their sum) over a vocabulary split over ``tensor``."""
    top = max_over(lax.stop_gradient(logits.max(-1)), "tensor")
    exped = jnp.exp(logits - top[:, None])
    total = sum_over(exped.sum(-1), "tensor")
    return exped / total[:, None], jnp.log(total) + top


def _distilled_chunk(smoothing, temperature, share, x, head, teacher_x, teacher_head, labels):
    """Losses (T,) of a chunk and their gradients by logits (T, V)."""
    logits = jnp.einsum("TD,VD->TV", x, head, preferred_element_type=jnp.float32)
    hard, (exped, sums, targets) = _losses_of(logits, head, labels, smoothing)
    wanted, _ = _softmax(
        jnp.einsum("TC,VC->TV", teacher_x, teacher_head, preferred_element_type=jnp.float32)
        / temperature
    )
    given, log_total = _softmax(logits / temperature)
    soft = log_total - sum_over((wanted * logits).sum(-1), "tensor") / temperature
    losses = (1 - share) * hard + share * temperature**2 * soft
    return losses, (1 - share) * (exped / sums[:, None] - targets) + share * temperature * (
        given - wanted
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _distilled(
    chunk,
    smoothing,
    temperature,
    share,
    x_TD,
    head_VD,
    teacher_x_TC,
    teacher_head_VC,
    labels_T,
    weights_T,
):
    def one(total, part):
        x, teacher_x, labels, weights = part
        losses, _ = _distilled_chunk(
            smoothing, temperature, share, x, head_VD, teacher_x, teacher_head_VC, labels
        )
        return total + jnp.dot(losses, weights), None

    total, _ = lax.scan(
        one, vary(jnp.float32(0)), _chunks(chunk, x_TD, teacher_x_TC, labels_T, weights_T)
    )
    return total


def _distilled_forward(
    chunk,
    smoothing,
    temperature,
    share,
    x_TD,
    head_VD,
    teacher_x_TC,
    teacher_head_VC,
    labels_T,
    weights_T,
):
    def one(carry, part):
        total, d_head = carry
        x, teacher_x, labels, weights = part
        losses, d_logits = _distilled_chunk(
            smoothing, temperature, share, x, head_VD, teacher_x, teacher_head_VC, labels
        )
        d_logits = (d_logits * weights[:, None]).astype(head_VD.dtype)
        d_head = d_head + jnp.einsum("TV,TD->VD", d_logits, x, preferred_element_type=jnp.float32)
        return vary((total + jnp.dot(losses, weights), d_head)), jnp.einsum(
            "TV,VD->TD", d_logits, head_VD
        )

    start = vary((jnp.float32(0), jnp.zeros(head_VD.shape, jnp.float32)))
    (total, d_head), d_x = lax.scan(
        one, start, _chunks(chunk, x_TD, teacher_x_TC, labels_T, weights_T)
    )
    return total, (d_x.reshape(x_TD.shape), d_head, head_VD, weights_T)


def _distilled_backward(chunk, smoothing, temperature, share, residuals, grad):
    d_x, d_head, _, d_weights = _backward(chunk, smoothing, residuals, grad)
    return d_x, d_head, None, None, None, d_weights


_distilled.defvjp(_distilled_forward, _distilled_backward)
