"""Loss by position and features of windows against the whole model read directly."""

import chain
import jax
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.evaluate.figures import TooShort
from mtnlg_jax.evaluate.windows import cut_windows, loss_by_position, window_features
from mtnlg_jax.model.transformer import Transformer


@pytest.fixture(scope="module")
def model():
    config = chain.trained().config
    return nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(3)))()


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 290, length).tolist() for length in (150, 20, 70)]


def test_windows_do_not_overlap_and_are_spread():
    texts = [list(range(25)), list(range(100, 109)), list(range(200, 230))]
    assert cut_windows(texts, 10, 99) == [
        *(list(range(start, start + 10)) for start in (0, 10)),
        *(list(range(start, start + 10)) for start in (200, 210, 220)),
    ]
    assert [each[0] for each in cut_windows(texts, 5, 4)] == [0, 15, 200, 215]
    assert cut_windows(texts, 31, 4) == []


def test_the_loss_by_position_equals_the_whole_model(model, tokens):
    decoder = unstack(model.config, nnx.split(model)[1])
    found = loss_by_position(decoder, 1, tokens, buckets=7)
    windows = [tokens[0][:63], tokens[0][63:126], tokens[2][:63]]
    rows = np.array([[1, *each] for each in windows])
    log_probs = jax.nn.log_softmax(model(rows))
    losses = -np.array(
        [[log_probs[row, i, rows[row, i + 1]] for i in range(63)] for row in range(3)]
    )
    assert [(each.first, each.last) for each in found] == [
        (start + 1, start + 9) for start in range(0, 63, 9)
    ]
    for each in found:
        part = losses[:, each.first - 1 : each.last]
        assert each.loss == pytest.approx(part.mean(), rel=1e-5)
        assert each.error == pytest.approx(part.mean(1).std(ddof=1) / 3**0.5, rel=1e-4)


def test_where_no_text_fills_the_context_the_longest_counts(model, tokens):
    decoder = unstack(model.config, nnx.split(model)[1])
    found = loss_by_position(decoder, 1, [tokens[1], tokens[2][:40]], buckets=4)
    assert found[-1].last == 40 and found[0].error is None, "one window"
    with pytest.raises(TooShort, match="needs a text of 32 tokens, and the longest has 20"):
        loss_by_position(decoder, 1, tokens[1:2])


def test_features_are_mean_hidden_states(model, tokens):
    decoder = unstack(model.config, nnx.split(model)[1])
    found = window_features(decoder, 1, tokens, length=20)
    windows = cut_windows(tokens, 20, 512)
    assert found.shape == (len(windows), 32) and len(windows) == 11
    rows = np.array([[1, *each] for each in windows])
    want = np.asarray(model.hidden(rows))[:, 1:].mean(1)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
