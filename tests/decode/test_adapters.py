"""Check rows with adapters of their own: equal to one by one, and to the merged model."""

import dataclasses

import jax
import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig, MeshConfig
from mtnlg_jax.decode import adapters as stacking
from mtnlg_jax.decode.best import score_best
from mtnlg_jax.decode.cache import capacity, prefill, unstack
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.infill import fill
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.decode.scoring import score_masked, score_rows
from mtnlg_jax.evaluate.perplexity import evaluate_text
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import lora
from mtnlg_jax.train.adapter_file import Adapter, adapter_config

PROMPTS = [[40], [50, 60, 70, 50, 60], list(range(30, 51)), [44, 45]]
NAMES = ["one", "two", None, "two"]
EVERY = ("q", "k", "v", "o", "in", "gate", "out")
SETTINGS = DecodeConfig(max_new_tokens=12, min_new_tokens=12)


def adapter_of(model, seed, rank, targets=EVERY, size=0.15):
    """Return an adapter with factors that change what the model writes."""
    config = adapter_config(model, rank, 2.0 * rank, targets)
    rng = np.random.default_rng(seed)
    factors = {
        name: rng.normal(0, size, leaf.shape).astype(np.float32)
        for name, leaf in lora.abstract_adapters(config)["blocks"].items()
    }
    return Adapter(config, factors, {}, {})


def adapters_of(tiny):
    """Return two adapters of different ranks and targets."""
    return {
        "one": adapter_of(tiny.config, 1, 2),
        "two": adapter_of(tiny.config, 2, 5, ("q", "v", "out"), 0.2),
    }


def merged(tiny, adapter, **options):
    params = tiny.params
    if adapter is not None:
        params = lora.merge(lora.joined(params, {"blocks": adapter.factors}), adapter.config)
    return unstack(tiny.config, params, **options)


def texts(results):
    return [(each.prompt, each.tokens) for each in results]


def assert_close(found, wanted, atol=1e-5):
    """Compare tokens, and log-probabilities within ``atol``."""
    assert [each.tokens for each in found] == [each.tokens for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=atol)


@pytest.mark.parametrize("model", [pytest.param("learned", marks=pytest.mark.slow), "rotary"])
def test_rows_with_adapters_equal_one_by_one_and_the_merged_models(model, tokenizer, request):
    tiny = request.getfixturevalue(model)
    adapters = adapters_of(tiny)
    decoder = stacking.stack(tiny.decoder, adapters)
    found = generate(decoder, tokenizer, PROMPTS, SETTINGS, adapters=NAMES)
    alone = [
        generate(decoder, tokenizer, [prompt], SETTINGS, adapters=[name])[0]
        for prompt, name in zip(PROMPTS, NAMES, strict=True)
    ]
    assert_close(found, alone)
    models = {name: merged(tiny, adapters.get(name)) for name in set(NAMES)}
    wanted = [
        generate(models[name], tokenizer, [prompt], SETTINGS)[0]
        for prompt, name in zip(PROMPTS, NAMES, strict=True)
    ]
    assert_close(found, wanted)
    # The test can fail: with another adapter every row has another text.
    others = generate(decoder, tokenizer, PROMPTS, SETTINGS, adapters=[None, "one", "two", "one"])
    assert all(a.tokens != b.tokens for a, b in zip(found, others, strict=True))


