"""Loss, perplexity and bits per byte of any text, long or short."""

# Shapes: B rows, S positions, D width, V vocabulary

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mtnlg_jax.decode.cache import Decoder, as_cached
from mtnlg_jax.decode.forward import run_layers
from mtnlg_jax.model.attention import attention
from mtnlg_jax.model.loss import cross_entropy, token_log_probs
from mtnlg_jax.model.transformer import Transformer
from mtnlg_jax.parallel.auto import auto_size, fetch, over_its_mesh, padded_positions
from mtnlg_jax.parallel.mesh import ROWS


@dataclasses.dataclass(frozen=True)
class Evaluation:
    tokens: int
    bytes: int  # of the text in UTF-8
    loss: float  # nats per token
    perplexity: float  # e^loss, per token
    bits_per_byte: float  # independent of the tokenizer, so comparable between models and with xz
    words: int  # separated by white space, so texts without spaces have few
    word_perplexity: float  # e^(nats per word)


NARROWEST = 16  # smallest width of a batch in tokens, so that few widths are compiled


class Window(NamedTuple):
    """A window of a document's tokens.

    It reads [begin, end), predicts [begin + 1, end + 1), and scores from first + 1 on.
    """

    document: int
    begin: int
    end: int
    first: int


def spans(count: int, length: int, stride: int, document: int = 0) -> list[Window]:
    """Return windows of at most ``length`` tokens that score tokens 1 to ``count`` - 1 once each.

    Every window after the first has length - stride tokens of context before the first token that
    it scores.
    """
    found = []
    scored = 0
    begin = 0
    total = count - 1
    while scored < total:
        end = min(begin + length, total)
        found.append(Window(document, begin, end, scored))
        scored = end
        begin = begin + stride
    return found


def widths_of(lengths: Sequence[int], length: int, spare: int) -> list[int]:
    """Return the width of each window's batch: a power of two that holds it, or ``length``.

    The smallest width is NARROWEST. A width that few windows need is left out, because it must be
    compiled: it is used only if it saves at least ``spare`` tokens of padding.
    """
    narrow = [width for width in (1 << power for power in range(20)) if NARROWEST <= width < length]
    ladder = [*narrow, length]
    counts = collections.Counter(
        next(width for width in ladder if width >= each) for each in lengths
    )
    used = [width for width in ladder if counts[width]]
    kept = []
    waiting = 0
    for width, wider in zip(used, [*used[1:], None], strict=True):
        waiting += counts[width]
        if wider is None or waiting * (wider - width) >= spare:
            kept.append(width)
            waiting = 0
    return [next(width for width in kept if width >= each) for each in lengths]


def _arrays(documents: Sequence[np.ndarray], chosen: Sequence[Window], rows: int, width: int):
    """Return inputs, labels and weights, each (rows, width); rows without a window are padding."""
    inputs = np.zeros((rows, width), np.int32)
    labels = np.zeros((rows, width), np.int32)
    weights = np.zeros((rows, width), np.float32)
    for row, window in enumerate(chosen):
        tokens = documents[window.document]
        size = window.end - window.begin
        inputs[row, :size] = tokens[window.begin : window.end]
        labels[row, :size] = tokens[window.begin + 1 : window.end + 1]
        weights[row, window.first - window.begin : size] = 1
    return inputs, labels, weights


@functools.partial(jax.jit, static_argnums=0)
def _window_losses(graph, params, inputs, labels, weights):
    model = nnx.merge(graph, params)
    x_BSD = model.hidden(inputs)
    log_probs = token_log_probs(
        x_BSD.reshape(-1, x_BSD.shape[-1]), model.head(), labels.reshape(-1)
    )
    return -jnp.where(weights > 0, log_probs.reshape(labels.shape), 0.0).sum(1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _score_then_learn(graph, rate, params, state, inputs, labels, weights):
    """Return the loss of one window, and the parameters and Adam's state after a step on it."""

    def loss(params):
        model = nnx.merge(graph, params)
        x_BSD = model.hidden(inputs)
        return cross_entropy(
            x_BSD.reshape(-1, x_BSD.shape[-1]),
            model.head(),
            labels.reshape(-1),
            weights.reshape(-1),
        )

    total, gradients = jax.value_and_grad(loss)(params)
    gradients = jax.tree.map(lambda g: g / weights.sum(), gradients)
    updates, state = _adam(rate).update(gradients, state)
    return total, optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnames=("config", "int8_cache"))
def _decoder_losses(params, inputs, labels, weights, *, config, int8_cache):
    positions_BS = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)

    def attend(_, q, k, v, **options):
        if int8_cache:  # round keys and values as decoding reads them from its cache
            k = as_cached(k)
            v = as_cached(v)
        return attention(q, k, v, impl=config.attention_impl, **options)

    x_BSD, head = run_layers(config, params, inputs, positions_BS, attend)
    log_probs = token_log_probs(x_BSD.reshape(-1, x_BSD.shape[-1]), head, labels.reshape(-1))
    return -jnp.where(weights > 0, log_probs.reshape(labels.shape), 0.0).sum(1)


def _adam(rate):
    # A running mean of gradients would only delay the effect of the last window.
    return optax.adam(rate, b1=0.0)


def evaluate_text(
    model: Transformer | Decoder,
    tokenizer,
    text: str,
    stride: int | None = None,
    batch: int = 8,
    adapt: float = 0.0,
    on_batch=lambda done, total: None,
) -> Evaluation:
    """Evaluate one text as `evaluate_texts` does."""
    return evaluate_texts(model, tokenizer, [text], stride, batch, adapt, on_batch)[0]


