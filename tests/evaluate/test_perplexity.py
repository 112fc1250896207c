import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.cache import prefill, step, to_int8, unstack
from mtnlg_jax.evaluate import perplexity
from mtnlg_jax.evaluate.perplexity import (
    Evaluation,
    evaluate_text,
    evaluate_texts,
    merged,
    spans,
    widths_of,
)
from mtnlg_jax.evaluate.run_score import RunScore, as_json, describe
from mtnlg_jax.model.transformer import Transformer

TOKENIZER = SimpleNamespace(bos_id=1, encode=lambda text: [3 + byte % 20 for byte in text.encode()])


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        vocab_size=32,
        max_position_embeddings=16,
        init_method_std=0.3,
    )
    return Transformer(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("count", [2, 3, 16, 17, 18, 40, 100])
@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_windows_score_every_token_once_with_context(count, stride):
    found = spans(count, 16, stride)
    scored = [position for window in found for position in range(window.first + 1, window.end + 1)]
    assert scored == list(range(1, count))
    for window in found[1:]:
        assert (
            window.first - window.begin >= 16 - stride
        )  # tokens read before the first one that is scored
    assert all(1 <= window.end - window.begin <= 16 for window in found)


@pytest.fixture(scope="module")
def long():
    config = ModelConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        vocab_size=32,
        max_position_embeddings=64,
        init_method_std=0.3,
    )
    return Transformer(config, rngs=nnx.Rngs(1))


TEXTS = [
    "x" * size + "yz" for size in (1, 3, 14, 15, 16, 30, 31, 40, 61, 62, 63, 64, 65, 100, 200)
] + ["short"] * 90


@pytest.mark.parametrize("adapt", [0.0, pytest.param(0.01, marks=pytest.mark.slow)])
def test_texts_scored_together_score_as_they_do_alone(long, adapt):
    texts = TEXTS if not adapt else TEXTS[::8]
    done = []
    together = evaluate_texts(
        long, TOKENIZER, texts, adapt=adapt, on_batch=lambda *counts: done.append(counts)
    )
    known = {}
    for text, result in zip(texts, together, strict=True):
        if text not in known:
            known[text] = evaluate_text(long, TOKENIZER, text, batch=1, adapt=adapt)
        alone = known[text]
        assert (result.tokens, result.bytes, result.words) == (
            alone.tokens,
            alone.bytes,
            alone.words,
        )
        assert result.loss == pytest.approx(alone.loss, rel=1e-5)
    assert done[-1] == (done[-1][1], done[-1][1]) and done == sorted(done)


def test_widths_hold_their_windows_and_are_few():
    rng = np.random.default_rng(0)
    for _ in range(100):
        length = int(rng.choice([16, 100, 256, 1000]))
        lengths = rng.integers(1, length + 1, rng.integers(1, 300)).tolist()
        widths = widths_of(lengths, length, 8 * length)
        assert all(each <= width <= length for each, width in zip(lengths, widths, strict=True))
        assert len(set(widths)) <= 8
    assert widths_of([10] * 400 + [1024] * 3, 1024, 8192) == [16] * 400 + [1024] * 3
    assert widths_of([10] * 4 + [1024] * 3, 1024, 8192) == [1024] * 7, (
        "not worth a program of their own"
    )
    assert widths_of([10], 1024, 8192) == [16] and widths_of([600, 1000], 1000, 8000) == [1000] * 2


def test_a_short_text_is_padded_to_a_small_width(long, monkeypatch):
    seen = []
    arrays = perplexity._arrays
    monkeypatch.setattr(perplexity, "_arrays", lambda *args: seen.append(args[2:]) or arrays(*args))
    evaluate_texts(long, TOKENIZER, ["short"] * 300 + ["x" * 63])
    assert sum(rows * width for rows, width in seen) < 0.45 * 301 * 64


def test_word_perplexity_and_merged_evaluations(long):
    one, two = evaluate_texts(long, TOKENIZER, ["a few words", "中文没有空格"])
    assert (one.words, two.words) == (3, 1)
    assert one.word_perplexity == pytest.approx(math.exp(one.loss * one.tokens / 3))
    both = merged([one, two])
    nats = one.loss * one.tokens + two.loss * two.tokens
    assert (
        both.loss == pytest.approx(nats / (one.tokens + two.tokens))
        and both.bytes == one.bytes + two.bytes
    )
    assert both.bits_per_byte == pytest.approx(nats / math.log(2) / both.bytes)
    assert json.loads(json.dumps(dataclasses.asdict(both), allow_nan=False))["words"] == 4


def test_a_loss_that_is_not_finite_raises_an_error(long):
    graph, params = nnx.split(long)
    broken = nnx.merge(graph, jax.tree.map(lambda x: x * np.nan, params))
    with pytest.raises(
        ValueError, match="the loss of text 1 of 2 is nan; look for numbers that are not finite"
    ):
        evaluate_texts(broken, TOKENIZER, ["a", "b"])
    with pytest.raises(ValueError, match=r"adapt=1e\+30 is too high a rate; about 4e-4 works"):
        evaluate_text(long, TOKENIZER, "x" * 200, adapt=1e30)


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


