"""Loss, perplexity and bits per byte of any text, long or short."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mtnlg_jax.decode.cache import Decoder, as_cached, run_layers
from mtnlg_jax.model.attention import attention
from mtnlg_jax.model.loss import cross_entropy, token_log_probs
from mtnlg_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Evaluation:
    tokens: int
    bytes: int  # of the text in UTF-8
    loss: float  # nats a token
    perplexity: float  # e^loss, a token
    bits_per_byte: float  # independent of the tokenizer, so comparable between models and with xz


def windows(tokens: np.ndarray, length: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels and weights, each (windows, length), that score tokens[1:] once each. Every window after the
    first has length - stride tokens of context before the first token that it scores."""
    inputs, labels, weights = [], [], []
    scored, begin, total = 0, 0, len(tokens) - 1
    while scored < total:
        end = min(begin + length, total)
        pad = length - (end - begin)
        inputs.append(np.pad(tokens[begin:end], (0, pad)))
        labels.append(np.pad(tokens[begin + 1 : end + 1], (0, pad)))
        counts = np.zeros(length, np.float32)
        counts[scored - begin : end - begin] = 1
        weights.append(counts)
        scored, begin = end, begin + stride
    return tuple(np.stack(x) for x in (inputs, labels, weights))


@functools.partial(jax.jit, static_argnums=0)
def _window_losses(graph, params, inputs, labels, weights):
    model = nnx.merge(graph, params)
    x_BSD = model.hidden(inputs)
    log_probs = token_log_probs(x_BSD.reshape(-1, x_BSD.shape[-1]), model.head(), labels.reshape(-1))
    return -jnp.where(weights > 0, log_probs.reshape(labels.shape), 0.0).sum()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _score_then_learn(graph, rate, params, state, inputs, labels, weights):
    """The loss of one window before the step, and parameters and Adam's state after a step on what it scored."""

    def loss(params):
        model = nnx.merge(graph, params)
        x_BSD = model.hidden(inputs)
        return cross_entropy(x_BSD.reshape(-1, x_BSD.shape[-1]), model.head(), labels.reshape(-1), weights.reshape(-1))

    total, gradients = jax.value_and_grad(loss)(params)
    gradients = jax.tree.map(lambda g: g / weights.sum(), gradients)
    updates, state = _adam(rate).update(gradients, state)
    return total, optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnames=("config", "int8_cache"))
def _decoder_losses(params, inputs, labels, weights, *, config, int8_cache):
    positions_BS = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)

    def attend(_, q, k, v):
        if int8_cache:  # as decoding reads them from there
            k, v = as_cached(k), as_cached(v)
        return attention(q, k, v, impl=config.attention_impl)

    x_BSD, head_VD = run_layers(config, params, inputs, positions_BS, attend)
    log_probs = token_log_probs(x_BSD.reshape(-1, x_BSD.shape[-1]), head_VD, labels.reshape(-1))
    return -jnp.where(weights > 0, log_probs.reshape(labels.shape), 0.0).sum()


def _adam(rate):
    # The mean of the gradients would only delay what the last window taught.
    return optax.adam(rate, b1=0.0)


def evaluate_text(model: Transformer | Decoder, tokenizer, text: str, stride: int | None = None, batch: int = 8,
                  adapt: float = 0.0, on_batch=lambda done, total: None) -> Evaluation:
    """Scores every token of ``text`` once, after <bos>, in windows of the model's context.

    Args:
      model: as it was trained, or a Decoder, whose weights and cache may be rounded; it cannot adapt.
      stride: tokens that each window scores, 1 to the context; default half the context, so that a token has at
        least half a context before it, save at the beginning.
      batch: windows scored at once; adapting takes one after the other.
      adapt: 0, or the learning rate of dynamic evaluation (Krause 2018, arXiv:1709.07432): every window is scored
        first and learnt from then, by one step of Adam, so that the model grows used to the text as a compressor
        does. A token is still predicted from earlier tokens alone. ``model`` keeps its weights. About 4e-4.
      on_batch: called with (windows done, windows) after each batch.
    Raises ValueError on a text without tokens, on a stride outside the context, on a negative rate.
    """
    if adapt and isinstance(model, Decoder):
        raise ValueError(f"adapt={adapt} trains weights, and those of a decoder are rounded; leave one of the two out")
    length = model.config.max_position_embeddings
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride={stride} lies outside [1, {length}], the model's context")
    if not 0 <= adapt < math.inf:
        raise ValueError(f"adapt={adapt}, but a learning rate is 0 (off) or above, such as 4e-4")
    tokens = np.asarray([tokenizer.bos_id, *tokenizer.encode(text)], np.int32)
    if len(tokens) < 2:
        raise ValueError("the text is empty: there is nothing to score")
    parts = windows(tokens, length, stride)
    count = len(parts[0])
    batch = 1 if adapt else min(batch, count)
    padded = [np.pad(x, ((0, -count % batch), (0, 0))) for x in parts]
    if isinstance(model, Decoder):
        losses = functools.partial(_decoder_losses, model.params, config=model.config, int8_cache=model.int8_cache)
    else:
        graph, params = nnx.split(model)
        losses = functools.partial(_window_losses, graph, params)
    if adapt:
        params = jax.tree.map(jnp.copy, params)  # donated, and the caller's model must live on
        state = _adam(adapt).init(params)
    total = np.float64(0)
    for begin in range(0, len(padded[0]), batch):
        window = [x[begin : begin + batch] for x in padded]
        if adapt:
            loss, params, state = _score_then_learn(graph, adapt, params, state, *window)
        else:
            loss = losses(*window)
        total += float(loss)
        on_batch(min(begin + batch, count), count)
    scored, size = len(tokens) - 1, len(text.encode())
    loss = float(total / scored)
    return Evaluation(scored, size, loss, math.exp(min(loss, 700.0)), float(total / math.log(2) / size))
