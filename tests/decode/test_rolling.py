"""Compare a rolling cache of windowed layers with a cache of all positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax import compat
from mtnlg_jax.config import DecodeConfig, LayerSpec
from mtnlg_jax.decode import cache, generate, results, rows, sampling
from mtnlg_jax.decode.batched_settings import batch_settings
from mtnlg_jax.decode.rolling import Rolling, roll
from mtnlg_jax.decode.scoring import score
from mtnlg_jax.model.attention import decode_attention

ROUNDING = 1e-5
# Prompts shorter than, as long as, and much longer than the window of 7; texts of up to 9 windows.
LENGTHS = (1, 6, 7, 8, 15, 33)
SAMPLED = DecodeConfig(max_new_tokens=60, min_new_tokens=60, temperature=1.0, seed=3)
GREEDY = DecodeConfig(max_new_tokens=60, min_new_tokens=60)
SHORT = DecodeConfig(max_new_tokens=12, min_new_tokens=12)


def _prompts(model):
    draws = np.random.default_rng(1)
    return [draws.integers(20, model.config.vocab_size - 20, n).tolist() for n in LENGTHS]


def _begun(decoder, tokenizer, prefix, windows):
    """Return the arguments of ``advance`` behind the parameters.

    ``windows``: the model whose windows the cache keeps; None keeps all positions. Rows of even
    numbers are greedy, the others drawn.
    """
    owners = np.arange(len(LENGTHS), dtype=np.int32)
    configs = [(GREEDY, SAMPLED)[row % 2] for row in range(len(owners))]
    allowed = results.writable(tokenizer, decoder.config.vocab_size, end=False)
    settings = batch_settings(configs, allowed, tokenizer.eos_ids)
    state, limits = sampling.begin(
        prefix,
        owners,
        np.full(len(owners), 60, np.int32),
        np.arange(len(owners), dtype=np.uint32),
        settings,
        int8_cache=decoder.int8_cache,
        rolling=windows,
    )
    return state, limits, settings, np.int32(decoder.context)


def _written(decoder, tokenizer, prefix, windows):
    """Return the state after the rows reached the context."""
    begun = _begun(decoder, tokenizer, prefix, windows)
    # The step reads the windows from the model that it is given.
    return sampling.advance(decoder.params, *begun, config=windows or decoder.config)


def _slots(layers):
    return [{x.shape[2] for x in jax.tree.leaves(layer)} for layer in layers]


# Slow: float32, and rows that are rolled as they begin, which test_generate_keeps_windows has.
# bfloat16 rounds the weights of the softmax and its sums, which come in another order.
@pytest.mark.parametrize(
    ("held", "rolling", "tolerance"),
    [
        ({"cache": "int8"}, True, ROUNDING),
        pytest.param({}, True, ROUNDING, marks=pytest.mark.slow),
        pytest.param({}, False, ROUNDING, marks=pytest.mark.slow),
        pytest.param({"cache": "int8"}, False, ROUNDING, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16"}, True, 0.05, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_texts_equal_those_of_a_cache_of_all_positions(
    windowed, tokenizer, held, rolling, tolerance
):
    decoder = cache.unstack(windowed.config, windowed.params, **held)
    prompts = _prompts(windowed)
    whole = cache.prefill(decoder, prompts, 64)
    expected = _written(decoder, tokenizer, whole, None)
    assert _slots(expected.cache) == [{64}, {64}]
    # Rolled as prompts are read, or else as rows begin.
    prefix = cache.prefill(decoder, prompts, 64, rolling=rolling)
    found = _written(decoder, tokenizer, prefix, decoder.config)
    assert _slots(found.cache) == [{8}, {64}]
    np.testing.assert_array_equal(found.lengths_B, expected.lengths_B)
    np.testing.assert_array_equal(found.tokens_BS, expected.tokens_BS)
    np.testing.assert_allclose(found.logprobs_BS, expected.logprobs_BS, atol=tolerance)
    assert set(np.asarray(expected.lengths_B).tolist()) == {61, 64}


@pytest.mark.parametrize("more", [-1, pytest.param(1, marks=pytest.mark.slow)])
def test_a_window_off_by_one_is_caught(windowed, tokenizer, more):
    decoder = windowed.decoder
    whole = cache.prefill(decoder, _prompts(windowed), 64)
    expected = _written(decoder, tokenizer, whole, None)
    pattern = (LayerSpec(window=7 + more), LayerSpec())
    planted = dataclasses.replace(decoder.config, layer_pattern=pattern)
    found = _written(decoder, tokenizer, whole, planted)
    # The first new token comes from the prompt's logits, the second through the cache.
    second = np.array(LENGTHS) + 1
    rows = np.arange(len(LENGTHS))
    away = np.abs(found.logprobs_BS - expected.logprobs_BS)[rows, second]
    changed = np.array(LENGTHS) + 1 > 7 + min(more, 0)
    assert away[changed].min() > 100 * ROUNDING
    assert away[~changed].max() < ROUNDING


@pytest.fixture
def held(monkeypatch):
    """Collect the positions of each layer in the caches of rows that `generate` begins."""
    found = []
    begin = rows.begin

    def spy(*args, **options):
        state, limits = begin(*args, **options)
        found.append(_slots(state.cache))
        return state, limits

    monkeypatch.setattr(rows, "begin", spy)
    return found


def test_generate_keeps_windows(windowed, tokenizer, held):
    prompts = _prompts(windowed)[:3]
    plain = generate.generate(windowed.decoder, tokenizer, prompts, SHORT)
    # A prefix stays usable after rows have continued it.
    prefix = cache.prefill(windowed.decoder, prompts, 64)
    for _ in range(2):
        again = generate.continue_prefix(windowed.decoder, tokenizer, prefix, [SHORT] * 3)
        assert [each.tokens for each in again] == [each.tokens for each in plain]
    assert held == [[{8}, {64}]] * 3


@pytest.mark.slow
def test_guesses_and_beams_keep_all_positions(windowed, tokenizer, held):
    write = functools.partial(
        generate.generate, windowed.decoder, tokenizer, _prompts(windowed)[:3]
    )
    plain = write(SHORT)
    guessed = write(dataclasses.replace(SHORT, prompt_lookup_num_tokens=3))
    drafted = write(SHORT, draft=windowed.decoder)
    mixed = write([dataclasses.replace(SHORT, num_beams=2), SHORT, SHORT])
    # Rows beside beams keep their windows.
    assert held == [[{8}, {64}], [{64}, {64}], [{64}, {64}], [{8}, {64}]]
    assert [each.tokens for each in guessed] == [each.tokens for each in plain]
    assert [each.tokens for each in drafted] == [each.tokens for each in plain]
    assert [each.tokens for each in mixed[1:]] == [each.tokens for each in plain[1:]]


def test_readers_of_all_positions_refuse_a_rolled_prefix(windowed, tokenizer):
    prefix = cache.prefill(windowed.decoder, _prompts(windowed), 64, rolling=True)
    run = functools.partial(generate.continue_prefix, windowed.decoder, tokenizer, prefix)
    with pytest.raises(ValueError, match="keeps only the last keys .* beam search, .* needs all"):
        run([DecodeConfig(num_beams=2)] * len(LENGTHS))
    with pytest.raises(ValueError, match="or prompt_lookup_num_tokens needs all"):
        run([DecodeConfig(prompt_lookup_num_tokens=3)] * len(LENGTHS))
    with pytest.raises(ValueError, match="a draft model needs all; .*rolling=False"):
        run([DecodeConfig()] * len(LENGTHS), draft=windowed.decoder)
    with pytest.raises(ValueError, match="scoring needs all"):
        score(windowed.decoder, prefix, [[33]])


def test_layers_that_gain_nothing_keep_all_positions(windowed, learned):
    config = windowed.config
    layer = (jnp.zeros((1, 2, 8, 8)),) * 2
    lengths = jnp.array([3])
    assert isinstance(roll(config, 0, layer, lengths, 9), Rolling)
    assert roll(config, 0, layer, lengths, 8) is layer  # 7 is rounded up to 8
    assert roll(config, 1, layer, lengths, 9) is layer
    # ALiBi needs the distance of each key.
    alibi = dataclasses.replace(config, position_embedding_type="alibi")
    assert roll(alibi, 0, layer, lengths, 9) is layer
    layers = [roll(learned.config, number, layer, lengths, 64) for number in range(2)]
    assert layers == [layer] * 2


def test_steps_change_the_slots_in_place(windowed, tokenizer):
    temporary = []
    for windows in (windowed.config, None):
        prefix = cache.prefill(windowed.decoder, _prompts(windowed), 64)
        begun = _begun(windowed.decoder, tokenizer, prefix, windows)
        lowered = sampling.advance.lower(windowed.decoder.params, *begun, config=windowed.config)
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        held = sum(x.nbytes for x in jax.tree.leaves(begun[0].cache))
        assert held <= memory.alias_size_in_bytes
        temporary.append(memory.temp_size_in_bytes)
    # Copies of the slots made by the loop would be more temporaries.
    assert temporary[0] <= temporary[1]


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("window", [130, 37])
def test_kernels_read_slots_as_positions_in_a_window(windowed, impl, window):
    pattern = (LayerSpec(window=window),)
    config = dataclasses.replace(windowed.config, layer_pattern=pattern)
    dtype, tolerance = {"pallas_tpu": ("float32", 2e-5), "pallas_gpu": ("float16", 3e-3)}[impl]
    draws = np.random.default_rng(0)
    q = jnp.asarray(draws.standard_normal((3, 4, 64)), dtype)
    layer = tuple(jnp.asarray(draws.standard_normal((3, 2, 300, 64)), dtype) for _ in range(2))
    lengths = jnp.array([300, 20, window])
    k, v = (x.astype("float32") for x in layer)
    whole = functools.partial(decode_attention, window=window, impl="xla", return_lse=True)
    expected = whole(q.astype("float32"), k, v, lengths)
    slots = roll(config, 0, layer, lengths, 300)
    run = functools.partial(decode_attention, impl=impl, return_lse=True)
    with compat.interpreted(detect_races=True):
        found = jax.jit(run)(q, *slots.arrays, jnp.minimum(lengths, window))
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)