def test_a_long_text_equals_a_direct_computation_by_windows(model):
    text = "0123456789" * 5
    ids = np.array([1, *TOKENIZER.encode(text)], np.int32)
    nats = 0.0
    scored = 0
    begin = 0
    while scored < len(ids) - 1:
        end = min(begin + 16, len(ids) - 1)
        log_probs = jax.nn.log_softmax(model(ids[None, begin:end]))[0]
        nats -= sum(float(log_probs[i - begin, ids[i + 1]]) for i in range(scored, end))
        scored = end
        begin = begin + 6
    assert evaluate_text(model, TOKENIZER, text, stride=6).loss == pytest.approx(
        nats / len(text), rel=1e-5
    )


@pytest.mark.slow
def test_adapting_trains_on_a_window_after_scoring_it(model):
    text = "0123456789" * 2
    rate = 0.01
    ids = np.array([1, *TOKENIZER.encode(text)], np.int32)
    graph, params = nnx.split(model)

    def nats(params, begin, end, first):
        log_probs = jax.nn.log_softmax(nnx.merge(graph, params)(ids[None, begin:end]))[0]
        return -sum(log_probs[i - begin, ids[i + 1]] for i in range(first, end))

    first, gradient = jax.value_and_grad(nats)(params, 0, 16, 0)
    # Adam's first step: a gradient g moves by rate x g / (|g| + 1e-8), here of the mean over 16
    # tokens.
    after = jax.tree.map(lambda p, g: p - rate * (g / 16) / (abs(g / 16) + 1e-8), params, gradient)
    want = first + nats(after, 8, 20, 16)
    result = evaluate_text(model, TOKENIZER, text, adapt=rate)
    assert result.loss == pytest.approx(float(want) / 20, rel=1e-5)
    assert abs(result.loss - evaluate_text(model, TOKENIZER, text).loss) > 1e-2


def test_adapting_sees_no_later_token_and_keeps_the_model(model):
    before = evaluate_text(model, TOKENIZER, "one window long")
    assert evaluate_text(model, TOKENIZER, "one window long", adapt=0.1).loss == pytest.approx(
        before.loss, rel=1e-6
    )
    repeated = "0123456789" * 30
    static = evaluate_text(model, TOKENIZER, repeated)
    assert evaluate_text(model, TOKENIZER, repeated, adapt=0.01).loss < 0.5 * static.loss
    assert evaluate_text(model, TOKENIZER, repeated) == static


def test_a_decoder_scores_texts_as_it_decodes(model):
    config = model.config
    params = nnx.split(model)[1]
    exact = evaluate_text(model, TOKENIZER, "0123456789" * 3).loss
    assert evaluate_text(
        unstack(config, params), TOKENIZER, "0123456789" * 3
    ).loss == pytest.approx(exact, rel=1e-5)
    for held in ({"weights": "int8"}, {"cache": "int8"}, {"dtype": "bfloat16"}):
        near = evaluate_text(unstack(config, params, **held), TOKENIZER, "0123456789" * 3).loss
        assert 1e-5 < abs(near - exact) < 0.05 * exact, held


@pytest.mark.slow
def test_the_loss_with_an_int8_cache_equals_decoding_token_by_token(model):
    decoder = unstack(model.config, nnx.split(model)[1], cache="int8")
    tokens = [1, *TOKENIZER.encode("a short one")]
    cache = to_int8(prefill(decoder, [[1]], 16).cache)
    nats = 0.0
    for place in range(len(tokens) - 1):
        read = np.array([tokens[place]])
        at = np.array([place])
        logits, cache = step(model.config, decoder.params, cache, read, at)
        nats -= float(jax.nn.log_softmax(logits[0])[tokens[place + 1]])
    assert evaluate_text(decoder, TOKENIZER, "a short one").loss == pytest.approx(
        nats / 11, rel=1e-5
    )


def test_bytes_are_those_of_utf8(model):
    result = evaluate_text(model, TOKENIZER, "中文")
    assert result.bytes == 6


def test_invalid_arguments_raise_an_error(model):
    with pytest.raises(ValueError, match="empty"):
        evaluate_text(model, TOKENIZER, "")
    with pytest.raises(ValueError, match="text 2 of 2 is empty"):
        evaluate_texts(model, TOKENIZER, ["a", ""])
    with pytest.raises(ValueError, match=r"stride=17.*16"):
        evaluate_text(model, TOKENIZER, "text", stride=17)
    for rate in (-1e-3, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"adapt={rate}.*4e-4"):
            evaluate_text(model, TOKENIZER, "text", adapt=rate)


def test_what_a_tokenizer_loses_is_said_beside_bits_per_byte():
    total = Evaluation(10, 20, 1.0, 2.7, 0.7, 5, 7.4)
    exact = RunScore(total, None, {}, 1, 3, 0.0)
    assert "lossless" not in describe("x", exact) and "tokenizer_losses" not in as_json(exact, {})
    lossy = exact._replace(losses=("case", "accents"))
    assert "a text loses case, accents, so bits per byte do not compare" in describe("x", lossy)
    assert as_json(lossy, {})["tokenizer_losses"] == ["case", "accents"]
