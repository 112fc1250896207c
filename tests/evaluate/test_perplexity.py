import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.cache import prefill, step, to_int8, unstack
from mtnlg_jax.evaluate.perplexity import evaluate_text, windows
from mtnlg_jax.model.transformer import Transformer

TOKENIZER = SimpleNamespace(bos_id=1, encode=lambda text: [3 + byte % 20 for byte in text.encode()])


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=32, max_position_embeddings=16,
                         init_method_std=0.3)
    return Transformer(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("count", [2, 3, 16, 17, 18, 40, 100])
@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_every_token_counts_once_and_has_context(count, stride):
    tokens = np.arange(100, 100 + count)
    inputs, labels, weights = windows(tokens, 16, stride)
    scored = labels[weights > 0]
    assert sorted(scored.tolist()) == list(range(101, 100 + count))
    for row in range(1, len(inputs)):
        first = int(np.argmax(weights[row] > 0))
        assert first >= 16 - stride  # tokens read before the first one that is scored
    assert (labels[weights > 0] == inputs[weights > 0] + 1).all()


def test_a_short_text_equals_the_full_logits(model):
    text = "a short one"
    result = evaluate_text(model, TOKENIZER, text)
    ids = np.array([[1, *TOKENIZER.encode(text)]], np.int32)
    log_probs = jax.nn.log_softmax(model(ids[:, :-1]))[0]
    nats = -sum(float(log_probs[i, t]) for i, t in enumerate(ids[0, 1:]))
    assert (result.tokens, result.bytes) == (11, 11)
    assert result.loss == pytest.approx(nats / 11, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / 11), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 11, rel=1e-5)


def test_a_long_text_by_longhand_windows(model):
    text = "0123456789" * 5
    ids = np.array([1, *TOKENIZER.encode(text)], np.int32)
    nats, scored, begin = 0.0, 0, 0
    while scored < len(ids) - 1:
        end = min(begin + 16, len(ids) - 1)
        log_probs = jax.nn.log_softmax(model(ids[None, begin:end]))[0]
        nats -= sum(float(log_probs[i - begin, ids[i + 1]]) for i in range(scored, end))
        scored, begin = end, begin + 6
    assert evaluate_text(model, TOKENIZER, text, stride=6).loss == pytest.approx(nats / len(text), rel=1e-5)


def test_adapting_learns_a_window_after_it_is_scored(model):
    text, rate = "0123456789" * 2, 0.01
    ids = np.array([1, *TOKENIZER.encode(text)], np.int32)
    graph, params = nnx.split(model)

    def nats(params, begin, end, first):
        log_probs = jax.nn.log_softmax(nnx.merge(graph, params)(ids[None, begin:end]))[0]
        return -sum(log_probs[i - begin, ids[i + 1]] for i in range(first, end))

    first, gradient = jax.value_and_grad(nats)(params, 0, 16, 0)
    # Adam's first step: a gradient g moves by rate x g / (|g| + 1e-8), here of the mean over 16 tokens.
    after = jax.tree.map(lambda p, g: p - rate * (g / 16) / (abs(g / 16) + 1e-8), params, gradient)
    want = first + nats(after, 8, 20, 16)
    result = evaluate_text(model, TOKENIZER, text, adapt=rate)
    assert result.loss == pytest.approx(float(want) / 20, rel=1e-5)
    assert abs(result.loss - evaluate_text(model, TOKENIZER, text).loss) > 1e-2


def test_adapting_cheats_nowhere_and_leaves_the_model(model):
    before = evaluate_text(model, TOKENIZER, "one window long")
    assert evaluate_text(model, TOKENIZER, "one window long", adapt=0.1).loss == pytest.approx(before.loss, rel=1e-6)
    repeated = "0123456789" * 30
    static = evaluate_text(model, TOKENIZER, repeated)
    assert evaluate_text(model, TOKENIZER, repeated, adapt=0.01).loss < 0.5 * static.loss
    assert evaluate_text(model, TOKENIZER, repeated) == static


def test_a_decoder_scores_as_it_decodes(model):
    config, params = model.config, nnx.split(model)[1]
    exact = evaluate_text(model, TOKENIZER, "0123456789" * 3).loss
    assert evaluate_text(unstack(config, params), TOKENIZER, "0123456789" * 3).loss == pytest.approx(exact, rel=1e-5)
    for held in ({"weights": "int8"}, {"cache": "int8"}, {"dtype": "bfloat16"}):
        near = evaluate_text(unstack(config, params, **held), TOKENIZER, "0123456789" * 3).loss
        assert 1e-5 < abs(near - exact) < 0.05 * exact, held


def test_the_loss_of_an_int8_cache_is_that_of_the_tokens_read_one_by_one(model):
    decoder = unstack(model.config, nnx.split(model)[1], cache="int8")
    tokens = [1, *TOKENIZER.encode("a short one")]
    cache, nats = to_int8(prefill(decoder, [[1]], 16).cache), 0.0
    for place in range(len(tokens) - 1):
        read, at = np.array([tokens[place]]), np.array([place])
        logits, cache = step(model.config, decoder.params, cache, read, at)
        nats -= float(jax.nn.log_softmax(logits[0])[tokens[place + 1]])
    assert evaluate_text(decoder, TOKENIZER, "a short one").loss == pytest.approx(nats / 11, rel=1e-5)


def test_bytes_are_utf8(model):
    result = evaluate_text(model, TOKENIZER, "中文")
    assert result.bytes == 6


def test_bad_input(model):
    with pytest.raises(ValueError, match="empty"):
        evaluate_text(model, TOKENIZER, "")
    with pytest.raises(ValueError, match=r"stride=17.*16"):
        evaluate_text(model, TOKENIZER, "text", stride=17)
    for rate in (-1e-3, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"adapt={rate}.*4e-4"):
            evaluate_text(model, TOKENIZER, "text", adapt=rate)