@over_its_mesh
def evaluate_texts(
    model: Transformer | Decoder,
    tokenizer,
    texts: Sequence[str],
    stride: int | None = None,
    batch: int = 8,
    adapt: float = 0.0,
    on_batch=lambda done, total: None,
) -> list[Evaluation]:
    """Score every token of each text once, after <bos>, in windows of the model's context.

    Windows of similar lengths, of any text, are scored together and padded to one of a few widths.

    Args:
      model: the trained model, or a Decoder, whose weights and cache may be rounded. A Decoder
        cannot adapt.
      stride: tokens that each window scores, 1 to the context. Default: half the context, so that
        every token has at least half a context before it, except at the beginning.
      batch: number of windows of full length scored at once; more of shorter ones, with the same
        number of tokens in all. With ``adapt``, one window at a time.
      adapt: 0, or the learning rate of dynamic evaluation (Krause 2018, arXiv:1709.07432), such as
        4e-4: after each window is scored, one step of Adam trains on it, so the model adapts to the
        text as a compressor does. Tokens are still predicted from earlier ones only. Each text
        starts from the weights of ``model``, which do not change.
      on_batch: called with (windows done, windows) after each batch.

    Raises:
      ValueError: a text has no tokens, the stride is outside the context, the rate is negative, or
        a loss is not finite.
    """
    if adapt and isinstance(model, Decoder):
        raise ValueError(
            f"adapt={adapt} trains weights, but those of a decoder may be rounded; leave one of "
            "the two out"
        )
    length = model.config.max_position_embeddings
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride={stride} is outside [1, {length}], the model's context")
    if not 0 <= adapt < math.inf:
        raise ValueError(f"adapt={adapt}, but a learning rate is 0 (off) or more, such as 4e-4")
    documents = [
        np.asarray([tokenizer.bos_id, *tokenizer.encode(text)], np.int32) for text in texts
    ]
    for number, tokens in enumerate(documents, 1):
        if len(tokens) < 2:
            which = f"text {number} of {len(texts)}" if len(texts) > 1 else "the text"
            raise ValueError(f"{which} is empty; there is nothing to score")
    todo = [
        window
        for number, tokens in enumerate(documents)
        for window in spans(len(tokens), length, stride, number)
    ]
    widths = widths_of([window.end - window.begin for window in todo], length, batch * length)
    if adapt:
        assert not isinstance(model, Decoder), "refused above"
        score = _adapting(model, adapt, documents)
        # In the order of each text, because each window is trained on after it is scored.
        groups = [([window], 1, width) for window, width in zip(todo, widths, strict=True)]
    else:
        score = _scoring(model, documents)
        groups = _groups(todo, widths, batch * length)
    nats = np.zeros(len(texts), np.float64)
    done = 0
    for chosen, rows, width in groups:
        for window, loss in zip(chosen, score(chosen, rows, width), strict=False):
            nats[window.document] += float(loss)
        done += len(chosen)
        on_batch(done, len(todo))
    results = [
        _evaluation(text, len(tokens) - 1, float(total))
        for text, tokens, total in zip(texts, documents, nats, strict=True)
    ]
    for number, each in enumerate(results, 1):
        if not math.isfinite(each.loss):
            remedy = (
                f"adapt={adapt} is too high a rate; about 4e-4 works"
                if adapt
                else "look for numbers that are not finite in the model's parameters"
            )
            raise ValueError(f"the loss of text {number} of {len(texts)} is {each.loss}; {remedy}")
    return results


def merged(results: Sequence[Evaluation]) -> Evaluation:
    """Merge the evaluations of several texts: means over all their tokens, bytes and words."""
    tokens = sum(each.tokens for each in results)
    return _totals(
        tokens,
        sum(each.bytes for each in results),
        sum(each.words for each in results),
        math.fsum(each.loss * each.tokens for each in results),
    )


def _evaluation(text: str, tokens: int, nats: float) -> Evaluation:
    return _totals(tokens, len(text.encode()), len(text.split()), nats)


def _totals(tokens: int, size: int, words: int, nats: float) -> Evaluation:
    # e^710 overflows a float.
    loss = nats / tokens
    return Evaluation(
        tokens,
        size,
        loss,
        math.exp(min(loss, 700.0)),
        nats / math.log(2) / size,
        words,
        math.exp(min(nats / max(words, 1), 700.0)),
    )


def _groups(todo: Sequence[Window], widths: Sequence[int], most: int):
    """Yield (windows, rows, width) of each batch of at most ``most`` tokens.

    All batches of a width have the same number of rows, so that each width compiles once.
    """
    for width in sorted(set(widths), reverse=True):
        these = [window for window, each in zip(todo, widths, strict=True) if each == width]
        rows = min(max(1, most // width), len(these))
        rows += -rows % math.prod(map(auto_size, ROWS))
        for start in range(0, len(these), rows):
            yield these[start : start + rows], rows, width


def _scoring(model: Transformer | Decoder, documents: Sequence[np.ndarray]):
    if isinstance(model, Decoder):
        losses = functools.partial(
            _decoder_losses, model.params, config=model.config, int8_cache=model.int8_cache
        )
    else:
        losses = functools.partial(_window_losses, *nnx.split(model))

    def score(chosen, rows, width):
        return fetch(losses(*_arrays(documents, chosen, rows, padded_positions(width))))

    return score


def _adapting(model: Transformer, rate: float, documents: Sequence[np.ndarray]):
    graph, trained = nnx.split(model)
    params = state = None

    def score(chosen, rows, width):
        nonlocal params, state
        if chosen[0].begin == 0:  # a new text
            params = jax.tree.map(jnp.copy, trained)  # a copy, because it is donated
            state = _adam(rate).init(params)
        loss, params, state = _score_then_learn(
            graph, rate, params, state, *_arrays(documents, chosen, rows, width)
        )
        return [fetch(loss)]

    return score
