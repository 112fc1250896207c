"""Check that guessed tokens change the speed of decoding but not its output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mtnlg_jax.config import DecodeConfig, ModelConfig
from mtnlg_jax.decode.cache import Decoder, prefill, read, step, unstack
from mtnlg_jax.decode.generate import continue_prefix, generate
from mtnlg_jax.decode.speculative import Guessing, look_up
from mtnlg_jax.model.transformer import abstract_model

PROMPTS = [[40], [50, 60, 70, 50, 60], list(range(30, 61))]
SETTINGS = DecodeConfig(max_new_tokens=30)
GUESSES = {"prompt_lookup_num_tokens": 4, "num_assistant_tokens": 3}


@pytest.fixture(scope="session")
def draft(learned) -> Decoder:
    """Return a draft that is close enough to the model to be right sometimes."""
    rng = np.random.default_rng(4)
    noisy = jax.tree.map(
        lambda x: x + 0.2 * jnp.std(x) * jnp.asarray(rng.normal(size=x.shape), jnp.float32),
        learned.params,
    )
    return unstack(learned.config, noisy)


def _guessing(settings: DecodeConfig, draft) -> DecodeConfig:
    name = "prompt_lookup_num_tokens" if draft is None else "num_assistant_tokens"
    return dataclasses.replace(settings, **{name: GUESSES[name]})


def _plain(results):
    return [dataclasses.replace(each, guessed=0, accepted=0, logprobs=()) for each in results]


def test_reading_several_tokens_equals_reading_one_at_a_time(tiny):
    tokens = np.random.default_rng(0).integers(0, tiny.config.vocab_size, (2, 20)).astype(np.int32)
    starts = np.array([1, 12], np.int32)
    prefix = prefill(
        tiny.decoder, [row[:n].tolist() for row, n in zip(tokens, starts, strict=True)], 16
    )
    block = np.stack([row[n : n + 5] for row, n in zip(tokens, starts, strict=True)])
    logits, cache = jax.jit(read, static_argnums=0)(
        tiny.config, tiny.decoder.params, prefix.cache, block, starts
    )
    layers = prefix.cache
    single = jax.jit(step, static_argnums=0)
    for place in range(4):  # the fifth of the second row is past the cache
        one, layers = single(
            tiny.config, tiny.decoder.params, layers, block[:, place], starts + place
        )
        np.testing.assert_allclose(logits[:, place], one, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(layers), strict=True):
        np.testing.assert_allclose(ours[0, :, :5], theirs[0, :, :5], atol=1e-5)
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)


@pytest.mark.parametrize(
    "model", [None, pytest.param("draft", marks=pytest.mark.slow)], ids=["look-up", "draft"]
)
def test_greedy_rows_do_not_change(learned, tokenizer, request, model):
    draft = model and request.getfixturevalue(model)
    settings = [
        SETTINGS,
        dataclasses.replace(SETTINGS, repetition_penalty=1.3, no_repeat_ngram_size=2),
        dataclasses.replace(
            SETTINGS,
            min_new_tokens=25,
            frequency_penalty=0.7,
            forced_tokens=((7, 99),),
            eos_token_id=(70, 71, 72),
        ),
    ]
    expected = generate(learned.decoder, tokenizer, PROMPTS, settings)
    results = generate(
        learned.decoder,
        tokenizer,
        PROMPTS,
        [_guessing(each, draft) for each in settings],
        draft=draft,
    )
    assert _plain(results) == _plain(expected)
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert other.guessed == 0 < one.guessed
    assert 0 < sum(each.accepted for each in results) < sum(each.guessed for each in results)


def test_context_ends_stops_and_streams_do_not_change(learned, tokenizer):
    settings = dataclasses.replace(SETTINGS, max_new_tokens=60, min_new_tokens=60)
    text = generate(learned.decoder, tokenizer, PROMPTS, settings)
    assert [len(each.tokens) for each in text] == [60, 59, 33]
    stop = text[1].text[9:11]
    for change in ({}, {"stop_strings": (stop,)}, {"stop_sequences": (text[0].tokens[5:7],)}):
        changed = dataclasses.replace(settings, **change)
        pieces = [""] * len(PROMPTS)

        def show(row, piece, pieces=pieces):
            pieces[row] += piece

        expected = generate(learned.decoder, tokenizer, PROMPTS, changed)
        results = generate(
            learned.decoder, tokenizer, PROMPTS, _guessing(changed, None), on_text=show
        )
        assert _plain(results) == _plain(expected) and pieces == [each.text for each in results]


def test_a_draft_for_beams_is_refused_behind_a_prefix_as_well(learned, tokenizer):
    prefix = prefill(learned.decoder, [tokenizer.encode("The cat")], 64)
    beams = [DecodeConfig(num_beams=2)]
    with pytest.raises(ValueError, match="num_beams=2 continues several; set num_beams=1"):
        continue_prefix(learned.decoder, tokenizer, prefix, beams, draft=learned.decoder)


@pytest.mark.slow
def test_guesses_of_the_model_itself_are_always_accepted(learned, tokenizer):
    settings = dataclasses.replace(SETTINGS, num_assistant_tokens=3)
    results = generate(learned.decoder, tokenizer, PROMPTS, settings, draft=learned.decoder)
    assert sum(each.accepted for each in results) == sum(each.guessed for each in results) > 50
    drawn = generate(
        learned.decoder,
        tokenizer,
        PROMPTS,
        dataclasses.replace(settings, temperature=1.0, top_k=20),
        draft=learned.decoder,
    )
    assert sum(each.accepted for each in drawn) == sum(each.guessed for each in drawn) > 50


class Digits:
    vocab_size = 7
    bos_id = 6
    eos_id = 6
    eos_ids = (6,)
    prompt_bos = False
    is_special = np.arange(7) == 6

    def token_bytes(self, token):
        return b"%d" % token


@pytest.mark.parametrize("guess", ["look-up", pytest.param("draft", marks=pytest.mark.slow)])
def test_sampled_rows_follow_the_distribution_of_the_model(guess):
    config = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=7, max_position_embeddings=16
    )

    def drawn(seed):
        rng = np.random.default_rng(seed)
        return unstack(
            config,
            jax.tree.map(
                lambda x: jnp.asarray(rng.normal(0, 0.7, x.shape), jnp.float32),
                abstract_model(config)[1],
            ),
        )

    model = drawn(1)
    draft = drawn(2) if guess == "draft" else None
    prompt = [0, 1, 2, 3, 0, 1, 2]
    number = 3000
    news = 3
    settings = DecodeConfig(
        max_new_tokens=news,
        min_new_tokens=news,
        temperature=1.3,
        top_k=4,
        presence_penalty=0.5,
        num_return_sequences=number,
    )
    asked = dataclasses.replace(
        settings, **({"num_assistant_tokens": 2} if draft else {"prompt_lookup_num_tokens": 2})
    )
    results = generate(model, Digits(), [prompt], asked, draft=draft)
    counts = np.zeros((6, 6, 6))
    np.add.at(counts, tuple(np.array([each.tokens for each in results]).T), 1)
    assert 0.05 < sum(r.accepted for r in results) / sum(r.guessed for r in results) < 0.95

    plain = generate(model, Digits(), [prompt], settings)
    reference = np.zeros((6, 6, 6))
    np.add.at(reference, tuple(np.array([each.tokens for each in plain]).T), 1)
    for axes in ((1, 2), (0, 2), (0, 1), (0,), (2,)):  # every position, and pairs of them
        both = np.stack([counts.sum(axes).ravel(), reference.sum(axes).ravel()])
        both = both[:, both.sum(0) >= 20]
        assert both.shape[1] > 2 and stats.chi2_contingency(both).pvalue > 1e-3, (axes, both)


@pytest.mark.slow
def test_sampled_rows_do_not_depend_on_the_batch(learned, tokenizer):
    settings = [
        dataclasses.replace(SETTINGS, temperature=1.0, seed=seed, prompt_lookup_num_tokens=guesses)
        for seed, guesses in ((5, 4), (6, 0), (7, 2))
    ]
    together = generate(learned.decoder, tokenizer, PROMPTS, settings)
    assert together[1].guessed == 0
    for prompt, each, result in zip(PROMPTS, settings, together, strict=True):
        alone = generate(learned.decoder, tokenizer, [prompt], each)[0]
        assert alone.tokens == result.tokens


def test_look_up_finds_the_first_longest_match():
    tokens = np.array(
        [
            [1, 2, 3, 9, 2, 3, 5, 2, 3, 0, 0, 0],
            [4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0],
            [7, 5, 8, 6, 5, 0, 0, 0, 0, 0, 0, 0],
        ],
        np.int32,
    )
    lengths = np.array([9, 3, 9, 5], np.int32)
    most = np.array([3, 3, 3, 1], np.int32)
    guessing = Guessing(most, np.full(4, 2, np.int32), most=3, ngrams=2, draft=None)
    guesses, counts = look_up(tokens, lengths, guessing)
    assert counts.tolist() == [3, 1, 0, 1]
    assert guesses[0].tolist() == [9, 2, 3] and guesses[1, 0] == 4 and guesses[3, 0] == 8


def test_invalid_settings_raise_an_error(learned, rotary, tokenizer):
    def ask(message, draft=None, **settings):
        with pytest.raises(ValueError, match=message):
            generate(learned.decoder, tokenizer, [[5]], DecodeConfig(**settings), draft=draft)

    model = learned.decoder
    other = model._replace(config=dataclasses.replace(model.config, vocab_size=99))
    ask(f"vocabulary of 99 tokens and the model one of {learned.config.vocab_size}", other)
    ask(
        "context holds 32 tokens and the model's 64",
        model._replace(config=dataclasses.replace(model.config, max_position_embeddings=32)),
    )
    ask("num_beams=2", model, num_beams=2)
    ask("prompt_lookup_num_tokens=3 would guess", model, prompt_lookup_num_tokens=3)
    ask(
        "prompt_lookup_num_tokens=3 guesses the next tokens of one sequence",
        prompt_lookup_num_tokens=3,
        num_beams=2,
    )
    ask("max_matching_ngram_size=0", max_matching_ngram_size=0)
    ask("num_assistant_tokens=0", num_assistant_tokens=0)
