"""Check that cached decoding equals decoding without a cache, and updates the cache in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode import cache, results, sampling
from mtnlg_jax.decode.batched_settings import batch_settings

ROUNDING = 1e-5  # float32, products of other shapes
STEPS = 12
LENGTHS = (3, 17, 30)


def _tokens(tiny):
    return np.random.default_rng(0).integers(0, tiny.config.vocab_size, (3, 48)).astype(np.int32)


_step = jax.jit(cache.step, static_argnums=0)


def _decoded(decoder, tokens, lengths):
    """Return logits of every row from the end of its prompt on: (B, STEPS + 1, V)."""
    prefix = cache.prefill(
        decoder, [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)], 48
    )
    logits = [prefix.logits_BV]
    layers = prefix.cache
    positions = np.array(lengths)
    for _ in range(STEPS):
        read = tokens[np.arange(len(tokens)), positions]
        new, layers = _step(decoder.config, decoder.params, layers, read, positions)
        logits.append(new)
        positions = positions + 1
    return np.stack(logits, 1)


def test_cached_decoding_equals_the_full_forward_pass_at_every_position(tiny):
    tokens = _tokens(tiny)
    full = tiny.logits(tokens)
    decoded = _decoded(tiny.decoder, tokens, LENGTHS)
    assert np.abs(full).max() > 1, "logits near 0 would prove nothing"
    for row, length in enumerate(LENGTHS):
        expected = full[row, length - 1 : length + STEPS]
        np.testing.assert_allclose(decoded[row], expected, atol=ROUNDING, rtol=ROUNDING)


def test_a_bfloat16_cache_stays_near_the_exact_logits(learned):
    tokens = _tokens(learned)
    half = cache.unstack(learned.config, learned.params, "bfloat16")
    prefix = cache.prefill(half, [tokens[0, :9].tolist()], 48)
    assert {x.dtype for x in jax.tree.leaves(prefix.cache)} == {jnp.dtype("bfloat16")}
    assert prefix.logits_BV.dtype == jnp.float32
    exact = _decoded(learned.decoder, tokens, LENGTHS)
    near = _decoded(half, tokens, LENGTHS)
    assert 0 < np.abs(exact - near).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_change_the_cache_in_place(learned, tokenizer, rows):
    prefix = cache.prefill(learned.decoder, [[5, 6, 7]] * rows, 64)
    allowed = results.writable(tokenizer, learned.config.vocab_size)
    settings = batch_settings([DecodeConfig()] * rows, allowed, tokenizer.eos_ids)
    state, limits = sampling.begin(
        prefix, np.arange(rows), np.full(rows, 9), np.zeros(rows, np.uint32), settings
    )
    compiled = sampling.advance.lower(
        learned.decoder.params,
        state,
        limits,
        settings,
        np.int32(1),
        config=learned.config,
    ).compile()
    memory = compiled.memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(state.cache))
    assert held <= memory.alias_size_in_bytes
    # Copies of the cache made by the loop would be temporaries.
    assert memory.temp_size_in_bytes < held / 2


def test_buckets():
    assert [cache.bucket(n, 100) for n in (1, 16, 17, 33, 64, 65, 100)] == [
        16,
        16,
        32,
        64,
        64,
        100,
        100,
    ]
    assert [cache.capacity(n, 1000) for n in (1, 128, 129, 192, 193, 256, 257, 385, 600, 999)] == [
        128,
        128,
        192,
        192,
        256,
        256,
        384,
        512,
        768,
        1000,
    ]
    assert cache.capacity(5, 64) == 64


def test_invalid_arguments_raise_an_error(learned):
    with pytest.raises(ValueError, match="0, 4.* 16"):
        cache.prefill(learned.decoder, [[], [1, 2, 3, 4]], 16)
    with pytest.raises(ValueError, match="17.* 16"):
        cache.prefill(learned.decoder, [[1] * 17], 16)
    last = learned.config.vocab_size - 1
    for bad in (-1, last + 1):
        with pytest.raises(ValueError, match=f"{bad} .*0 to {last}"):
            cache.prefill(learned.decoder, [[1, bad]], 16)
    with pytest.raises(ValueError, match="float16.*float32 or bfloat16"):
        cache.unstack(learned.config, learned.params, "float16")