def test_copies_and_beams_have_the_adapter_of_their_prompt(rotary, tokenizer):
    adapters = adapters_of(rotary)
    decoder = stacking.stack(rotary.decoder, adapters)
    configs = [
        dataclasses.replace(SETTINGS, num_beams=3, num_return_sequences=2),
        dataclasses.replace(SETTINGS, num_return_sequences=2, temperature=0.7),
        dataclasses.replace(SETTINGS, num_beams=3, num_return_sequences=3, temperature=1.0),
        dataclasses.replace(SETTINGS, num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    ]
    found = generate(decoder, tokenizer, PROMPTS, configs, adapters=NAMES)
    wanted = []
    for number, (name, config) in enumerate(zip(NAMES, configs, strict=True)):
        model = merged(rotary, adapters.get(name))
        results = generate(model, tokenizer, [PROMPTS[number]], config)
        wanted += [dataclasses.replace(each, prompt=number) for each in results]
    assert texts(found) == texts(wanted)
    assert_close(found, wanted)


@pytest.mark.slow
def test_lookup_and_a_draft_guess_for_rows_with_adapters(rotary, tokenizer):
    decoder = stacking.stack(rotary.decoder, adapters_of(rotary))
    wanted = generate(decoder, tokenizer, PROMPTS, SETTINGS, adapters=NAMES)
    lookup = dataclasses.replace(SETTINGS, prompt_lookup_num_tokens=3)
    assert_close(generate(decoder, tokenizer, PROMPTS, lookup, adapters=NAMES), wanted)
    options = {"draft": rotary.decoder, "adapters": NAMES}
    assert_close(generate(decoder, tokenizer, PROMPTS, SETTINGS, **options), wanted)


def test_scores_of_rows_with_adapters_equal_those_of_the_merged_models(rotary, tokenizer):
    adapters = adapters_of(rotary)
    decoder = stacking.stack(rotary.decoder, adapters)
    rows = [[40, 41, 42, 43], [50, 60, 70], list(range(30, 61)), [44, 45, 46, 47, 48]]
    of_all = stacking.for_rows(decoder, NAMES)
    # Blocks of two rows, so that rows are chosen out of the four.
    of_all = of_all._replace(block_tokens=64)
    found = score_rows(of_all, rows, [1] * 4)
    masked = score_masked(of_all, tokenizer.mask_id, rows, [[(1, 2), (2, 3)]] * 4)
    *_, best = score_best(of_all, rows, 2)
    for name, row, part, hidden, top in zip(NAMES, rows, found, masked, best, strict=True):
        model = merged(rotary, adapters.get(name))
        np.testing.assert_allclose(part, score_rows(model, [row], [1])[0], atol=1e-5)
        np.testing.assert_allclose(top.logprobs, part, atol=1e-5)
        wanted = score_masked(model, tokenizer.mask_id, [row], [[(1, 2), (2, 3)]])[0]
        np.testing.assert_allclose(hidden, wanted, atol=1e-5)


def test_one_adapter_serves_ranking_filling_and_evaluation(rotary, tokenizer):
    adapters = adapters_of(rotary)
    one = stacking.for_rows(stacking.stack(rotary.decoder, adapters), ["one"])
    model = merged(rotary, adapters["one"])
    options = {"candidates": [" cat", " dog", " man in the rain"], "scorers": ("logprob", "pmi")}
    found, wanted = (rank(each, tokenizer, "The", **options) for each in (one, model))
    assert [each.text for each in found] == [each.text for each in wanted]
    np.testing.assert_allclose([e.score for e in found], [e.score for e in wanted], atol=1e-5)
    losses = [evaluate_text(each, tokenizer, "The cat sat in Spain.").loss for each in (one, model)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    filled = [fill(each, tokenizer, "The <mask> sat.").masks[0] for each in (one, model)]
    assert [c.token for c in filled[0]] == [c.token for c in filled[1]]


def test_a_decoder_is_the_plain_one_for_rows_without_adapters(rotary, tokenizer):
    decoder = stacking.stack(rotary.decoder, adapters_of(rotary))
    wanted = generate(rotary.decoder, tokenizer, PROMPTS, SETTINGS)
    assert_close(generate(decoder, tokenizer, PROMPTS, SETTINGS), wanted)
    assert_close(generate(decoder, tokenizer, PROMPTS, SETTINGS, adapters=[None] * 4), wanted)


@pytest.mark.parametrize(
    ("options", "atol"),
    [
        ({"weights": "int8"}, 0.05),
        pytest.param({"dtype": "bfloat16"}, 0.15, marks=pytest.mark.slow),
    ],
)
def test_rounded_weights_keep_the_adapters_in_floats(rotary, tokenizer, options, atol):
    """The first token's logits stay near those of the merged float32 model, rounding aside."""
    adapters = adapters_of(rotary)
    held = unstack(rotary.config, rotary.params, **options)
    decoder = stacking.for_rows(stacking.stack(held, adapters), NAMES)
    size = capacity(32, decoder.context)
    found = np.asarray(prefill(decoder, PROMPTS, size).logits_BV)
    plain = np.asarray(prefill(rotary.decoder, PROMPTS, size).logits_BV)
    for number, name in enumerate(NAMES):
        model = merged(rotary, adapters.get(name))
        wanted = np.asarray(prefill(model, [PROMPTS[number]], size).logits_BV)[0]
        assert np.abs(found[number] - wanted).max() < atol * np.abs(wanted).max()
        assert name is None or np.abs(plain[number] - wanted).max() > 4 * atol


@pytest.mark.slow
def test_rows_with_adapters_are_split_over_a_mesh(rotary, tokenizer):
    adapters = adapters_of(rotary)
    prompts = PROMPTS[:3]
    wanted = generate(
        stacking.stack(rotary.decoder, adapters), tokenizer, prompts, SETTINGS, adapters=NAMES[:3]
    )
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    held = unstack(rotary.config, rotary.params, mesh=mesh)
    decoder = stacking.stack(held, adapters)
    found = generate(decoder, tokenizer, prompts, SETTINGS, adapters=NAMES[:3])
    assert_close(found, wanted, 1e-4)


@pytest.mark.slow
def test_contrastive_rows_with_adapters_are_filled_up_to_the_mesh(rotary, tokenizer):
    """Of four prompts three are searched, which is no multiple of the devices."""
    contrastive = dataclasses.replace(SETTINGS, penalty_alpha=0.6, top_k=3)
    configs = [*[contrastive] * 3, SETTINGS]
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    found, wanted = (
        generate(
            stacking.stack(each, adapters_of(rotary)), tokenizer, PROMPTS, configs, adapters=NAMES
        )
        for each in (unstack(rotary.config, rotary.params, mesh=mesh), rotary.decoder)
    )
    assert_close(found, wanted, 1e-4)


def test_stages_and_experts_are_refused(deep, balanced):
    mesh = make_mesh(MeshConfig(data=1, pipe=2), jax.devices()[:2])
    held = unstack(deep.config, deep.params, mesh=mesh)
    with pytest.raises(ValueError, match=r"mesh\.pipe=2.*merge one adapter"):
        stacking.stack(held, {"one": adapter_of(deep.config, 1, 2)})
    with pytest.raises(ValueError, match=r"'in' of the experts.*--targets=q,k,v,o"):
        stacking.stack(balanced.decoder, {"one": adapter_of(balanced.config, 1, 2, ("in",))})
    stacking.stack(balanced.decoder, {"one": adapter_of(balanced.config, 1, 2, ("q", "v"))})


def test_unknown_names_and_other_numbers_of_adapters_are_refused(rotary, tokenizer):
    decoder = stacking.stack(rotary.decoder, adapters_of(rotary))
    with pytest.raises(ValueError, match="'three' is not among those of the decoder: one, two"):
        generate(decoder, tokenizer, [[40]], SETTINGS, adapters=["three"])
    with pytest.raises(ValueError, match="1 adapters for 2 prompts"):
        generate(decoder, tokenizer, [[40], [41]], SETTINGS, adapters=["one"])
