"""Mirostat 2.0 beside its definition written as a loop; test_batch.py has it in a running batch."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig, MeshConfig
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.parallel.mesh import make_mesh

PROMPTS = ["The cat", "In the town where", "天地"]
# The best token of these models has a surprise of about 5 bits.
STEERED = DecodeConfig(
    temperature=1.0, mirostat_tau=6.0, mirostat_eta=0.5, max_new_tokens=30, min_new_tokens=30
)


def _surprise(learned, tokenizer, known, new, config):
    """Return the surprise of every id as the next token, in bits; ``new`` tokens are written."""
    logits = learned.logits([known])[0, -1].astype(np.float64)
    never = np.ones(len(logits), bool)
    never[: tokenizer.vocab_size] = tokenizer.is_special
    logits[never] = -np.inf
    logits[tokenizer.eos_id] = -np.inf  # min_new_tokens
    for token in set(new):
        logits[token] -= config.presence_penalty
    logits /= config.temperature
    return -(logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())) / math.log(2)


@pytest.mark.parametrize(
    "more", [{}, {"temperature": 1.7, "presence_penalty": 0.5, "mirostat_eta": 0.2}]
)
def test_every_draw_obeys_the_limit_of_the_definition(learned, tokenizer, more):
    config = dataclasses.replace(STEERED, **more)
    cut = 0
    for result in generate(learned.decoder, tokenizer, PROMPTS, config):
        known = [tokenizer.bos_id, *tokenizer.encode(PROMPTS[result.prompt])]
        mu = 2 * config.mirostat_tau
        written = []
        for token in result.tokens:
            bits = _surprise(learned, tokenizer, [*known, *written], written, config)
            assert bits[token] <= mu + 1e-3 or token == bits.argmin()
            cut += (bits > mu).sum()
            mu -= config.mirostat_eta * (bits[token] - config.mirostat_tau)
            written.append(token)
    assert cut > 1000


def test_the_limit_decides_what_is_drawn(learned, tokenizer):
    """A limit that nothing passes leaves the best token; one that all pass leaves plain draws."""
    narrow = dataclasses.replace(STEERED, mirostat_tau=1e-6, mirostat_eta=1e-9)
    greedy = DecodeConfig(max_new_tokens=30, min_new_tokens=30)
    wide = dataclasses.replace(STEERED, mirostat_tau=1000.0)
    plain = dataclasses.replace(STEERED, mirostat_tau=0.0, mirostat_eta=0.1)
    found = [
        [each.tokens for each in generate(learned.decoder, tokenizer, PROMPTS, config)]
        for config in (narrow, greedy, wide, plain, STEERED)
    ]
    assert found[0] == found[1] != found[4]
    assert found[2] == found[3] != found[4]


def test_the_mean_surprise_comes_near_the_target(learned, tokenizer):
    means = []
    for tau in (6.0, 7.0):
        long = {"max_new_tokens": 55, "min_new_tokens": 55, "num_return_sequences": 8}
        config = dataclasses.replace(STEERED, mirostat_tau=tau, **long)
        results = generate(learned.decoder, tokenizer, ["The cat"], config)
        # Nothing is forbidden but the end and control tokens, so the model's own number is near.
        means.append(-np.mean([each.logprobs for each in results]) / math.log(2))
    np.testing.assert_allclose(means, [6.0, 7.0], atol=0.4)


CONFIGS = [
    STEERED,
    dataclasses.replace(STEERED, mirostat_tau=7.0, seed=3, dry_multiplier=1.0),
    DecodeConfig(max_new_tokens=30, temperature=1.0, top_p=0.8),
    DecodeConfig(max_new_tokens=30),
]


def _tokens(decoder, tokenizer, configs):
    results = generate(decoder, tokenizer, ["The cat"] * len(configs), configs)
    return [result.tokens for result in results]


def test_rows_do_not_depend_on_their_batch(learned, tokenizer):
    together = _tokens(learned.decoder, tokenizer, CONFIGS)
    assert _tokens(learned.decoder, tokenizer, CONFIGS[::-1]) == together[::-1]
    assert _tokens(learned.decoder, tokenizer, CONFIGS[:1]) == together[:1]
    assert len(set(together)) == len(CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"pipe": 2}], ids="-".join)
def test_over_a_mesh_equals_one_device(learned, tokenizer, axes):
    devices = jax.devices()[: math.prod(axes.values())]
    mesh = make_mesh(MeshConfig(**{"data": 1} | axes), devices)
    split = unstack(learned.config, learned.params, mesh=mesh)
    expected = _tokens(learned.decoder, tokenizer, CONFIGS)
    assert _tokens(split, tokenizer, CONFIGS) == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": 0.0, "mirostat_eta": 0.1}, "mirostat_tau=6.0"),
        ({"mirostat_tau": 0.0}, "mirostat_eta=0.5"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(learned, tokenizer, settings, named):
    with pytest.raises(ValueError, match=f"{named}.*set"):
        generate(learned.decoder, tokenizer, ["a"], dataclasses.replace(STEERED, **settings))
    with pytest.raises(ValueError, match="mirostat_tau=6.0 .* draft model"):
        generate(learned.decoder, tokenizer, ["a"], STEERED, draft=learned.decoder)
