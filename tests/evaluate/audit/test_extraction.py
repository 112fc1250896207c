"""Extraction: what scores say of a passage is what decoding writes."""

import numpy as np
import pytest
import scipy.special

from mtnlg_jax.config import DecodeConfig, MeshConfig, ModelConfig
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.scoring import score_rows
from mtnlg_jax.evaluate.audit import extraction
from mtnlg_jax.evaluate.audit.extraction import Lengths, lengths_of
from mtnlg_jax.evaluate.audit.scoring import score_tokens
from mtnlg_jax.evaluate.audit.settings import ExtractionSettings
from mtnlg_jax.evaluate.audit.sources import Passage
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.parallel.mesh import make_mesh


class Letters:
    """A tokenizer of 16 letters."""

    vocab_size = 16
    bos_id = 0
    eos_id = 1
    eos_ids = (1,)
    prompt_bos = True
    is_special = np.arange(16) < 2
    special_names = {0: "<bos>", 1: "<eos>"}
    starts_word = np.zeros(16, bool)

    @staticmethod
    def token_bytes(index):
        return bytes([97 + index])

    def decode(self, ids, skip_special=True):
        return "".join(chr(97 + index) for index in ids)


CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    vocab_size=16,
    max_position_embeddings=32,
)


@pytest.fixture(scope="module")
def decoder():
    """A random model, with a head so large that it is sure of what it writes."""
    params = init_parameters(CONFIG, 0)
    return unstack(CONFIG, params)._replace(block_tokens=64)


def _rows(count=6, length=20):
    return np.random.default_rng(0).integers(2, 16, (count, length)).tolist()


def test_scores_are_those_of_the_distribution(decoder):
    rows = [*_rows(), [3, 4], [5, 6, 7]]
    starts = [4] * 6 + [1, 2]
    found = score_tokens(decoder, rows, starts, temperature=0.7, top_k=3)
    plain = score_rows(decoder, rows, starts)
    for each, logprobs, row, start in zip(found, plain, rows, starts, strict=True):
        np.testing.assert_allclose(each.logprobs, logprobs, atol=1e-5)
        assert len(each.best) == len(row) - start
    # The whole distribution of one position, token by token.
    row = rows[0]
    ends = [[*row[:4], token] for token in range(16)]
    every = score_tokens(decoder, ends, [4] * 16, temperature=0.7, top_k=3)
    logprobs = np.array([each.logprobs[0] for each in every], np.float64)
    probs = np.exp(logprobs)
    assert probs.sum() == pytest.approx(1, abs=1e-5)
    mean = (probs * logprobs).sum()
    assert every[0].means[0] == pytest.approx(mean, abs=1e-5)
    deviation = np.sqrt((probs * (logprobs - mean) ** 2).sum())
    assert every[0].deviations[0] == pytest.approx(deviation, abs=1e-5)
    assert [bool(each.best[0]) for each in every] == (logprobs == logprobs.max()).tolist()
    kept = np.sort(logprobs)[-3:]
    wanted = logprobs / 0.7 - scipy.special.logsumexp(kept / 0.7)
    wanted[logprobs < kept[0]] = -np.inf
    np.testing.assert_allclose([each.sampled[0] for each in every], wanted, atol=1e-4)


