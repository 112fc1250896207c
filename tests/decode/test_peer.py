"""Compare tokens with those of Hugging Face's generate and logits processors for the same
weights."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import make_fixtures as made
import numpy as np
import peer
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode import processors
from mtnlg_jax.decode.batched_settings import batch_settings
from mtnlg_jax.decode.generate import generate

ROUNDING = 1e-5
MODELS = range(len(made.MODELS))


def _generate(number, prompts, settings):
    """Return results for every setting and prompt, in one batch."""
    configs = [
        DecodeConfig(max_new_tokens=made.NEW, num_return_sequences=each.get("num_beams", 1), **each)
        for each in settings
    ]
    return generate(
        peer.decoder(number),
        peer.Letters(),
        prompts * len(configs),
        [config for config in configs for _ in prompts],
    )


def _compare(results, tokens, scores=None, ends=None):
    """Compare with ``tokens`` (settings, rows, NEW) of Hugging Face; ``ends`` are those of each
    setting."""
    ends = [(made.END,)] * len(tokens) if ends is None else ends
    expected = [
        (peer.cut(row, end), set(row.tolist()) & set(end))
        for rows, end in zip(tokens, ends, strict=True)
        for row in rows
    ]
    assert [result.tokens for result in results] == [written for written, _ in expected]
    assert [result.finish_reason for result in results] == [
        "stop" if ended else "length" for _, ended in expected
    ]
    if scores is not None:
        np.testing.assert_allclose(
            [result.score for result in results], scores.reshape(-1), atol=3e-4, rtol=ROUNDING
        )


def test_greedy_tokens_of_a_ragged_batch_equal_hugging_face():
    for number in MODELS:
        results = _generate(number, made.prompts(made.PROMPTS), [{}])
        _compare(results, peer.fixtures()[f"{number}/greedy"][None])


@pytest.mark.parametrize(
    "beams",
    [
        pytest.param(beams, marks=pytest.mark.slow if beams != max(made.BEAMS) else [])
        for beams in made.BEAMS
    ],
)
def test_beams_and_scores_equal_hugging_face_for_all_settings(beams):
    """Length penalties and early stopping differ within the batch, as do the lengths of prompts."""
    settings = [
        {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
        for penalty in made.LENGTH_PENALTIES
        for early in made.EARLY
    ]
    for number in MODELS:
        results = _generate(number, made.prompts(made.PROMPTS), settings)
        tokens = peer.fixtures()[f"{number}/beams_{beams}"]
        _compare(results, tokens, peer.fixtures()[f"{number}/scores_{beams}"])
        for result in results:
            assert result.score == pytest.approx(result.score) and len(result.logprobs) == len(
                result.tokens
            )


def test_fixtures_cover_early_and_different_beams():
    """If no beam ended early, or all beams were equal, half of the search would not be tested."""
    for beams in made.BEAMS:
        tokens = np.stack([peer.fixtures()[f"{number}/beams_{beams}"] for number in MODELS])
        ended = (tokens == made.END).any(-1)
        assert 0.4 < ended.mean() < 0.9
        # Each length penalty and each value of early stopping changes the result.
        by_setting = tokens.reshape(len(MODELS), len(made.LENGTH_PENALTIES), len(made.EARLY), -1)
        for axis in (1, 2):
            parts = np.moveaxis(by_setting, axis, 0)
            assert len({part.tobytes() for part in parts}) == len(parts)
    settings = np.stack([peer.fixtures()[f"{number}/greedy_settings"] for number in MODELS])
    assert len({each.tobytes() for each in settings.swapaxes(0, 1)}) == len(made.GREEDY_SETTINGS)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("greedy_settings", made.GREEDY_SETTINGS), ("beam_settings", made.BEAM_SETTINGS)],
)
def test_processors_in_generation_equal_hugging_face(name, settings):
    ends = [each.get("eos_token_id", [made.END]) for each in settings]
    for number in MODELS:
        results = _generate(number, made.prompts((6, 6, 6)), settings)
        scores = peer.fixtures()[f"{number}/{name}_scores"] if "beam" in name else None
        _compare(results, peer.fixtures()[f"{number}/{name}"], scores, ends)


@pytest.mark.parametrize("number", range(len(made.PROCESSORS)))
def test_processors_on_random_logits_equal_hugging_face(number):
    logits, ids = made.logits_and_ids()
    config = DecodeConfig(**{"temperature": 1.0} | made.settings_of(made.PROCESSORS[number]))
    length = ids.shape[1]
    vocabulary = logits.shape[1]
    settings = batch_settings([config] * len(ids), np.ones(vocabulary, bool), (vocabulary - 1,))
    padded = np.pad(ids, ((0, 0), (0, 3)), constant_values=7)
    lengths = np.full(len(ids), length)
    processed = processors.process(
        jnp.asarray(logits), settings, padded, lengths, lengths - 5, lengths + 3
    )
    ours = np.asarray(processors.warp(processed, settings))
    theirs = peer.fixtures()[f"processor_{number}"]
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=ROUNDING)
    assert (theirs != logits).any() or "99" in str(made.PROCESSORS[number]), (
        "the setting should do something"
    )


@pytest.mark.slow
def test_the_installed_transformers_has_the_same_results(tmp_path):
    """PEER_PYTHON names a Python with torch and transformers. Default: this one."""
    python = os.environ.get("PEER_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip(f"{python} has no torch and transformers; name one that has in PEER_PYTHON")
    output = tmp_path / "transformers.npz"
    subprocess.run(
        [python, Path(made.__file__), f"--output={output}"], check=True, capture_output=True
    )
    with np.load(output) as file:
        fresh = dict(file)
    committed = peer.fixtures()
    assert fresh.keys() == committed.keys()
    for name in fresh.keys() - {"versions"}:
        if fresh[name].dtype.kind == "f":
            np.testing.assert_allclose(
                fresh[name], committed[name], atol=3e-4, rtol=ROUNDING, err_msg=name
            )
        else:
            np.testing.assert_array_equal(fresh[name], committed[name], err_msg=name)
