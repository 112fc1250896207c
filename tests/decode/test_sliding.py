"""Compare texts beyond the context with what attention to the kept keys gives, longhand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_over_mesh import PROMPTS, compare

from mtnlg_jax.config import DecodeConfig, LayerSpec, MeshConfig, RopeScaling
from mtnlg_jax.decode import slider as slider_module
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.forward import graphs
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.rolling import Rolling
from mtnlg_jax.decode.sliding import Sliding, continue_sliding, room_of
from mtnlg_jax.model.positions import layer_frequencies
from mtnlg_jax.parallel.mesh import make_mesh

ROUNDING = 1e-4  # of a log-probability: keys are turned up to five times
GREEDY = DecodeConfig(max_new_tokens=200, min_new_tokens=200)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, seed=3)
YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=16)
ROPES = {
    "default": RopeScaling(),
    "linear": RopeScaling("linear", factor=2.0),
    "llama3": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=32),
    "yarn": YARN,
    "longrope": RopeScaling(
        "longrope",
        original_max_position_embeddings=32,
        short_factor=(1.0, 1.5),
        long_factor=(1.5, 3.0),
    ),
}
MODELS = {
    # Windows with a base of their own, no positions, and scaled frequencies with a magnitude.
    "mixed": {
        "layers": 3,
        "position_embedding_type": "rotary",
        "num_query_groups": 2,
        "rotary_percent": 0.5,
        "rope_scaling": YARN,
        "qk_layernorm": "head",
        "attention_sink": True,
        "attn_logit_softcapping": 20.0,
        "layer_pattern": (
            LayerSpec(window=7, rotary_base=100.0, rope_scaling=False),
            LayerSpec(rotary=False),
            LayerSpec(),
        ),
    },
    "alibi": {"position_embedding_type": "alibi", "num_query_groups": 2},
    "none": {"position_embedding_type": "none"},
}


def _numbers(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(20, 400, count).tolist()


def _rotated(x_KH, position: int, frequencies):
    """Turn the first dims of each head as complex numbers."""
    frequency, magnitude = frequencies
    half = len(frequency)
    pairs = x_KH[:, :half] + 1j * x_KH[:, half : 2 * half]
    pairs = pairs * magnitude * np.exp(1j * position * frequency)
    return np.concatenate([pairs.real, pairs.imag, x_KH[:, 2 * half :]], -1)


def longhand(model, tokens, room) -> np.ndarray:
    """Return the log-probability of each token behind the first (S - 1,), one token at a time.

    Keys are held as they are before rotation, in a list, and turned to their place in it (Xiao
    2023).
    """
    config = model.config
    outer, layers = model.decoder.params
    whole = nnx.merge(graphs(config)[0], outer)
    blocks = [nnx.merge(graphs(config)[1], layer) for layer in layers]
    held: list[list[tuple]] = [[] for _ in blocks]
    found = []
    for token, following in zip(tokens, tokens[1:], strict=False):
        for number, pairs in enumerate(held):
            if len(pairs) == room.size:
                held[number] = pairs[: room.sinks] + pairs[len(pairs) - room.keep :]
        position = len(held[0])

        def attend(q, k, v, number=0, position=position, return_lse=False, **options):
            pairs = held[number]
            pairs.append((np.asarray(k[0, 0], np.float64), np.asarray(v[0, 0], np.float64)))
            frequencies = layer_frequencies(config, config.layer(number))
            query_NH = np.asarray(q[0, 0], np.float64)
            keys = [k_KH for k_KH, _ in pairs]
            if frequencies is not None:
                query_NH = _rotated(query_NH, position, frequencies)
                keys = [_rotated(k_KH, at, frequencies) for at, k_KH in enumerate(keys)]
            heads = len(query_NH) // config.kv_heads
            keys_TNH = np.repeat(np.stack(keys), heads, 1)
            values_TNH = np.repeat(np.stack([v_KH for _, v_KH in pairs]), heads, 1)
            scores_TN = (keys_TNH * query_NH).sum(-1) / np.sqrt(config.head_width)
            if "softcap" in options:
                scores_TN = options["softcap"] * np.tanh(scores_TN / options["softcap"])
            distance_T = np.arange(len(pairs)) - position
            if "alibi_slopes" in options:
                scores_TN += distance_T[:, None] * np.asarray(options["alibi_slopes"])
            scores_TN[distance_T <= -options.get("window", room.size + 1)] = -np.inf
            weights_TN = np.exp(scores_TN)
            out = (weights_TN[..., None] * values_TNH).sum(0) / weights_TN.sum(0)[:, None]
            out = jnp.asarray(out[None, None], jnp.float32)
            lse = jnp.asarray(np.log(weights_TN.sum(0))[None, :, None], jnp.float32)
            return (out, lse) if return_lse else out

        at = jnp.array([[position]])
        x_BSD = whole.embed(jnp.array([[token]]), at)
        for number, block in enumerate(blocks):
            plain = dataclasses.replace(config.layer(number), rotary=False)
            x_BSD = block(
                x_BSD, at, lambda *a, n=number, **o: attend(*a, number=n, **o), spec=plain
            )
        logits = whole.head().logits(whole.normed(x_BSD))[0, 0]
        found.append(jax.nn.log_softmax(logits)[following])
    return np.array(found)


def _check(model, tokenizer, prompt, sliding, new_tokens):
    """Compare a sampled text with `longhand`."""
    decode = dataclasses.replace(SAMPLED, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    (found,) = continue_sliding(model.decoder, tokenizer, [prompt], decode, sliding)
    room = room_of(model.config, sliding)
    assert len(found.tokens) == new_tokens
    expected = longhand(model, [*room.read(prompt), *found.tokens], room)
    np.testing.assert_allclose(found.logprobs, expected[-new_tokens:], atol=ROUNDING)


@pytest.mark.parametrize(
    ("kind", "sliding", "prompt"),
    [
        ("mixed", Sliding(window=24), 9),
        # A window of 7 reaches the sinks, so all positions are kept; the prompt is too long.
        pytest.param("mixed", Sliding(window=24, keep=4), 31, marks=pytest.mark.slow),
        pytest.param("mixed", Sliding(window=24, sinks=0), 24, marks=pytest.mark.slow),
        pytest.param("alibi", Sliding(window=24, keep=3), 30, marks=pytest.mark.slow),
        pytest.param("none", Sliding(window=24, sinks=1, keep=22), 5, marks=pytest.mark.slow),
    ],
)
def test_a_shifted_cache_is_attended_to_as_if_written_longhand(
    tokenizer, kind, sliding, prompt, make_tiny
):
    model = make_tiny(tokenizer.vocab_size, **MODELS[kind])
    _check(model, tokenizer, _numbers(prompt), sliding, 45)


@pytest.mark.parametrize(
    "rope", [n if n == "yarn" else pytest.param(n, marks=pytest.mark.slow) for n in ROPES]
)
def test_a_layer_turns_its_keys_to_what_they_are_when_read_again(tokenizer, rope, make_tiny):
    # Keys of the first layer depend on the token and its position alone.
    model = make_tiny(
        tokenizer.vocab_size,
        layers=1,
        position_embedding_type="rotary",
        rotary_percent=0.5,
        qk_layernorm="full",
        rope_scaling=ROPES[rope],
    )
    results = [
        continue_sliding(model.decoder, tokenizer, ["The cat"], SAMPLED, Sliding(mode, keep=41))[0]
        for mode in ("shift", "recompute")
    ]
    assert results[0].tokens == results[1].tokens
    np.testing.assert_allclose(results[0].logprobs, results[1].logprobs, atol=ROUNDING)


def test_learned_positions_read_the_kept_tokens_again(learned, tokenizer):
    (found,) = continue_sliding(learned.decoder, tokenizer, [_numbers(70)], SAMPLED)
    room = room_of(learned.config, Sliding())
    text = [*_numbers(70), *found.tokens]
    inputs = room.read(text[:70])
    for at, logprob in zip(range(70, len(text)), found.logprobs, strict=True):
        # The model reads the whole window for each token.
        if at > 70:
            if len(inputs) == room.size:
                inputs = [*text[: room.sinks], *text[at - 1 - room.keep : at - 1]]
            inputs.append(text[at - 1])
        logits = learned.logits([inputs])[0, -1]
        assert abs(jax.nn.log_softmax(logits)[text[at]] - logprob) < ROUNDING


def test_rows_equal_plain_ones_first_and_do_not_depend_on_the_batch(rotary, tokenizer):
    prompts = ["The cat", "In the town where I was born lived", "天地"]
    configs = [
        GREEDY,
        dataclasses.replace(SAMPLED, repetition_penalty=1.3, top_p=0.9),
        dataclasses.replace(SAMPLED, seed=9, stop_strings=("a",), min_new_tokens=0),
    ]
    plain = generate(rotary.decoder, tokenizer, prompts, configs)
    shown = ["", "", ""]

    def on_text(row, piece):
        shown[row] += piece

    together = continue_sliding(rotary.decoder, tokenizer, prompts, configs, on_text=on_text)
    assert shown == [each.text for each in together]
    for one, other in zip(plain, together, strict=True):
        count = len(one.tokens)
        assert one.tokens == other.tokens[:count]
        assert one.logprobs == other.logprobs[:count]
    assert [len(each.tokens) for each in plain[:2]] == [61, 55]
    assert [len(each.tokens) for each in together[:2]] == [200, 200]
    (alone,) = continue_sliding(rotary.decoder, tokenizer, prompts[1:2], configs[1])
    assert alone.tokens == together[1].tokens
    np.testing.assert_allclose(alone.logprobs, together[1].logprobs, atol=ROUNDING)


def test_the_array_of_the_text_grows_and_all_of_it_is_penalized(rotary, tokenizer, monkeypatch):
    from mtnlg_jax.decode import sliding

    decode = dataclasses.replace(SAMPLED, no_repeat_ngram_size=2, num_return_sequences=2)
    expected = continue_sliding(rotary.decoder, tokenizer, ["The cat"], decode)
    monkeypatch.setattr(sliding, "LEAST_TEXT", 8)
    sizes = []
    grow = slider_module._grow
    monkeypatch.setattr(
        slider_module, "_grow", lambda state: sizes.append(state.tokens_BS.shape[1]) or grow(state)
    )
    found = continue_sliding(rotary.decoder, tokenizer, ["The cat"], decode)
    assert sizes == [128]
    assert found == expected
    for each in found:
        text = [*tokenizer.encode("The cat"), *each.tokens]
        assert len(set(zip(text, text[1:], strict=False))) == len(text) - 1


def test_dry_finds_repetitions_of_dropped_tokens(rotary, tokenizer):
    decode = dataclasses.replace(GREEDY, max_new_tokens=60, min_new_tokens=60)
    penalized = dataclasses.replace(decode, dry_multiplier=1e4, dry_allowed_length=1)
    prompt = tokenizer.encode("The cat sat in a town where I was born.")
    rows = continue_sliding(
        rotary.decoder, tokenizer, [prompt] * 2, [penalized, decode], Sliding(window=16)
    )

    def breaks(token):
        return any(each in tokenizer.token_bytes(token) for each in (b"\n", b":", b'"', b"*"))

    def repeated(row):
        text = [*prompt, *row.tokens]
        pairs = [p for p in zip(text, text[1:], strict=False) if not any(map(breaks, p))]
        return len(pairs) - len(set(pairs))

    assert repeated(rows[0]) == 0 < repeated(rows[1])


def _forced(model, text):
    """Return a constraint that writes ``text`` behind its prompt."""
    text_S = jnp.asarray(text)

    def allowed(_, lengths_B, prompts_B):
        next_B = text_S[jnp.minimum(lengths_B, len(text) - 1)]
        return next_B[:, None] == jnp.arange(model.config.vocabulary)[None, :]

    return allowed


@pytest.mark.parametrize(
    ("held", "tolerance"),
    [
        ({"cache": "int8"}, 0.05),
        pytest.param({"dtype": "bfloat16"}, 0.1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rounded_caches_slide_as_well(windowed, tokenizer, held, tolerance, monkeypatch):
    # Keys of windows are turned in their slots, others in their positions.
    kinds = []
    shift = slider_module._shift

    def spy(cache, rows_R, **options):
        kinds.append([isinstance(layer, Rolling) for layer in cache])
        return shift(cache, rows_R, **options)

    monkeypatch.setattr(slider_module, "_shift", spy)
    prompt = _numbers(5)
    (plain,) = continue_sliding(windowed.decoder, tokenizer, [prompt], SAMPLED)
    decoder = unstack(windowed.config, windowed.params, **held)
    text = [*prompt, *plain.tokens]
    (found,) = continue_sliding(
        decoder, tokenizer, [prompt], GREEDY, constraint=_forced(windowed, text)
    )
    assert found.tokens == plain.tokens
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=tolerance)
    # 5 + 200 tokens, of which the last one is not read, in a window of 64 that drops 32 at a time.
    assert kinds == [[True, False]] * 2 * 5


def _of_config(config, **sliding):
    return room_of(config, Sliding(**sliding))


def test_what_cannot_slide_is_refused(learned, rotary, tokenizer):
    assert _of_config(rotary.config) == (64, 4, 28, True)
    assert _of_config(learned.config) == (64, 4, 28, False)
    for sliding, message in (
        ({"window": 65}, "window=65 is not between 2 and the model's context of 64"),
        ({"window": 1}, "window=1 is not between"),
        ({"words": 0}, "words=0 is no length"),
        ({"sinks": -1}, "sinks=-1 is not between 0 and 62"),
        ({"sinks": 63}, "sinks=63 is not between 0 and 62"),
        ({"keep": 60}, "keep=60 is not between 1 and 59"),
        ({"keep": 0}, "keep=0 is not between 1 and 59"),
    ):
        with pytest.raises(ValueError, match=message):
            _of_config(rotary.config, **sliding)
    with pytest.raises(ValueError, match="mode=shift .* learned positions.* choose recompute"):
        _of_config(learned.config, mode="shift")
    for settings in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match=f"writes rows, and {next(iter(settings))}="):
            decode = dataclasses.replace(GREEDY, **settings)
            continue_sliding(rotary.decoder, tokenizer, ["The cat"], decode)
    with pytest.raises(ValueError, match="2 settings for 1 prompts"):
        continue_sliding(rotary.decoder, tokenizer, ["The cat"], [GREEDY, GREEDY])
    assert continue_sliding(rotary.decoder, tokenizer, [], GREEDY) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "tensor": 4}, {"data": 4}, {"tensor": 2, "context": 2}, {"pipe": 2, "data": 2}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["shift", "recompute"])
def test_a_mesh_writes_what_one_device_writes(rotary, tokenizer, sizes, mode):
    def write(decoder, tokenizer):
        configs = [GREEDY, SAMPLED, dataclasses.replace(SAMPLED, seed=8)]
        found = continue_sliding(decoder, tokenizer, PROMPTS, configs, Sliding(mode))
        return [(each.tokens, each.finish_reason, each.logprobs) for each in found]

    write.__name__ = f"sliding {mode}"
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    compare(write, rotary, tokenizer, mesh, ROUNDING)