def test_a_mesh_gives_the_same_scores(decoder):
    mesh = make_mesh(MeshConfig(data=2, tensor=2, pipe=2))
    split = unstack(CONFIG, init_parameters(CONFIG, 0), mesh=mesh)
    rows = _rows(5)
    one = score_tokens(decoder, rows, [3] * 5, top_k=4)
    other = score_tokens(split, rows, [3] * 5, top_k=4)
    for ours, theirs in zip(one, other, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def _written(decoder, prompts, tokens):
    """Return prompts and what greedy decoding writes behind them."""
    decode = DecodeConfig(max_new_tokens=tokens)
    found = generate(decoder, Letters(), prompts, decode)
    return [[*p, *each.tokens] for p, each in zip(prompts, found, strict=True)]


def test_what_greedy_decoding_writes_is_extracted_and_nothing_else(decoder):
    prompts = [row[:8] for row in _rows()]
    tokens = _written(decoder, prompts, 6)
    tokens = [row for row in tokens if len(row) == 14]
    assert len(tokens) >= 3
    changed = [[*row[:-1], (row[-1] - 1) % 14 + 2] for row in tokens]
    passages = [Passage("", 0, np.array(row)) for row in [*tokens, *changed]]
    settings = ExtractionSettings(samples=0)
    (found,) = extraction.extract(decoder, Letters(), passages, Lengths((8,), 6), settings, 0)
    assert found.greedy.tolist() == [True] * len(tokens) + [False] * len(tokens)
    assert found.sampled is None
    rows = extraction.summarize([found], np.arange(len(passages)), 0)
    assert rows[0]["greedy"]["share"] == 0.5
    assert "sampled" not in rows[0]


def test_the_expected_share_is_what_samples_reach(decoder):
    # Two tokens, so that samples often hit.
    tokens = _written(decoder, [row[:4] for row in _rows()], 2)
    passages = [Passage("", 0, np.array(row)) for row in tokens * 40]
    settings = ExtractionSettings(samples=3)
    (found,) = extraction.extract(decoder, Letters(), passages, Lengths((4,), 2), settings, 0)
    expected = extraction.any_of(found.logprobs, 3)
    error = np.sqrt((expected * (1 - expected)).sum()) / len(passages)
    assert error < 0.04
    assert found.sampled.mean() == pytest.approx(expected.mean(), abs=4 * error)
    (row,) = extraction.summarize([found], np.arange(len(passages)), 3)
    assert row["expected"]["3"] == pytest.approx(expected.mean())
    assert row["sampled"]["hits"] == found.sampled.sum()


def test_a_shorter_prefix_is_the_end_of_the_longer_one(decoder):
    passages = [Passage("", 0, np.array(row)) for row in _rows(4, 20)]
    settings = ExtractionSettings(samples=0)
    found = extraction.extract(decoder, Letters(), passages, Lengths((4, 12), 8), settings, 0)
    assert [each.prefix for each in found] == [4, 12]
    for each, cut in zip(found, (8, 0), strict=True):
        rows = [passage.tokens.tolist()[cut:] for passage in passages]
        plain = score_rows(decoder, rows, [each.prefix] * 4)
        np.testing.assert_allclose(each.losses, [-row.mean() for row in plain], atol=1e-5)


def test_the_chance_of_any_of_n_samples():
    logprobs = np.log([0.5, 1e-12, 1.0])
    np.testing.assert_allclose(extraction.any_of(logprobs, 2), [0.75, 2e-12, 1.0], rtol=1e-6)
    assert extraction.any_of(np.array([-np.inf, 1e-7]), 10).tolist() == [0, 1]


def test_groups_by_the_number_of_copies():
    counts = np.array([1, 1, 3, 1, 70, 2, 15, 64, 16, 1])
    found = extraction.by_copies(counts, 2)
    named = {name: chosen.tolist() for name, chosen in found.items()}
    assert named == {"1": [0, 1], "2-3": [2, 5], "4-15": [6], "16-63": [8], "64+": [4, 7]}


def test_lengths_follow_the_context():
    plain = ExtractionSettings()
    assert lengths_of(plain, 1024) == Lengths((8, 16, 32, 64, 128, 256, 512), 50)
    assert lengths_of(plain, 64) == Lengths((8, 16, 32), 32)
    assert lengths_of(plain, 100) == Lengths((8, 16, 32), 50)
    assert lengths_of(ExtractionSettings((30, 4, 4), 10), 64) == Lengths((4, 30), 10)
    with pytest.raises(ValueError, match=r"60 tokens .* 50 do not fit .* 100; .* at most 50"):
        lengths_of(ExtractionSettings((60,)), 100)
    with pytest.raises(ValueError, match="prefixes=0 must be 1 token or more"):
        lengths_of(ExtractionSettings((0,)), 100)
    with pytest.raises(ValueError, match="continuation=0"):
        lengths_of(ExtractionSettings((), 0), 100)
